"""Answers of a server in place of a model in this process (docs/design/served.md)."""
