"""Keeps the voxels of a scene that others attend to most, and of the tokens that show one voxel the most attended.

Paper: https://arxiv.org/abs/2604.18260 (Geo3DPruner: voxel-internal pruning, then diverse selection between voxels).
Reference: none; github.com/homothetic/Geo3DPruner holds a README only.

Depth and camera of each frame (`Frame.geometry`) put the middle of every token's patch into the scene, whose space is
divided into cubes of ``voxel`` metres. Let A[j, i] be the attention of token j to token i, over all views. Within a
voxel, the share ``alpha`` of its tokens stays that gets the most attention from it, ``a_i`` = mean over j of A[j, i].
Between voxels, ``a_kl`` = sum of A[j, i] over j in k and i in l, divided by the number of tokens of k, and ``a_l`` is
the sum over all k but l that are not chosen; the ``together`` largest are chosen, and so on until the budget is full.
Of the last voxel the tokens with the most attention within it stay.

Differs: the published A is the global attention of VGGT-1B, a network that reconstructs scenes, which no model here
carries; so this is a variant. Here A is the softmax of cosines of the visual embeddings, over ``temperature``: nothing
else spans all views before the language model runs, whose own attention sees no later view. Depth is the exact one of
generated scenes, in place of an estimate. Whether attention between voxels counts tokens that were dropped within them
is not public: here neither as sources nor as targets. Where the first stage leaves fewer than the budget, the best of
what it dropped fill it. Frames without geometry, and pictures, have windows of ``side`` by ``side`` tokens for voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Geometry, Image, Signals
from ivcp_eval.interface.ops import block_rows, place_in_group, top, unit_rows
from ivcp_eval.methods._at_input import embeddings, grid_of, square_windows
from ivcp_eval.methods._clips import Clip, ClipsAtInput


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """Geo3DPruner on known depth.

    Attributes:
        voxel: side of a voxel, in metres.
        alpha: share of a voxel's tokens that stays within it, rounded up.
        together: voxels that are chosen before their attention is counted anew.
        temperature: by which cosines are divided before the softmax.
        side: of a window that stands for a voxel where depth is not known, in tokens.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    voxel: float = 0.1
    alpha: float = 0.5
    together: int = 8
    temperature: float = 0.1
    side: int = 2

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if self.voxel <= 0 or not 0 < self.alpha <= 1 or self.temperature <= 0:
            raise ValueError(
                f"voxel={self.voxel} and temperature={self.temperature} must be above 0, alpha={self.alpha} lie in "
                "(0, 1]"
            )
        if self.together < 1 or self.side < 1:
            raise ValueError(f"together={self.together} and side={self.side} must be 1 or more")

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """Within voxels, then between them."""
        states, voxel = unit_rows(embeddings(signals, clip)), voxels(clip, self.voxel, self.side)
        within, total = torch.zeros(len(states), device=states.device), []
        for part in torch.arange(len(states), device=states.device).split(block_rows(len(states))):
            logits = states[part] @ states.T / self.temperature
            total.append(logits.logsumexp(dim=1))
            attention = (logits - total[-1][:, None]).exp()
            within += (attention * (voxel[part, None] == voxel)).sum(dim=0)
        sizes = torch.bincount(voxel)
        within = within / sizes[voxel]
        stays = place_in_group(within, voxel) < torch.ceil(self.alpha * sizes.double())[voxel]
        if int(stays.sum()) <= clip.budget:
            return top(within + 2 * stays, clip.budget)  # attention is 1 at most
        left, given = voxel[stays], (states[stays], torch.cat(total)[stays])
        turn = torch.full_like(sizes, len(sizes))
        chosen = self._chosen(*given, left, clip.budget)
        turn[chosen] = torch.arange(len(chosen), device=turn.device)
        order = torch.where(stays, turn[voxel], len(sizes)) * len(states) + place_in_group(within, voxel)
        return top(-order.double(), clip.budget)

    def _chosen(self, states: Tensor, total: Tensor, voxel: Tensor, budget: int) -> Tensor:
        """The voxels in the order in which they are chosen, until they hold the budget.

        Args:
            states: (M, E) of the tokens that are left. total: (M,) logarithm of what their attention is divided by.
            voxel: (M,) of each token; all have one.
        """
        sizes = torch.bincount(voxel)
        shift = total + sizes[voxel].log()
        keys = states.T / self.temperature
        received = torch.zeros(len(sizes), dtype=torch.float64, device=states.device)
        for part in torch.arange(len(states), device=states.device).split(block_rows(len(states))):
            given = (states[part] @ keys - shift[part, None]).exp() * (voxel[part, None] != voxel)
            received.index_add_(0, voxel, given.sum(dim=0, dtype=torch.float64))
        counts, n = sizes.tolist(), 0
        chosen: list[Tensor] = []
        while True:
            best = received.argsort(descending=True, stable=True)[: self.together]
            chosen.append(best)
            n += sum(counts[number] for number in best.tolist())
            if n >= budget:
                break
            # What a chosen voxel gets, also from itself, is looked at no more.
            received.index_fill_(0, best, -torch.inf)
            is_best = torch.zeros_like(sizes).index_fill_(0, best, 1)
            for part in is_best[voxel].nonzero().flatten().split(block_rows(len(states))):
                given = (states[part] @ keys - shift[part, None]).exp()
                received.index_add_(0, voxel, given.sum(dim=0, dtype=torch.float64), alpha=-1)
        return torch.cat(chosen)


def voxels(clip: Clip, size: float, side: int) -> Tensor:
    """(N,) int64 0..L-1: the voxel of each token of a clip, shared by all frames; windows where depth is not known."""
    found = []
    for place, frame in enumerate(clip.frames, start=1):
        window = square_windows(frame, side)
        mine = torch.full_like(window, place)
        cells = torch.stack((mine, window, torch.zeros_like(window), torch.zeros_like(window)), dim=1)
        geometry = None if frame.span.frame is None else frame.span.frame.geometry
        if geometry is not None:
            point, known = points(frame, geometry)
            inside = torch.cat((torch.zeros_like(cells[:, :1]), (point / size).floor().long().to(cells.device)), dim=1)
            cells = torch.where(known.to(cells.device)[:, None], inside, cells)
        found.append(cells)
    number: Tensor = torch.unique(torch.cat(found), dim=0, return_inverse=True)[1]
    return number


def points(frame: Image, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """(N, 3) float64 where in the world the patch of each token is, and (N,) bool whether depth is known there.

    It is the depth of the cell that holds the patch's middle, at the middle of that cell.

    Raises:
        ValueError: depth, pose or focal lengths that are none.
    """
    depth, pose = torch.from_numpy(geometry.depth).double(), torch.from_numpy(geometry.pose).double()
    if depth.ndim != 2 or pose.shape != (3, 4) or min(geometry.focal) <= 0 or not bool(pose.isfinite().all()):
        raise ValueError(
            f"got depth {tuple(depth.shape)}, pose {tuple(pose.shape)}, focal lengths {geometry.focal}; expected "
            "(rows, columns), a finite (3, 4) matrix, numbers above 0"
        )
    rows, columns = grid_of(frame)
    at = [((torch.arange(n) + 0.5) * (m / n)).long() for n, m in zip((rows, columns), depth.shape, strict=True)]
    down, across = (one.flatten() for one in torch.meshgrid(*at, indexing="ij"))
    z = depth[down, across]
    x = ((across + 0.5) / depth.shape[1] - 0.5) / geometry.focal[0] * z
    y = ((down + 0.5) / depth.shape[0] - 0.5) / geometry.focal[1] * z
    return torch.stack((x, y, z), dim=1) @ pose[:, :3].T + pose[:, 3], z.isfinite() & (z > 0)
