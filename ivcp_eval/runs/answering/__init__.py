"""How samples are answered: one model in memory, many variants in one pass."""
