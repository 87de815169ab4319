"""Keeps the visual tokens whose features span the largest volume, each stretched by its relevance to the question.

Paper: https://arxiv.org/abs/2506.10967 (section 3: a determinantal point process conditional on the instruction).
Reference: https://github.com/Theia-4869/CDPruner @ 9541616 (llava/model/llava_arch.py, ``encode_images``), and its
form without CLIP in https://github.com/openvinotoolkit/openvino.genai @ da1db86

The kernel is r_i cos(x_i, x_j) r_j of the language model's input embeddings; the next token is the one that makes the
determinant of the chosen largest. Relevance r is one of two:

* With ``clip``, as the authors: minus the cosine of CLIP's embeddings of patch and instruction, moved to 0..1 inside
  the image. A patch is the tower's output through CLIP's last norm and projection; an instruction of more than 77 of
  CLIP's tokens is cut into stretches of 77, over which the cosines are averaged.
* Else the rule that OpenVINO ships: the cosine of a token to the mean embedding of the question, moved to 0..1 inside
  the image, gives r = exp(alpha * relevance) with alpha = theta / (2 (1 - theta)).

Differs: no model here carries CLIP's text tower, so it is read from a folder, and the instruction is what the language
model's own tokenizer makes of the tokens behind the last image, words of the chat template included. Without ``clip``
relevance is not the authors'. So this is a variant, while selection is theirs. Where the budget exceeds the rank of the
features (the released code then chooses by NaN) the most relevant of the rest follow. Each image has its own budget and
range of relevance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerFacts, TowerSignal, Unsupported
from ivcp_eval.interface.models import without_progress_bars
from ivcp_eval.interface.ops import unit_rows
from ivcp_eval.methods._at_input import AtInput, embeddings, relevance
from ivcp_eval.methods._greedy import log_determinant


@dataclass(frozen=True)
class Method(AtInput):
    """CDPruner.

    Attributes:
        theta: weight of relevance beside diversity, in [0, 1), without ``clip``; 0.5 is OpenVINO's.
        clip: folder of the CLIP checkpoint that the model's vision tower was taken from, text tower, projections and
            tokenizer included (LLaVA-1.5: openai/clip-vit-large-patch14-336); None for OpenVINO's rule.
        tokenizer: folder of the language model's tokenizer, which turns the prompt back into words; with ``clip``.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"feature"})

    theta: float = 0.5
    clip: Path | None = None
    tokenizer: Path | None = None

    if not TYPE_CHECKING:  # a class variable of the base

        @property
        def needs(self) -> frozenset[Signal]:
            """The tower's output, where CLIP says what is relevant."""
            return frozenset({"vision"}) if self.clip else frozenset()

    def __post_init__(self) -> None:
        """Refuse a weight that leaves no diversity, and a text tower without words."""
        super().__post_init__()
        if not 0 <= self.theta < 1:
            raise ValueError(f"theta={self.theta} is outside [0, 1)")
        if (self.clip is None) != (self.tokenizer is None):
            raise ValueError(
                "clip and tokenizer belong together: the folder of a CLIP checkpoint, and that of the language model's "
                f"tokenizer; got clip={self.clip}, tokenizer={self.tokenizer}"
            )
        for name in ("clip", "tokenizer"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise ValueError(f"{name}={folder} is no folder")

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """The block whose output is read; asked for with ``clip`` only."""
        if not tower.class_token:
            raise Unsupported("its vision tower is no CLIP (it has no class token); leave out clip and tokenizer")
        return super().tower_blocks(tower)

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Conditional determinantal selection."""
        states = embeddings(signals, image)
        if self.clip is None:
            weight = (self.theta / (2 * (1 - self.theta)) * relevance(signals, image)).exp()
        else:
            weight = self._by_clip(signals, image)
        return conditional_volume(states, weight, image.budget)

    def _by_clip(self, signals: Signals, image: Image) -> Tensor:
        """(N,) the authors' relevance."""
        if signals.ids is None:
            raise ValueError("cdpruner with clip reads the instruction, so the prompt must come as input_ids")
        assert self.clip is not None
        clip = _clip(self.clip, str(signals.hidden.device))
        ids = signals.ids[signals.question.cpu()].tolist()
        text = clip.of_text(_tokenizer(self.tokenizer).decode(ids, skip_special_tokens=True).strip())
        minus = -(clip.of_patches(signals.vision["feature"][image.tokens]) @ text.T).mean(dim=1)
        low, high = minus.amin(), minus.amax()
        return (minus - low + 1e-6) / (high - low).clamp_min(1e-12)


@dataclass(frozen=True)
class _Clip:
    """What is used of a CLIP checkpoint: its last norm of patches, both projections, the text tower, the tokenizer."""

    folder: Path
    norm: Any
    visual_projection: Any
    text_model: Any
    text_projection: Any
    tokenizer: Any

    @torch.no_grad()
    def of_patches(self, states: Tensor) -> Tensor:
        """(N, C) of length 1, from the tower's output (N, F)."""
        width = self.visual_projection.in_features
        if states.shape[1] != width:
            raise ValueError(
                f"the CLIP in {self.folder} makes patches of width {width}, the model's vision tower of width "
                f"{states.shape[1]}; give the checkpoint that the tower was taken from"
            )
        return unit_rows(self.visual_projection(self.norm(states.float())))

    @torch.no_grad()
    def of_text(self, text: str) -> Tensor:
        """(M, C) of length 1, of stretches of as many tokens as the text tower takes; the last is padded."""
        length = self.text_model.config.max_position_embeddings
        ids = torch.tensor(self.tokenizer(text).input_ids)
        rows = torch.nn.functional.pad(ids, (0, -len(ids) % length)).view(-1, length)
        seen = (torch.arange(rows.numel()) < len(ids)).long().view_as(rows)
        device = self.text_projection.weight.device
        pooled = self.text_model(input_ids=rows.to(device), attention_mask=seen.to(device)).pooler_output
        return unit_rows(self.text_projection(pooled))


@lru_cache(maxsize=1)
def _clip(folder: Path, device: str) -> _Clip:
    from transformers import AutoTokenizer, CLIPModel

    with without_progress_bars():
        model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    norm = getattr(model.vision_model, "vision_model", model.vision_model).post_layernorm
    return _Clip(
        folder,
        norm.to(device),
        model.visual_projection.to(device),
        model.text_model.to(device),
        model.text_projection.to(device),
        AutoTokenizer.from_pretrained(folder),
    )


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def conditional_volume(states: Tensor, weight: Tensor, k: int) -> Tensor:
    """``k`` of ``states`` (N, E) in order of choice, by the kernel weight_i cos_ij weight_j."""
    return log_determinant(torch.where(states.isfinite(), unit_rows(states), torch.nan) * weight[:, None], k, ridge=0.0)
