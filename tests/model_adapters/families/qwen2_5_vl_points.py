"""Tiny POINTS-Long in the mode that is not the stock model's: at most 3 x 4 tokens of a picture or a step."""

from __future__ import annotations

from typing import Any

from torch import nn

from model_adapters.qwen2_5_vl_points.modeling import PointsConfig, PointsForConditionalGeneration
from tests.engine.tiny_models import Rows
from tests.model_adapters.families import _qwen, qwen2_5_vl
from tests.model_adapters.families._qwen import END, GRIDS, PACES, START, VIDEO, VIDEOS
from tests.model_adapters.families._shared import IMAGE

MOST = (3, 4)


def few(rows: int, columns: int) -> int:
    """Tokens that are shown of so many."""
    return min(rows, MOST[0]) * min(columns, MOST[1])


N_TOKENS = tuple(few(*grid) for grid in GRIDS)
STEPS = tuple((few(rows, columns),) * steps for steps, rows, columns in VIDEOS)
SECOND_TURN_DROPS = qwen2_5_vl.SECOND_TURN_DROPS
APART = {1, 2}  # of the rows or columns of the full set, some are left out

__all__ = ["END", "IMAGE", "N_TOKENS", "PACES", "SECOND_TURN_DROPS", "START", "STEPS", "VIDEO", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """That of `qwen2_5_vl`, with the small set in its tower."""
    stock = qwen2_5_vl.model(attn).config.to_dict()
    vision = stock["vision_config"] | {
        "model_type": "points_long_vision",
        "mode": "standby",
        "standby_rows": MOST[0],
        "standby_columns": MOST[1],
    }
    config = PointsConfig(**stock | {"model_type": "points_long", "vision_config": vision})
    return PointsForConditionalGeneration._from_config(config, attn_implementation=attn)


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """As of `qwen2_5_vl`, with fewer placeholders."""
    return _qwen.inputs(rows, seed, patch_size=14, paced=True, tokens=few)
