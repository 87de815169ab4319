"""One independent oracle per method: a literal, slow transcription of its formula, or values counted by hand."""
