"""Prompts and images of DeepSeek-VL2, as the release makes them, with Pillow and torch only.

Written from https://github.com/deepseek-ai/DeepSeek-VL2 @ ef9f91e, models/processing_deepseek_vl_v2.py and
models/conversation.py. Legend as in `layout.py`; P: pixels of a view's side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature
from transformers.utils import cached_file

from model_adapters.deepseek_vl2.layout import n_tokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
GROUNDING_TOKENS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
MOST_TILED_IMAGES = 2
"""With more images in a conversation each is one tile."""

Message = Mapping[str, str]


def best_resolution(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate (width, height) in pixels that shows most of the image, then the one that wastes least.

    Shown are as many pixels as the image has after it was scaled into the candidate, but not more than it had.
    Ties fall to the earlier candidate.
    """

    def rank(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - candidate[0] * candidate[1]

    return max(candidates, key=rank)


class DeepseekVL2Processor:
    """Tokenizer and tiler.

    Args:
        tokenizer: a fast tokenizer with a beginning-of-sentence and an end-of-sentence token. Image, padding, chat
            and grounding tokens that it lacks are added, as the release does.
        candidate_resolutions: (width, height) in pixels of the tiled views; the first is one tile.
        patch_size, downsample_ratio: pixels of a patch's side, patches of a token's side.
        image_mean, image_std: per channel, of pixels in 0..1; the mean also is the colour of the padding.
        normalize: False leaves pixels in 0..1.

    Raises:
        ValueError: a template other than "deepseek", or a tokenizer without the two sentence tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        candidate_resolutions: Sequence[Sequence[int]],
        patch_size: int,
        downsample_ratio: int,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
        image_token: str = "<image>",
        pad_token: str = "<｜▁pad▁｜>",  # noqa: RUF001 (as the vocabulary spells it)
        sft_format: str = "deepseek",
    ) -> None:
        if sft_format != "deepseek":
            raise ValueError(f"sft_format {sft_format!r} is not implemented; every published checkpoint has 'deepseek'")
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer names no bos_token or eos_token; its tokenizer_config.json is incomplete")
        self.candidate_resolutions = tuple((int(w), int(h)) for w, h in candidate_resolutions)
        self.image_size = self.candidate_resolutions[0][0]
        self.patch_size, self.downsample_ratio = patch_size, downsample_ratio
        self.image_mean, self.image_std, self.normalize = tuple(image_mean), tuple(image_std), normalize
        self.tokenizer, self.image_token = tokenizer, image_token
        self.pad_token, self.sft_format = pad_token, sft_format
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([image_token], special_tokens=True)
        tokenizer.add_tokens([*GROUNDING_TOKENS, USER, ASSISTANT], special_tokens=True)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> DeepseekVL2Processor:
        """From ``processor_config.json`` and the tokenizer of a local folder or hub id."""
        from transformers import PreTrainedTokenizerFast

        path = cached_file(str(source), "processor_config.json", revision=revision)
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        # The files name LlamaTokenizerFast, whose present implementation would build another pre-tokenizer.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, revision=revision)
        return cls(tokenizer, **{key: settings[key] for key in _SETTINGS if key in settings})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = {key: getattr(self, key) for key in _SETTINGS}
        text = json.dumps({"processor_class": "DeepseekVLV2Processor", **settings}, indent=2)
        (Path(folder) / "processor_config.json").write_text(text, encoding="utf-8")

    @property
    def view_side(self) -> int:
        """g: tokens per side of a view."""
        return -(-(self.image_size // self.patch_size) // self.downsample_ratio)

    def tiles(self, size: tuple[int, int], tiled: bool = True) -> tuple[int, int]:
        """(w, h) tiles for an image of ``size`` (width, height); (1, 1) where images are not tiled."""
        width, height = best_resolution(size, self.candidate_resolutions) if tiled else (self.image_size,) * 2
        return width // self.image_size, height // self.image_size

    def views(self, image: Image, tiles: tuple[int, int]) -> Tensor:
        """(1 + w h, 3, P, P) float32: the thumbnail, then the tiles row by row; scaled to fit and padded centrally."""
        from PIL import ImageOps

        side, (width, height) = self.image_size, tiles
        image = image.convert("RGB")
        colour = tuple(int(value * 255) for value in self.image_mean)
        detail = ImageOps.pad(image, (width * side, height * side), color=colour)
        boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(height) for x in range(width)]
        pictures = [ImageOps.pad(image, (side, side), color=colour), *(detail.crop(box) for box in boxes)]
        return torch.stack([self._pixels(picture) for picture in pictures])

    def _pixels(self, picture: Image) -> Tensor:
        raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = raw.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255
        if not self.normalize:
            return pixels
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def __call__(self, conversations: Sequence[Sequence[Message]], images: Sequence[Sequence[Image]]) -> BatchFeature:
        """Inputs of `DeepseekVL2ForConditionalGeneration`, rows padded on the left.

        Args:
            conversations: per row messages ``{"role": "system" | "user" | "assistant", "content": str}``; ``<image>``
                in a user's content stands for the row's next image. A row that ends with the user's turn asks for
                the assistant's.
            images: per row its images in order.

        Returns:
            ``input_ids``, ``attention_mask`` (B, S); if there are images ``pixel_values``, ``images_spatial_crop`` and
            ``image_sizes`` as `DeepseekVL2Model.forward` takes them.

        Raises:
            ValueError: an unknown role, a late system message, or placeholders that do not match the images.
        """
        rows = [self._row(messages, list(own)) for messages, own in zip(conversations, images, strict=True)]
        length = max(len(ids) for ids, _, _ in rows)
        pad = self.tokenizer.pad_token_id
        features = {
            "input_ids": torch.tensor([[pad] * (length - len(ids)) + ids for ids, _, _ in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _, _ in rows]),
        }
        if any(crops for _, crops, _ in rows):
            most = max(len(crops) for _, crops, _ in rows)
            features["pixel_values"] = _padded([views for _, _, views in rows])
            features["images_spatial_crop"] = torch.tensor(
                [crops + [(0, 0)] * (most - len(crops)) for _, crops, _ in rows]
            )
            sizes = [[image.size for image in own] for own in images]
            features["image_sizes"] = torch.tensor([own + [(0, 0)] * (most - len(own)) for own in sizes])
        return BatchFeature(features)

    def _row(self, messages: Sequence[Message], images: list[Image]) -> tuple[list[int], list[tuple[int, int]], Tensor]:
        crops = [self.tiles(image.size, len(images) <= MOST_TILED_IMAGES) for image in images]
        unread = iter(crops)
        ids = [self.tokenizer.bos_token_id]
        n_images = 0
        for position, message in enumerate(messages):
            text, role = message["content"].strip(), message["role"]
            if role in ("user", USER):
                turn = f"{USER}: {text}\n\n{ASSISTANT}:" if text else f"{USER}:{ASSISTANT}:"
                first, *others = turn.split(self.image_token)
                n_images += len(others)
                self._check(n_images, len(images))
                ids += self._encode(first)
                for part in others:
                    ids += [self.image_token_id] * n_tokens(self.view_side, next(unread)) + self._encode(part)
            elif role in ("assistant", ASSISTANT) and self.image_token not in text:
                ids += [*self._encode(text), self.tokenizer.eos_token_id]
            elif role == "system" and position == 0 and self.image_token not in text:
                ids += self._encode(text)
            else:
                raise ValueError(
                    f"message {position} of role {role!r} is not allowed there: a conversation is an optional system "
                    f"message, then user and assistant; only the user's content may hold {self.image_token}"
                )
        self._check(n_images, len(images), final=True)
        side = self.image_size
        views = [self.views(image, tiles) for image, tiles in zip(images, crops, strict=True)]
        return ids, crops, torch.cat(views) if views else torch.zeros(0, 3, side, side)

    def _check(self, found: int, given: int, final: bool = False) -> None:
        if found > given or (final and found < given):
            raise ValueError(
                f"got {given} images for {'' if final else 'at least '}{found} {self.image_token} placeholders. Each "
                "image needs one, and a text must not spell the placeholder otherwise."
            )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        text: str = self.tokenizer.decode(ids, **kwargs)
        return text

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        texts: list[str] = self.tokenizer.batch_decode(ids, **kwargs)
        return texts


_SETTINGS = (
    "candidate_resolutions",
    "patch_size",
    "downsample_ratio",
    "image_mean",
    "image_std",
    "normalize",
    "image_token",
    "pad_token",
    "sft_format",
)


def _padded(rows: list[Tensor]) -> Tensor:
    """(B, T, 3, P, P) of (t, 3, P, P) each, zeros after each row's own."""
    most = max(row.shape[0] for row in rows)
    return torch.stack([torch.cat((row, row.new_zeros(most - row.shape[0], *row.shape[1:]))) for row in rows])
