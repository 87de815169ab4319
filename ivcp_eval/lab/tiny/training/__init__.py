"""Training of the embedded model; nothing here is imported when it is used."""
