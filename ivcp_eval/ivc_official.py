"""The released IVC-Prune code of each family, reproduced with its quirks (``preset="official"``).

Reference: https://github.com/FireRedTeam/IVC-Prune @ 03afd9c. Nothing here is copied; the rules were read off the
code and are held to recorded outputs of it in tests/oracle. Where a quirk is a bug, it is named as such.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ivcp_eval.interface import CachePolicy, Selection, Signals
from ivcp_eval.methods.ivc_prune import value_similarity
from ivcp_eval.ops import ranking, top


def cache_policy(family: str) -> CachePolicy:
    """Which caches the released code of a family cuts."""
    _rule(family)
    return "all_layers"


def select(signals: Signals) -> Selection:
    """The released rule of the signals' family."""
    return _rule(signals.family)(signals)


def _rule(family: str) -> Callable[[Signals], Selection]:
    if family not in RULES:
        raise ValueError(f"there is no released IVC-Prune code for {family!r}; only for {', '.join(sorted(RULES))}")
    return RULES[family]


def _qwen2_5_vl(signals: Signals) -> Selection:
    """Qwen2.5-VL (modeling_qwen2_5_vl.py:1355-1551).

    Quirks: only the row's first image is pruned, and tokens of later images act as text queries; queries begin two
    tokens after the image, which skips <|vision_end|> and the first question token; the budget is exceeded where
    coordinates and seeds alone are more (ratios below about 0.21).
    """
    image = signals.images[0]
    at = signals.visual[image.tokens]
    n = at.numel()
    every = torch.arange(int(signals.visual.numel() + signals.text.numel()), device=at.device)
    queries = every[every >= at[-1] + 3]
    assert signals.value is not None
    seeds = top(value_similarity(signals.value, queries, at), max(1, round(0.01 * n)))
    refined = value_similarity(signals.value, torch.cat((queries, at[seeds])), at)
    kept = torch.zeros(n, dtype=torch.bool, device=at.device)
    for part in signals.rope():
        kept[torch.topk(part[:, at].mean(dim=(0, 2)), round(0.1 * n)).indices] = True
    kept[seeds] = True
    fill = ranking(refined.masked_fill(kept, -torch.inf))
    kept[fill[: max(0, image.budget - int(kept.sum()))]] = True
    others = torch.ones(signals.n_visual, dtype=torch.bool, device=at.device)
    others[image.tokens] = kept
    return Selection(others.nonzero().flatten(), exact=False)


RULES: dict[str, Callable[[Signals], Selection]] = {"qwen2_5_vl": _qwen2_5_vl}
