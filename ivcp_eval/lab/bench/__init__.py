"""Benches: what pruning, sharing and choosing cost, beside their bounds."""
