"""What methods share that average, over a window of a clip, the tokens that stand still in it: HoliTom and PruneVid.

A window is (first frame, frame behind the last). Its tokens form parts, from each of which survivors are taken: one of
those that stand still, and one per frame of those that do not. A part is int64 (W, n): which W tokens of the clip, one
of each frame, every one of its n members is the mean of; W is 1 for a frame's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ivcp_eval.interface import CachePolicy, Cut, ModelFacts
from ivcp_eval.interface.ops import itself, sparse_weights

Window = tuple[int, int]


def two_stages(
    model: ModelFacts, ratio: float, inside: float, layer: int, *, renumber: bool, cache: CachePolicy = "all_layers"
) -> tuple[Cut, ...]:
    """A cut at the input, and one before ``layer`` that keeps a share ``inside`` of what it left; at 1 the first alone.

    ``ratio`` is what both leave. A share too small for it is raised to its root, so that each stage has its part.
    """
    outer = Cut(model.first_cut, min(ratio / inside, ratio**0.5), renumber=renumber, budget="clip")
    inner = Cut(max(model.first_cut + 1, layer), ratio, cache=cache, budget="clip")
    return (outer, inner) if inside < 1 else (outer,)


def check_layer(layer: int | None) -> None:
    """Raise ValueError for a ``layer`` before which no attention could rank."""
    if layer is not None and layer < 1:
        raise ValueError(f"layer={layer} has no layer before it whose attention could rank; use 1 or more")


def parts_of(frames: Sequence[Tensor], window: Window, still: Tensor) -> list[Tensor]:
    """The parts of one window: what stands still, then frame by frame the rest.

    Args:
        frames: (N_t,) the clip's tokens of each frame. still: (M,) bool, which of the first M places stand still in all
            frames of the window; in a single one nothing does.
    """
    inside = frames[slice(*window)]
    places = (still & (len(inside) > 1)).nonzero().flatten()
    moving = []
    for frame in inside:
        rest = torch.ones_like(frame, dtype=torch.bool)
        rest[places] = False
        moving.append(frame[rest][None])
    return [torch.stack([frame[places] for frame in inside]), *moving]


def enough_parts(
    frames: Sequence[Tensor], windows: Sequence[Window], still: Callable[[Window], Tensor], budget: int
) -> list[Tensor]:
    """The parts of all windows; the longest are halved until there are ``budget`` members.

    A clip in which little moves would else have fewer than the user asked for.
    """
    found = [(window, parts_of(frames, window, still(window))) for window in windows]
    while sum(part.shape[1] for _, parts in found for part in parts) < budget:
        place = max(range(len(found)), key=lambda i: found[i][0][1] - found[i][0][0])
        start, stop = found[place][0]
        middle = (start + stop) // 2
        halves = ((start, middle), (middle, stop))
        found[place : place + 1] = [(half, parts_of(frames, half, still(half))) for half in halves]
    return [part for _, parts in found for part in parts]


def shared_places(frames: Sequence[Tensor]) -> Tensor:
    """(T, M) the clip's tokens at the places that all frames have; a token behind the grid may be in one frame only."""
    least = min(len(frame) for frame in frames)
    return torch.stack([frame[:least] for frame in frames])


def survivors(parts: Sequence[Tensor], chosen: Sequence[tuple[Tensor, Tensor | None]], n: int) -> tuple[Tensor, Tensor]:
    """(K,) the survivors of all parts, part by part, as tokens of the clip, and what they become, sparse (K, n).

    Args:
        chosen: per part (k,) which members stay, and weights (k, members), sparse; None: they stay as they are.
        n: tokens of the clip.
    """
    kept, rows, columns, values, first = [], [], [], [], 0
    for part, (members, weights) in zip(parts, chosen, strict=True):
        length, size = part.shape
        sparse = itself(members, size) if weights is None else weights.coalesce()
        row, column = sparse.indices()
        kept.append(part[0, members])
        rows.append((first + row).repeat(length))
        columns.append(part[:, column].flatten())
        values.append((sparse.values() / length).repeat(length))
        first += members.numel()
    return torch.cat(kept), sparse_weights(torch.cat(rows), torch.cat(columns), torch.cat(values), (first, n))
