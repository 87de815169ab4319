"""What a method sees: captured in the decoder and the vision tower, built into `Signals`; edits of cached keys."""
