"""A model with LLaVA-UHD v4's compressor in its tower, distilled from the one that it is made of.

Paper: https://arxiv.org/abs/2605.08985; code: https://github.com/THUMAI-Lab/LLaVA-UHD-v4 @ 98345a7
(train/multimodal_common/base_models/vit_insert_merger.py). The family is `model_adapters.qwen2_5_vl_uhd`.

The authors train on answers, at a size that has no place here. This one learns from the whole model too: its
distribution of the answer, and visual tokens near the mean of the four that each of ours stands for. Ours are, each a
field of the configuration: these losses, what is trained and how fast, and where the compressor stands (the published
share of the depth).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.interface.models import Weights, find
from ivcp_eval.lab.training import part
from ivcp_eval.lab.training.frozen import Encoded, Example, Frozen
from ivcp_eval.lab.training.part import Loss
from ivcp_eval.lab.training.parts._checkpoint import stock_of, write

NAME = "uhd_v4"
DEPTH = 7 / 27  # of the published tower's blocks, those before the compressor


@dataclass(frozen=True)
class Pair:
    """An example as the whole model gets it and as the small one does, of the same pixels."""

    teacher: Encoded
    student: Encoded


class Part(part.Part):
    """Options: see the configuration file."""

    origin: ClassVar[str] = (
        "A model of its own, trained here: a variant of LLaVA-UHD v4, whose weights are published for another tower "
        "and decoder. The folder `model` is the whole checkpoint, in the precision of the one that it is made of: "
        "`ivcp eval --model uhd_v4 --model-path model`. The weights below are the trained part of it; all else is as "
        "it was."
    )

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        family, checkpoint = find(NAME)
        with tempfile.TemporaryDirectory() as folder:
            begin(frozen, Path(folder), options["after"], options["scale"])
            self.student = Frozen(Weights(checkpoint, family, Path(folder), ""), frozen.placement)
        tower, text = self.student.model.model.visual, self.student.session.adapter.text_model(self.student.model)
        after = tower.config.compress_after
        trained = {
            "compressor": (tower.blocks[after - 1].compressor, 1.0),
            "blocks": (tower.blocks[after:], options["tower"]),
            "merger": (tower.merger, options["tower"]),
            "decoder": (text.layers, options["decoder"]),
        }
        self.rates = {name: share for name, (_, share) in trained.items() if share}
        self.net = nn.ModuleDict({name: trained[name][0] for name in self.rates})
        self.net.requires_grad_(requires_grad=True).float()  # small steps are lost in bfloat16

    def groups(self) -> list[dict[str, Any]]:
        """Parts of the network, each with its share of the rate."""
        parts = dict(self.net.named_children())
        return [{"params": list(parts[name].parameters()), "share": share} for name, share in self.rates.items()]

    def encoded(self, example: Example) -> Pair:
        """For both models, with pictures already of the size to which the small one's processor brings them.

        Raises:
            ValueError: a video.
        """
        if any("video" in piece for piece in example.parts):
            raise ValueError(f"{NAME} is trained on pictures; this example holds a video")
        adapter, processor = self.student.session.adapter, self.student.session.processor
        pieces: list[Mapping[str, Any]] = []
        for piece in example.parts:
            if "image" in piece:
                image = decoded(piece["image"])
                piece = {"image": image.resize(adapter.shrunk_size(processor, image.size, 1.0) or image.size)}
            pieces.append(piece)
        example = replace(example, parts=tuple(pieces))
        return Pair(self.frozen.encoded(example), self.student.encoded(example))

    def loss(self, example: Pair, rng: np.random.Generator, done: float) -> Loss:
        """Of the visual tokens, of the answer, and of the whole model's distribution of it."""
        del rng, done
        dtype = getattr(torch, self.frozen.placement.dtype)
        device = example.student.labels.device.type
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            with torch.no_grad(), tower_output(self.frozen) as whole:
                known = self.frozen.logits(example.teacher)
            with tower_output(self.student) as small:
                logits = self.student.logits(example.student)
        target = pooled(whole[0].float(), example.teacher.inputs["image_grid_thw"], self.frozen)
        losses = {
            "features": (small[0].float() - target).square().mean() / target.var(),
            "answer": nn.functional.cross_entropy(logits, example.student.labels),
            "teacher": nn.functional.kl_div(
                logits.log_softmax(-1), known.log_softmax(-1), log_target=True, reduction="batchmean"
            ),
        }
        total = torch.stack([self.options["losses"][name] * loss for name, loss in losses.items()]).sum()
        return total, {name: loss.item() for name, loss in losses.items()}

    def finish(self, folder: Path) -> None:
        """The whole checkpoint, in the precision in which the model lies that it was made of."""
        source = self.frozen.session.adapter.config(str(self.frozen.weights.source))
        dtype = source.dtype or torch.float32
        state = {name: value.to(dtype) for name, value in self.student.model.state_dict().items()}
        write(folder / "model", state, self.student.model, self.student.session.processor)


@contextmanager
def tower_output(frozen: Frozen) -> Iterator[list[Tensor]]:
    """(N, E) visual tokens of every call of the tower while the block runs."""
    seen: list[Tensor] = []
    tower = frozen.model.model.visual
    handle = tower.register_forward_hook(lambda _module, _args, output: seen.append(output.pooler_output))
    try:
        yield seen
    finally:
        handle.remove()


def pooled(features: Tensor, grids: Tensor, frozen: Frozen) -> Tensor:
    """(N, E) visual tokens of all pictures, (t, rows, columns) patches each -> (N / 4, E) means of 2 x 2 of them."""
    merge = frozen.model.config.vision_config.spatial_merge_size
    sizes = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
    parts = []
    for (t, h, w), picture in zip(sizes, features.split([t * h * w for t, h, w in sizes]), strict=True):
        parts.append(picture.view(t, h // 2, 2, w // 2, 2, -1).mean((2, 4)).flatten(0, 2))
    return torch.cat(parts)


def begin(frozen: Frozen, folder: Path, after: int, scale: float) -> None:
    """Write the small model as it is before any training: the whole one's weights, and a compressor made of a block.

    Args:
        after: blocks before the compressor; 0: the published share. scale: as `Compressor.start`.

    Raises:
        ValueError: a model of another family, or ``after`` leaves no block.
    """
    from model_adapters.qwen2_5_vl_uhd.modeling import Compressor, UhdV4Config

    stock = stock_of(NAME, frozen)
    vision = stock["vision_config"]
    vision |= {
        "model_type": "uhd_v4_vision",
        "spatial_merge_size": 2 * vision["spatial_merge_size"],
        "compress_after": after or max(1, round(vision["depth"] * DEPTH)),
    }
    config = UhdV4Config(**stock | {"model_type": NAME, "architectures": ["UhdV4ForConditionalGeneration"]})
    number = config.vision_config.compress_after - 1
    compressor = Compressor(config.vision_config)
    compressor.to(frozen.model.device).start(frozen.model.model.visual.blocks[number], scale)
    state = frozen.model.state_dict() | {
        f"model.visual.blocks.{number}.compressor.{name}": value for name, value in compressor.state_dict().items()
    }
    processor = copy.deepcopy(frozen.session.processor)
    for pictures in (processor.image_processor, processor.video_processor):
        pictures.merge_size = config.vision_config.spatial_merge_size
    write(folder, state, frozen.model, processor, config)
