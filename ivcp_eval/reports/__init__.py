"""Results: the CSV and its schema, the comparison with a baseline, tables and curves."""
