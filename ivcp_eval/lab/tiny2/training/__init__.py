"""Training of the second embedded model; nothing here is imported at run time."""
