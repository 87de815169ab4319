"""One tiny random model per family, in ``<family>.py``; see `tests.engine.tiny_models`."""
