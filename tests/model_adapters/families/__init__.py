"""One tiny random model per family, in ``tests/families/<family>.py``; see `tests.tiny_models`."""
