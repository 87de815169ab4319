"""The released IVC-Prune code of each family, reproduced with its quirks (``preset="official"``).

Reference: https://github.com/FireRedTeam/IVC-Prune @ 03afd9c. Nothing here is copied; the rules were read off the
code and are held to recorded outputs of it in tests/engine/oracle. Where a quirk is a bug, it is named as such.

Common to all: only the row's first image is pruned (further images count as text), and ties fall as ``torch.topk``
lets them, which is what makes the recorded choices reproducible. Numbers are float32; the published runs took the
coordinate scores in bfloat16, where ties are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Image, ModelFacts, Selection, Signals, Unsupported
from ivcp_eval.methods.ivc_prune.similarity import value_similarity

FIXED_RATIO = 0.5  # the ratio under which families with literals instead of a ratio are run
TILE = 256  # InternVL: tokens of a tile, 16 x 16, where the model does not say
SIDE = 14  # DeepSeek-VL2: rows of the global view, where the model does not say; each ends in a newline token


def cut(model: ModelFacts, layer: int, ratio: float) -> Cut:
    """The cut of a family's released code.

    LLaVA and DeepSeek leave layer 0's cache whole: they read the length of the prompt off it. InternVL's values come
    from hidden states that were not normalised.

    Raises:
        Unsupported: a family without released code, or a ratio other than 0.5 where the code has literals instead.
    """
    _rule(model.family)
    if model.family != "qwen2_5_vl" and ratio != FIXED_RATIO:
        raise Unsupported(
            f"ratio {ratio} with preset='official' on {model.family!r}: its released code has fixed numbers and no "
            f"retention ratio. Pass ratio={FIXED_RATIO} to run it as it is, or preset='general' for other ratios."
        )
    if model.family == "internvl":
        return Cut(layer, ratio, needs=frozenset({"raw_value"}))
    if model.family in ("llava", "deepseek_vl2"):
        return Cut(layer, ratio, cache="all_but_first")
    return Cut(layer, ratio)


def select(signals: Signals) -> Selection:
    """The released rule of the signals' family, on the first image of the row."""
    image = signals.images[0]
    kept = torch.ones(signals.n_visual, dtype=torch.bool, device=signals.visual.device)
    kept[image.tokens] = _rule(signals.family)(signals, image)
    return Selection(kept.nonzero().flatten(), exact=False)


def _rule(family: str) -> Callable[[Signals, Image], Tensor]:
    if family not in RULES:
        raise Unsupported(f"there is no released IVC-Prune code for {family!r}; only for {', '.join(sorted(RULES))}")
    return RULES[family]


def _columns(signals: Signals) -> Tensor:
    """0..n-1, every alive token of the row."""
    return torch.arange(signals.hidden.shape[0], device=signals.visual.device)


def _after(signals: Signals, last: Tensor, skipped: int) -> Tensor:
    """The queries: everything behind the image's last token but the first ``skipped`` tokens.

    Where nothing is left, the row's last token, so that the choice is defined: the released code averages an empty
    set to NaN there, or crashes.
    """
    columns = _columns(signals)
    queries = columns[int(last) + 1 + skipped :]
    return queries if queries.numel() else columns[-1:]


def _coordinates(signals: Signals, at: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cos and mean sin over all axes and rotary dimensions, each (N,)."""
    cos, sin = (part[:, at].mean(dim=(0, 2)) for part in signals.rope())
    return cos, sin


def _mask(n: int, *indices: Tensor) -> Tensor:
    kept = torch.zeros(n, dtype=torch.bool, device=indices[0].device)
    kept[torch.cat(indices)] = True
    return kept


def _qwen2_5_vl(signals: Signals, image: Image) -> Tensor:
    """Qwen2.5-VL (modeling_qwen2_5_vl.py:1355-1551).

    Quirks: tokens of later images act as text queries; queries begin two tokens after the image, which skips
    <|vision_end|> and the first question token; the budget is exceeded where coordinates and seeds alone are more
    (ratios below about 0.21).
    """
    at = signals.visual[image.tokens]
    n = at.numel()
    queries = _after(signals, at[-1], skipped=2)
    assert signals.value is not None
    seeds = torch.topk(value_similarity(signals.value, queries, at), max(1, round(0.01 * n))).indices
    refined = value_similarity(signals.value, torch.cat((queries, at[seeds])), at)
    kept = _mask(n, *(torch.topk(part, round(0.1 * n)).indices for part in _coordinates(signals, at)), seeds)
    best = torch.topk(refined, n).indices
    kept[best[~kept[best]][: max(0, image.budget - int(kept.sum()))]] = True
    return kept


def _llava(signals: Signals, image: Image) -> Tensor:
    """LLaVA-1.5 (llama/modeling_llama.py:860-1045).

    Quirks: a plain union of 5 % + 5 % coordinates, 1 % seeds and 20 % foreground, without a budget (28 % remain);
    similarities are normalised over the whole sequence, not the image; queries skip two text tokens; layer 0 keeps
    its cache. The published configuration starts the image at column 5, which is right only without a system prompt:
    pass that span as ``image_mask`` to reproduce it.
    """
    at = signals.visual[image.tokens]
    n = at.numel()
    queries, everything = _after(signals, at[-1], skipped=2), _columns(signals)
    assert signals.value is not None
    text_score = value_similarity(signals.value, queries, everything)[at]
    seeds = torch.topk(text_score, max(1, round(0.01 * n))).indices
    refined = value_similarity(signals.value, torch.cat((at[seeds], queries)), everything)[at]
    foreground = torch.topk(refined, round(0.2 * n)).indices
    ivc = [torch.topk(part, round(0.05 * n)).indices for part in _coordinates(signals, at)]
    return _mask(n, foreground, seeds, *ivc)


def _internvl(signals: Signals, image: Image) -> Tensor:
    """InternVL2.5 on InternLM2 (internvl/modeling_internlm2.py:924-991, 1258-1491); thumbnail last.

    Quirks: values are projected from hidden states without the layer's norm; similarities are normalised over the
    whole sequence; seeds and foreground come from the thumbnail alone, whose foreground is mapped to the tiles; what
    is missing to half of all tokens is filled from the thumbnail alone, so that many tiles fall short of it; over
    budget, the highest indices (the thumbnail's) would go first.
    """
    at = signals.visual[image.tokens]
    n, tile = at.numel(), image.span.views[-1] if image.span.views else TILE
    if n % tile:
        raise ValueError(f"preset='official' of 'internvl' needs tiles of {tile} tokens, got an image of {n} tokens")
    tail = n - tile
    queries, everything = _after(signals, at[-1], skipped=2), _columns(signals)
    value = signals.raw_value
    assert value is not None
    text_score = value_similarity(value, queries, everything)[at[tail:]]
    seeds = torch.topk(text_score, max(1, round(0.01 * tile))).indices
    refined = value_similarity(value, torch.cat((at[tail:][seeds], queries)), everything)[at[tail:]]
    best = torch.topk(refined, tile).indices + tail  # thumbnail tokens, as indices of the image, best first

    kept = torch.zeros(n, dtype=torch.bool, device=at.device)
    for part in _coordinates(signals, at):
        kept.view(-1, tile).scatter_(1, torch.topk(part.view(-1, tile), round(0.1 * tile), dim=-1).indices, True)
    missing = max(0, round(0.5 * tile) - int(kept[tail:].sum()))
    foreground = best[~kept[best]][:missing]
    kept[foreground] = True
    kept[seeds + tail] = True
    if tail:
        kept[_thumbnail_to_tiles(foreground - tail, tile, _tiles(image, n // tile - 1))] = True
    missing = round(0.5 * n) - int(kept.sum())
    if missing >= 0:
        kept[best[~kept[best]][:missing]] = True
        return kept
    return _mask(n, kept.nonzero().flatten()[:missing])


def _tiles(image: Image, n_tiles: int | None = None) -> tuple[int, int]:
    """(w, h) of the image, checked against the number of tiles its tokens stand for."""
    tiles = image.span.tiles
    if tiles is None or (n_tiles is not None and tiles[0] * tiles[1] != n_tiles):
        need = "its tile grid" if n_tiles is None else f"a tile grid of {n_tiles} tiles"
        raise ValueError(f"preset='official' needs {need} of the image, got {tiles}. Pass `tiles=(w, h)` to prune.")
    return tiles


def _thumbnail_to_tiles(tokens: Tensor, tile: int, tiles: tuple[int, int]) -> Tensor:
    """Tokens of the square thumbnail -> all tokens of the (w, h) tiles that show the same place, row-major tiles."""
    width, height = tiles
    side = math.isqrt(tile)
    dy, dx = torch.meshgrid(
        torch.arange(height, device=tokens.device), torch.arange(width, device=tokens.device), indexing="ij"
    )
    rows = (tokens // side)[:, None] * height + dy.flatten()
    columns = (tokens % side)[:, None] * width + dx.flatten()
    number = (rows // side) * width + columns // side
    return (number * tile + (rows % side) * side + columns % side).flatten()


def _deepseek_vl2(signals: Signals, image: Image) -> Tensor:
    """DeepSeek-VL2 (DeepSeek-VL2/deepseek_vl2/models/modeling_deepseek.py:1740-1801, 2230-2380); global view first.

    Quirks: scores see the global view only (its newline column and padding excluded), whose foreground is mapped to
    the tiles; coordinates are 10 % + 10 % of the global view and 15 % + 15 % of every text row of the tiled view; all
    newline and separator tokens stay; there may be no seed at all; layer 0 keeps its cache; no budget (50 to 54 %
    remain).
    """
    at = signals.visual[image.tokens]
    n, device = at.numel(), at.device
    width, height = _tiles(image)
    side = math.isqrt(image.span.views[0] - 1) if image.span.views else SIDE
    n_global = side * (side + 1)
    row, n_rows = width * side + 1, height * side
    expected = n_global + 1 + n_rows * row
    if n != expected:
        raise ValueError(
            f"preset='official' of 'deepseek_vl2': an image of {width} x {height} tiles has {expected} tokens, "
            f"got {n}. Check `tiles=(w, h)`."
        )
    queries, overview = _after(signals, at[-1], skipped=1), at[:n_global]
    valid = torch.ones(n_global, dtype=torch.bool, device=device)
    valid[side :: side + 1] = False
    valid[list(image.span.padding)] = False
    candidates = valid.nonzero().flatten()

    assert signals.value is not None
    text_score = value_similarity(signals.value, queries, overview)
    seeds = candidates[torch.topk(text_score[candidates], round(0.01 * candidates.numel())).indices]
    refined = value_similarity(signals.value, torch.cat((queries, overview[seeds])), overview)

    local = torch.zeros(n_rows, row, dtype=torch.bool, device=device)
    kept = torch.zeros(n_global, dtype=torch.bool, device=device)
    for part in _coordinates(signals, at):
        kept[torch.topk(part[:n_global], round(0.1 * n_global)).indices] = True
        tiled = part[n_global + 1 :].view(n_rows, row)
        local.scatter_(1, torch.topk(tiled, round(0.15 * row), dim=-1).indices, True)
    best = candidates[refined[candidates].argsort(descending=True)]
    missing = max(1, round(0.5 * n_global) - int(kept.sum()))
    foreground = torch.cat((seeds, best[~kept[best]][:missing]))
    kept[foreground] = True
    kept[side :: side + 1] = True
    seen = _mask(n_global, foreground).view(side, side + 1)[:, :-1]
    local[:, :-1] |= seen.repeat_interleave(height, dim=0).repeat_interleave(width, dim=1)
    local[:, -1] = True
    return torch.cat((kept, kept.new_ones(1), local.flatten()))


RULES: dict[str, Callable[[Signals, Image], Tensor]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "llava": _llava,
    "internvl": _internvl,
    "deepseek_vl2": _deepseek_vl2,
}
