"""The loop that trains any part: steps, state, curve. What is trained, and on what, it is told.

A run that was killed and resumed ends with the same bytes as one that was not: every example, draw and rate is a
function of the step's number, and everything else is in the state.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ivcp_eval.lab.training.examples import Examples
from ivcp_eval.lab.training.part import Part
from ivcp_eval.lab.training_log import Curve, write_tensors

STATE, CURVE = "state.safetensors", "curve.csv"
_TRAINING, _VALIDATION = 0, 1


class Loop:
    """One training run in one folder.

    Args:
        about: what the run is made of; a state that was made of something else is refused.
        tell: gets a line of progress now and then.

    Attributes:
        progress: ``steps`` and ``seconds`` of CPU so far, and the sums of the figures since the curve's last row.
    """

    def __init__(
        self,
        part: Part,
        examples: Examples,
        config: Mapping[str, Any],
        folder: Path,
        about: Mapping[str, Any],
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.part, self.examples, self.config, self.folder, self.tell = part, examples, config, folder, tell
        self.about = json.dumps(about, sort_keys=True)
        self.optimizer = torch.optim.AdamW(
            part.groups(), lr=config["rate"], weight_decay=config["weight_decay"], betas=(0.9, 0.99)
        )
        self.progress: dict[str, Any] = {"steps": 0, "seconds": 0.0, "sums": {}}

    def run(self, seconds: float = float("inf")) -> bool:
        """Train for at most ``seconds``; True if every step is done."""
        resumed = self.load()
        self.part.prepare(self.examples, self.folder, self.tell)
        self.tell(f"{'resumed' if resumed else 'started'} at step {self.progress['steps']} of {self.config['steps']}")
        curve = Curve(self.folder / CURVE, self.progress["steps"])
        began = saved = time.monotonic()
        while self.progress["steps"] < self.config["steps"]:
            tick = time.process_time()
            self.step()
            self.progress["seconds"] += time.process_time() - tick
            if self.progress["steps"] % self.config["log_every"] == 0:
                self.report(curve)
            now = time.monotonic()
            if now - saved > self.config["save_every"] or now - began > seconds:
                self.save()
                saved = now
            if now - began > seconds:
                return False
        self.save()
        return True

    def step(self) -> None:
        """One step of the optimizer on ``batch`` examples."""
        number, batch = self.progress["steps"], self.config["batch"]
        figures: dict[str, float] = {}
        for at in range(number * batch, (number + 1) * batch):
            loss, more = self.of(at, _TRAINING)
            (loss / batch).backward()
            for name, value in {"loss": loss.item(), **more}.items():
                figures[name] = figures.get(name, 0.0) + value / batch
        torch.nn.utils.clip_grad_norm_(self.part.net.parameters(), self.config["clip"])
        warm = min(1.0, (number + 1) / max(1, self.config["warmup"]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config["rate"] * group["share"] * warm * (1 - number / self.config["steps"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress["steps"] = number + 1
        sums = self.progress["sums"]
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value

    def of(self, number: int, split: int) -> tuple[Tensor, dict[str, float]]:
        """Loss and figures of one example of a split."""
        distinct = self.config.get("distinct")  # of the training examples, which then come again
        place = number % distinct if distinct and split == _TRAINING else number
        example = (self.examples.training if split == _TRAINING else self.examples.validation)(place)
        rng = np.random.default_rng([self.config["seed"], split, number])
        done = self.progress["steps"] / self.config["steps"] if split == _TRAINING else 1.0
        return self.part.loss(self.part.encoded(example), rng, done)

    def report(self, curve: Curve) -> None:
        """A row of the curve: means since the last, and now and then the loss on examples not trained on."""
        steps, sums = self.progress["steps"], self.progress["sums"]
        row = {name: value / self.config["log_every"] for name, value in sums.items()}
        if steps % self.config["validate_every"] == 0 or steps == self.config["steps"]:
            row["validation_loss"] = self.validation_loss()
        self.progress["sums"] = {}
        curve.add({"steps": steps, "examples": steps * self.config["batch"], **row})
        shown = " ".join(f"{name} {value:.4f}" for name, value in row.items())
        self.tell(f"step {steps} of {self.config['steps']}, {self.progress['seconds']:.0f} CPU s: {shown}")

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean over the first ``validation`` examples of the validation split."""
        count = self.config["validation"]
        return sum(self.of(number, _VALIDATION)[0].item() for number in range(count)) / count

    def save(self) -> None:
        """Write the state; the old one stays whole until the new one is on disk."""
        tensors = {f"net.{name}": value for name, value in self.part.net.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        metadata = {"progress": json.dumps(self.progress), "about": self.about}
        write_tensors(self.folder / STATE, tensors, metadata)

    def load(self) -> bool:
        """Resume from the folder's state; False if there is none.

        Raises:
            ValueError: it is the state of another run.
        """
        path = self.folder / STATE
        if not path.exists():
            return False
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata()
        if metadata["about"] != self.about:
            theirs, ours = json.loads(metadata["about"]), json.loads(self.about)
            differing = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
            raise ValueError(
                f"{path} is the state of a run with other {', '.join(differing)}; give --out another folder, or remove "
                "the file to begin anew"
            )
        tensors = load_file(path)
        self.progress = json.loads(metadata["progress"])
        self.part.net.load_state_dict({name[4:]: v for name, v in tensors.items() if name.startswith("net.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        return True
