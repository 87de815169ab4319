"""What this repository measures on itself: the embedded models and the benches."""
