"""Oracle: DART's LLaVA code, which is as the port to Qwen2.5-VL but for the counts."""

from __future__ import annotations

from tests.methods.oracle.dart_qwen2_5_vl import outputs

__all__ = ["outputs"]
