"""Oracle: voxels, attention within and between them and the rounds with Python loops, over exact depth."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ivcp_eval.engine.signals.source import images_at_cut
from ivcp_eval.interface import Geometry, Signals
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.geo3dpruner import voxels
from tests.methods.material import random_clips

FOCAL = (0.6, 0.8)


def seen(signals: Signals, seed: int = 0, size: tuple[int, int] = (8, 12)) -> tuple[Signals, list[Geometry]]:
    """The signals with a random depth and a rigid pose for every frame."""
    generator = np.random.default_rng(seed)
    views = []
    for _ in signals.images:
        turned, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        pose = np.concatenate((turned, generator.normal(size=(3, 1))), axis=1)
        views.append(Geometry(generator.uniform(1, 2, size).astype(np.float32), pose, FOCAL))
    spans = [
        replace(image.span, frame=image.span.frame and replace(image.span.frame, geometry=view))
        for image, view in zip(signals.images, views, strict=True)
    ]
    assert signals.cut is not None
    return replace(signals, images=images_at_cut(spans, signals.visual, signals.cut.ratio, "clip")), views


def slow_points(view: Geometry, rows: int, columns: int) -> list[list[float]]:
    """Where the patches of a (rows, columns) grid are."""
    found = []
    for row in range(rows):
        for column in range(columns):
            down = int((row + 0.5) * view.depth.shape[0] / rows)
            across = int((column + 0.5) * view.depth.shape[1] / columns)
            z = float(view.depth[down, across])
            x = ((across + 0.5) / view.depth.shape[1] - 0.5) / FOCAL[0] * z
            y = ((down + 0.5) / view.depth.shape[0] - 0.5) / FOCAL[1] * z
            camera = (x, y, z, 1.0)
            found.append([sum(float(view.pose[axis, i]) * camera[i] for i in range(4)) for axis in range(3)])
    return found


def slow(
    states: list[list[float]], voxel: list[Any], budget: int, alpha: float, together: int, tau: float
) -> list[int]:
    """The published rule, token by token."""
    n = len(states)
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in states]
    attention = []
    for one in unit:
        powers = [math.exp(sum(a * b for a, b in zip(one, other, strict=True)) / tau) for other in unit]
        attention.append([power / sum(powers) for power in powers])
    names = sorted(set(voxel))
    within = [0.0] * n
    stays: dict[Any, list[int]] = {}
    for name in names:
        members = [i for i in range(n) if voxel[i] == name]
        for i in members:
            within[i] = sum(attention[j][i] for j in members) / len(members)
        stays[name] = sorted(members, key=lambda i: (-within[i], i))[: math.ceil(alpha * len(members))]
    kept: list[int] = []
    left = list(names)
    while left and len(kept) < budget:
        received = {
            target: sum(
                sum(attention[j][i] for j in stays[source] for i in stays[target]) / len(stays[source])
                for source in left
                if source != target
            )
            for target in left
        }
        for name in sorted(left, key=lambda name: (-received[name], names.index(name)))[:together]:
            kept += stays[name][: budget - len(kept)]
            left.remove(name)
    rest = sorted(set(range(n)) - set(kept), key=lambda i: (-within[i], i))
    return sorted(kept + rest[: budget - len(kept)])


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.8])
@pytest.mark.parametrize(("voxel", "together"), [(0.7, 8), (1.2, 2), (0.7, 1)])
def test_formula(ratio: float, voxel: float, together: int) -> None:
    signals, views = seen(random_clips((4, 4, 6), ratio=ratio))
    found = [point for view in views for point in slow_points(view, 4, 6)]
    names = [tuple(math.floor(x / voxel) for x in point) for point in found]
    budget = sum(image.budget for image in signals.images)
    states = signals.hidden[signals.visual].double().tolist()
    wanted = slow(states, names, budget, 0.5, together, 0.1)
    kept = make_method("geo3dpruner", {"voxel": voxel, "together": together}).select(signals).keep.tolist()
    assert kept == wanted
    assert 20 < len(set(names)) < 90, "several tokens of some voxels, and many voxels"


def test_views_share_voxels() -> None:
    """Two cameras that stand in one place see one and the same; one that stands elsewhere does not."""
    signals, views = seen(random_clips((3, 4, 6), ratio=0.5))
    views[1] = views[0]
    spans = [
        replace(image.span, frame=replace(image.span.frame, geometry=view))  # type: ignore[type-var]
        for image, view in zip(signals.images, views, strict=True)
    ]
    (clip,) = clips_of(replace(signals, images=images_at_cut(spans, signals.visual, 0.5, "clip")))
    first, second, third = voxels(clip, 1e-3, 2).split(24)
    assert torch.equal(first, second)
    assert not set(first.tolist()) & set(third.tolist())


def test_unknown_depth_is_windows() -> None:
    """Of a frame without geometry, of a picture, and where depth is 0 or infinite."""
    signals = random_clips((2, 4, 4), (0, 4, 4))
    window = [r // 2 * 2 + c // 2 for r in range(4) for c in range(4)]
    clip, picture = clips_of(signals)
    assert voxels(clip, 0.1, 2).tolist() == window + [4 + w for w in window]
    assert voxels(picture, 0.1, 2).tolist() == window
    shown, views = seen(random_clips((2, 4, 4)), size=(4, 4))
    views[0].depth[:2] = 0
    views[0].depth[2, :] = np.inf
    number = voxels(clips_of(shown)[0], 1e-3, 4).tolist()
    assert len(set(number[:12])) == 1
    assert len(set(number)) == 1 + 4 + 16


def test_geometry_that_is_none() -> None:
    signals, views = seen(random_clips((2, 4, 4)))
    views[1].pose[0, 0] = np.nan
    with pytest.raises(ValueError, match="a finite \\(3, 4\\) matrix"):
        make_method("geo3dpruner", {}).select(signals)


@pytest.mark.parametrize(
    "parameters", [{"voxel": 0}, {"alpha": 0}, {"alpha": 1.1}, {"temperature": 0}, {"together": 0}, {"side": 0}]
)
def test_parameters_that_mean_nothing(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        make_method("geo3dpruner", parameters)
