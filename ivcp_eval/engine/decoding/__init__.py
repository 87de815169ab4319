"""Forwards after the prefill: masks that fit what each layer's cache holds, drafted tokens, single steps."""
