"""Verbs that run models or score what they answered."""
