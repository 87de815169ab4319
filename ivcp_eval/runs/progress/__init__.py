"""How far a run is, from its files."""
