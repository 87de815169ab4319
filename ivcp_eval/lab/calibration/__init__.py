"""Computes what a method reads from a file, for any model, on questions that are no benchmark's."""
