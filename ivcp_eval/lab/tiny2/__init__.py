"""The second embedded model: a small Qwen2.5-VL taught through text only, as real vision-language models are.

Nothing is imported here, so that ``import ivcp_eval`` stays light. ``scenes`` draws, ``tasks`` asks, ``processor``
builds tokenizer, processor and configuration, ``training`` trains and ``evaluate`` holds a model to its acceptance.
"""
