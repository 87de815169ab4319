"""Laboratory models: small, real architectures trained here, for tests and for studying methods."""
