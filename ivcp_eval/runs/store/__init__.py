"""What a run has on disk while it works: answers, claims, marks."""
