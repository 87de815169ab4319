"""Training of what methods read from a file: `ivcp lab train NAME --model M`. See docs/design/training.md."""
