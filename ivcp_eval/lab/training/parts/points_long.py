"""A model with POINTS-Long's second, small set of visual tokens, trained beside the one that it is made of.

Paper: https://arxiv.org/abs/2604.11627. The family is `model_adapters.qwen2_5_vl_points`.
Differs: the authors' data, losses and numbers of steps are not public, or have no place here. They train new modules
first and then the decoder too, by two passes, one of each set; this does so as well (``align``), told by answers and by
the distributions of the model that it is made of. Ours are these losses and every value of the configuration.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ivcp_eval.interface.models import Weights, find
from ivcp_eval.lab.training import part
from ivcp_eval.lab.training.frozen import Encoded, Example, Frozen
from ivcp_eval.lab.training.part import Loss
from ivcp_eval.lab.training.parts._checkpoint import stock_of, write

NAME = "points_long"


@dataclass(frozen=True)
class Pair:
    """An example with all its visual tokens and with the few."""

    focus: Encoded
    standby: Encoded


class Part(part.Part):
    """Options: see the configuration file."""

    origin: ClassVar[str] = (
        "A model of its own, trained here: a variant of POINTS-Long, whose weights are promised and not found. The "
        "folders `focus` and `standby` are the whole checkpoint, in the precision of the one that it is made of, for "
        "prompts that show all visual tokens and for those that show the few: `ivcp eval --model points_long "
        "--model-path focus`, `--model points_long_standby --model-path standby`. The weights below are the trained "
        "part of it; all else is as it was."
    )

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        family, checkpoint = find(f"{NAME}_standby")
        with tempfile.TemporaryDirectory() as folder:
            begin(frozen, Path(folder), options["rows"], options["columns"])
            self.student = Frozen(Weights(checkpoint, family, Path(folder), ""), frozen.placement)
        text = self.student.session.adapter.text_model(self.student.model)
        self.decoder: nn.Module | None = text.layers if options["decoder"] else None
        trained = {"standby": self.student.model.model.visual.standby, "decoder": self.decoder}
        self.net = nn.ModuleDict({name: module for name, module in trained.items() if module is not None})
        self.net.requires_grad_(requires_grad=True).float()  # small steps are lost in bfloat16

    def groups(self) -> list[dict[str, Any]]:
        """The small set's modules, and the decoder's layers with their share of the rate."""
        shares = {"standby": 1.0, "decoder": self.options["decoder"]}
        return [
            {"params": list(module.parameters()), "share": shares[name]} for name, module in self.net.named_children()
        ]

    def encoded(self, example: Example) -> Pair:
        """For both sets."""
        return Pair(self.frozen.encoded(example), self.student.encoded(example))

    def loss(self, example: Pair, rng: np.random.Generator, done: float) -> Loss:
        """Of the answer by the small set, and of the whole model's distribution of it by either set."""
        del rng
        both = self.decoder is not None and done >= self.options["align"]
        if self.decoder is not None:
            self.decoder.requires_grad_(requires_grad=both)
        dtype = getattr(torch, self.frozen.placement.dtype)
        labels = example.standby.labels
        with torch.autocast(labels.device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                known = self.frozen.logits(example.focus).log_softmax(-1)
            few = self.student.logits(example.standby)
            losses = {"answer": nn.functional.cross_entropy(few, labels), "teacher": divergence(few, known)}
            if both:
                with showing(self.student.model, "focus"):
                    losses["focus"] = divergence(self.student.logits(example.focus), known)
        total = torch.stack([self.options["losses"][name] * loss for name, loss in losses.items()]).sum()
        return total, {name: loss.item() for name, loss in losses.items()}

    def finish(self, folder: Path) -> None:
        """The whole checkpoint for either set, one file of weights, in the precision of the model it was made of."""
        source = self.frozen.session.adapter.config(str(self.frozen.weights.source))
        dtype = source.dtype or torch.float32
        model = self.student.model
        state = {name: value.to(dtype) for name, value in model.state_dict().items()}
        write(folder / "standby", state, model, self.frozen.session.processor)
        with showing(model, "focus"):
            (folder / "focus").mkdir(exist_ok=True)
            linked(folder / "standby" / "model.safetensors", folder / "focus" / "model.safetensors")
            write(folder / "focus", None, model, self.frozen.session.processor)


def divergence(logits: Tensor, known: Tensor) -> Tensor:
    """Mean over tokens of the divergence from the distribution ``known``, (T, vocabulary) logarithms."""
    return nn.functional.kl_div(logits.log_softmax(-1), known, log_target=True, reduction="batchmean")


@contextmanager
def showing(model: Any, mode: str) -> Iterator[None]:
    """The model in another mode while the block runs."""
    vision = model.config.vision_config
    before, vision.mode = vision.mode, mode
    try:
        yield
    finally:
        vision.mode = before


def linked(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def begin(frozen: Frozen, folder: Path, rows: int, columns: int) -> None:
    """Write the model as it is before any training: the whole one's weights, and a small set made of its tower.

    Args:
        rows, columns: of the small set.

    Raises:
        ValueError: a model of another family.
    """
    from model_adapters.qwen2_5_vl_points.modeling import PointsConfig, Standby

    stock = stock_of(NAME, frozen)
    stock["vision_config"] |= {
        "model_type": "points_long_vision",
        "mode": "standby",
        "standby_rows": rows,
        "standby_columns": columns,
    }
    config = PointsConfig(**stock | {"model_type": NAME, "architectures": ["PointsForConditionalGeneration"]})
    standby = Standby(config.vision_config).to(frozen.model.device)
    standby.start(frozen.model.model.visual)
    more = {f"model.visual.standby.{name}": value for name, value in standby.state_dict().items()}
    write(folder, frozen.model.state_dict() | more, frozen.model, frozen.session.processor, config)
