"""What one sets up with: models, data, methods."""
