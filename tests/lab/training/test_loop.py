"""The loop: a killed run ends as one that was not, and what it is told decides what it goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ivcp_eval.lab.training.loop import CURVE, STATE, Loop
from ivcp_eval.lab.training.part import Part

CONFIG = {
    **{"seed": 3, "steps": 9, "batch": 2, "rate": 0.1, "warmup": 2, "weight_decay": 0.01, "clip": 1.0},
    **{"log_every": 2, "validate_every": 4, "validation": 3, "save_every": 0},
}


class Line(Part):
    """Learns a line through noisy points; the model only hands the points on."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(SimpleNamespace(encoded=lambda point: point), {}, None)  # type: ignore[arg-type]
        self.net = torch.nn.Linear(1, 1)

    def loss(self, example: Any, rng: np.random.Generator, done: float) -> Any:
        x = torch.tensor([float(example)])
        wanted = 3 * x + float(rng.normal()) * 0.01 * (1 - done)
        loss = (self.net(x) - wanted).square().mean()
        return loss, {"error": loss.item() ** 0.5}


class Points:
    about: Mapping[str, Any] = {"data": "points"}

    def training(self, number: int) -> Any:
        return number % 7 - 3

    def validation(self, number: int) -> Any:
        return number + 0.5


def loop(folder: Path, tell: Any = lambda text: None, **config: Any) -> Loop:
    folder.mkdir(exist_ok=True)
    return Loop(Line(), Points(), {**CONFIG, **config}, folder, {"rate": config.get("rate", 0.1)}, tell)  # type: ignore[arg-type]


def left(folder: Path) -> tuple[dict[str, bytes], str]:
    """Every tensor of the state, byte by byte, and the curve."""
    tensors = {name: value.numpy().tobytes() for name, value in load_file(folder / STATE).items()}
    return tensors, (folder / CURVE).read_text()


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert loop(tmp_path / "whole").run()
    folder = tmp_path / "killed"
    for after in (3, 5):  # killed twice, in the middle of a row of the curve, with steps since the last state

        class Killed(BaseException):
            pass

        run = loop(folder, save_every=0 if after == 3 else 1e9)
        step = run.step

        def dies(run: Loop = run, step: Any = step, after: int = after) -> None:
            if run.progress["steps"] == after:
                raise Killed
            step()

        run.step = dies  # type: ignore[method-assign]
        with pytest.raises(Killed):
            run.run()
    assert loop(folder).run()
    assert left(folder) == left(tmp_path / "whole")


def test_time_that_is_up_leaves_a_state(tmp_path: Path) -> None:
    assert not loop(tmp_path).run(seconds=0)
    told: list[str] = []
    assert loop(tmp_path, told.append).run()
    assert told[0] == "resumed at step 1 of 9"


def test_training_makes_the_loss_small(tmp_path: Path) -> None:
    assert loop(tmp_path, steps=60).run()
    rows = [dict(zip(("steps", "examples", "loss"), row.split(","), strict=False)) for row in
            (tmp_path / CURVE).read_text().splitlines()[1:]]  # fmt: skip
    assert float(rows[-1]["loss"]) < 0.05 * float(rows[0]["loss"])


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    assert loop(tmp_path).run()
    with pytest.raises(ValueError, match="state of a run with other rate"):
        loop(tmp_path, rate=0.2).run()
