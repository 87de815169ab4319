"""The embedded rooms: always the same bytes, depth that is exact, and answers that follow from what stands there."""

from __future__ import annotations

import ast
import csv
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import geometry
from ivcp_eval.benchmarks.clips import Sampling
from ivcp_eval.cli import main
from ivcp_eval.files import DATASETS, long_cells
from ivcp_eval.lab import rooms
from ivcp_eval.vlmeval_bridge.reading import tsv, videos

MADE = rooms.content()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """The file, read as text."""
    with long_cells():
        return list(csv.DictReader(io.StringIO(MADE.decode()), delimiter="\t"))


def test_the_generator_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = benchmarks.load("tiny_rooms")
    assert (DATASETS / rooms.NAME).read_bytes() == MADE
    assert hashlib.sha256(MADE).hexdigest() == declared.sha256
    assert declared.n_samples == MADE.count(b"\n") - 1 == len(tsv.read(DATASETS / rooms.NAME))
    assert {metric.name for metric in declared.metrics} == {"accuracy", *rooms.TASKS}
    command = ["lab", "build-benchmarks", "rooms", "--out", str(tmp_path)]
    assert main([*command, "--split", "validation"]) == 0
    assert main([*command, "--check"]) == 1
    assert "differs from what the generator writes" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, 5])
def test_depth_is_exact(number: int) -> None:
    """Every cell, taken back into the world, lies on a wall or on the surface of an object."""
    solids, views, _, _ = rooms.room("test", number)
    on_solids = 0
    for view in views:
        shown = view.geometry
        side = shown.depth.shape[0]
        at = ((np.arange(side) + 0.5) / side - 0.5) / rooms.FOCAL
        x, y = np.meshgrid(at, at)
        inside = np.stack((x, y, np.ones_like(x)), axis=-1) * shown.depth[..., None]
        world = inside.astype(np.float64) @ shown.pose[:, :3].T + shown.pose[:, 3]
        off = np.abs(np.abs(world[..., :2]) - rooms.HALF).min(-1)
        off = np.minimum(off, np.abs(world[..., 2] - np.where(world[..., 2] > 1, rooms.HEIGHT, 0)))
        for solid in solids:
            if solid.shape == "ball":
                middle = np.array([solid.x, solid.y, solid.half])
                surface = np.abs(np.linalg.norm(world - middle, axis=-1) - solid.half)
            else:
                middle, half = (
                    np.array([solid.x, solid.y, solid.height / 2]),
                    [solid.half, solid.half, solid.height / 2],
                )
                surface = np.abs((np.abs(world - middle) - half).max(axis=-1))
            on_solids += int((surface < 1e-5).sum())
            off = np.minimum(off, surface)
        assert off.max() < 1e-5
    assert on_solids > 50


def test_poses_are_rigid() -> None:
    for camera in rooms.CAMERAS:
        turned = rooms.pose_of(camera)[:, :3]
        assert np.allclose(turned @ turned.T, np.eye(3))
        assert np.linalg.det(turned) == pytest.approx(1)


def test_answers_follow_from_the_room(rows: list[dict[str, str]]) -> None:
    for row in rows:
        solids = {str(solid): solid for solid in rooms.room("test", int(row["image_id"].rpartition("_")[2]))[0]}
        right, question = row[row["answer"]], row["question"]
        named = [solid for name, solid in solids.items() if name in question]
        if row["category"] == "count":
            assert right == str(len(solids))
        elif row["category"] == "nearest":
            others = [solid for solid in solids.values() if solid is not named[0]]
            assert solids[right] is min(others, key=named[0].apart)
        else:
            offered = [float(row[letter].split()[0]) for letter in "ABCD"]
            apart = named[0].apart(named[1])
            assert float(right.split()[0]) == min(offered, key=lambda metres: abs(metres - apart))
    assert len(rows) == rooms.ROOMS * len(rooms.TASKS)


def test_the_cell_gives_every_frame(rows: list[dict[str, str]]) -> None:
    """To the millimetre; of chosen frames theirs."""
    views = rooms.room("test", 0)[1]
    got = geometry.read(rows[0]["geometry"], 8)
    for frame, shown in enumerate(got):
        view = views[frame // 2].geometry
        assert np.abs(shown.depth - view.depth).max() <= 5.1e-4
        assert np.allclose(shown.pose, view.pose, atol=1e-6)
        assert shown.focal == (0.6, 0.6)
    names = [{"type": "image", "value": f"{i}.png"} for i in range(len(ast.literal_eval(rows[0]["image"])))]
    (part,) = videos.shown(rows[0], names, Sampling(nframe=3))
    places = [int(name.removesuffix(".png")) for name in part["value"]]
    chosen = geometry.read(part["geometry"], 3)
    assert all(np.array_equal(one.pose, got[place].pose) for one, place in zip(chosen, places, strict=True))
    (whole,) = videos.shown(rows[0], names)
    assert whole["geometry"] == rows[0]["geometry"]


@pytest.mark.parametrize(
    "cell", ["no base64!", "AAAA", geometry._joined({"rows": 1}, b""), geometry._joined({"shown": [0]}, b"")]
)
def test_cells_that_are_none(cell: str) -> None:
    with pytest.raises(ValueError, match="geometry"):
        geometry.read(cell, 1)


def test_another_number_of_frames_is_refused(rows: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="in 7 frames"):
        geometry.read(rows[0]["geometry"], 7)
