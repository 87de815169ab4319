"""A tiny Qwen2.5-VL trained on generated scenes: a laboratory animal for the evaluation engine.

Nothing is imported here, so that ``import ivcp_eval`` stays light. ``scenes`` draws, ``tasks`` asks,
``processor`` builds tokenizer, processor and configuration offline, ``train`` trains and
``build_benchmarks`` writes ``datasets/tiny_*.tsv``.
"""
