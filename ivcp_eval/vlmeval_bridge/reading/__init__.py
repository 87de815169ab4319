"""Files that VLMEvalKit gets: checked before it reads them, text that stays text, pictures that are whole."""
