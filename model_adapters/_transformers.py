"""What families on native transformers share: projections by name, RoPE, image runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from ivcp_eval.interface import AbstractAdapter, ImageSpan, Signal
from model_adapters._checkpoint import whole
from model_adapters._decoded import frames_in, video_options

if TYPE_CHECKING:
    from torch import Tensor


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """(B, S, heads * D) -> (B, heads, S, D)."""
    batch, length, _ = states.shape
    return states.view(batch, length, -1, head_dim).transpose(1, 2)


def rotate_half(states: Tensor) -> Tensor:
    """The RoPE partner of each dimension: (-x2, x1) of the two halves of the last axis."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def image_runs(mask: Tensor) -> list[Tensor]:
    """The runs of True in one row's mask (S,) bool on CPU, each as its columns (int64, increasing)."""
    columns = mask.nonzero().flatten()
    if not columns.numel():
        return []
    breaks = ((columns[1:] - columns[:-1]) > 1).nonzero().flatten() + 1
    return list(torch.tensor_split(columns, breaks.tolist()))


def placement(device: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How ``from_pretrained`` places a model; empty where it is moved afterwards, which quantised weights cannot be."""
    if device == "auto":
        return {"device_map": "auto"}
    return {"device_map": {"": device}} if "quantization_config" in options else {}


class AbstractTransformersAdapter(AbstractAdapter):
    """A family whose decoder layers have ``self_attn.{q,k,v}_proj`` and Llama-like (cos, sin) position embeddings."""

    def multimodal_model(self, model: Any) -> Any:
        """``model.model`` of a ...ForConditionalGeneration, or of a language model alone (...ForCausalLM)."""
        return model.model

    def text_model(self, model: Any) -> Any:
        """``model.model.language_model``; of a language model alone ``model.model``."""
        return getattr(model.model, "language_model", model.model)

    def image_mask(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Where the placeholder tokens stand of what comes with the ids, as pixels or encoded: images, videos."""
        ids, videos = inputs.get("input_ids"), self.video_mask(model, inputs)
        if ids is None or (inputs.get("pixel_values") is None and not inputs.get("mm_encoder_outputs")):
            return videos
        images: Tensor = ids == model.config.image_token_id
        return images if videos is None else images | videos

    def video_mask(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Where the video placeholder token stands, if a video comes with the ids, as frames or encoded."""
        ids, encoded = inputs.get("input_ids"), (inputs.get("mm_encoder_outputs") or {}).get("video")
        if self.no_videos or ids is None or (inputs.get("pixel_values_videos") is None and encoded is None):
            return None
        videos: Tensor = ids == model.config.video_token_id
        return videos

    def in_video(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """(B, S) bool on CPU: those of ``mask`` that are a video's."""
        videos = self.video_mask(model, inputs)
        return torch.zeros_like(mask) if videos is None else videos.cpu() & mask

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """One image per run of placeholder tokens."""
        return [[ImageSpan(run) for run in image_runs(row)] for row in mask]

    def projection(self, layer: Any, signal: Signal) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """``self_attn.<q|k|v>_proj``, split into heads."""
        attention = layer.self_attn
        module = getattr(attention, {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[signal])
        return module, lambda states: split_heads(states, attention.head_dim)

    def rotate(self, states: Tensor, position_embeddings: Any) -> Tensor:
        """``x cos + rotate_half(x) sin`` with (1, n, R) embeddings."""
        cos, sin = (part[0].to(states.dtype) for part in position_embeddings)
        return states * cos + rotate_half(states) * sin

    def load(
        self, source: str, *, min_pixels: int | None = None, max_pixels: int | None = None, **common: Any
    ) -> tuple[Any, Any]:
        """`load_parts`, with the pixel limits as options of the processor."""
        return self.load_parts(source, self.pixel_options(min_pixels, max_pixels), **common)

    def load_parts(
        self,
        source: str,
        pixels: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: str,
        attention: str,
        quantization_config: Any = None,
        **common: Any,
    ) -> tuple[Any, Any]:
        """`load_model` and `load_processor`; ``common`` are ``revision`` and ``trust_remote_code``."""
        processor = self.load_processor(source, **common, **pixels)
        quantised = {} if quantization_config is None else {"quantization_config": quantization_config}
        return self.load_model(
            source, dtype=dtype, device=device, attention=attention, **quantised, **common
        ), processor

    def load_model(self, source: str, *, dtype: torch.dtype, device: str, attention: str, **options: Any) -> Any:
        """``AutoModelForImageTextToText``, in eval mode, on ``device`` ("auto": spread over all GPUs).

        Raises:
            ValueError: tensors that are missing, left over or of another shape.
        """
        from transformers import AutoModelForImageTextToText

        placed = placement(device, options)
        model, report = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            **placed,
            **options,
        )
        whole(source, report)
        return (model if placed else model.to(device)).eval()

    def load_processor(self, source: str, **options: Any) -> Any:
        """``AutoProcessor``."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(source, **options)

    def pixel_options(self, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
        """Processor options that set the pixel limits; refused by families whose processor has none."""
        if min_pixels is not None or max_pixels is not None:
            raise ValueError(f"{type(self).__module__} has no pixel limits; leave min_pixels and max_pixels unset")
        return {}

    def encode(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Tensor]:
        """`turn` of every conversation through the processor, padded on the left.

        Raises:
            ValueError: a video for a processor that takes none, or one that is none (`_decoded.video_options`).
        """
        images = [part["image"] for parts in conversations for part in parts if "image" in part]
        videos = video_options(processor, conversations)
        if videos and getattr(processor, "video_processor", None) is None:
            raise ValueError(f"got a video, but {self.no_videos}; pass its frames as images")
        encoded: Mapping[str, Tensor] = processor(
            text=[self.turn(processor, parts) for parts in conversations],
            images=images or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **videos,
        )
        return {name: value for name, value in encoded.items() if name != "video_metadata"}

    def layout(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Any]:
        """When the frames of videos are shown: not every family's inputs say it."""
        if not any("video" in part for parts in conversations for part in parts):
            return {}
        return {"frames": [frames_in(processor, parts) for parts in conversations]}

    def turn(self, processor: Any, parts: list[Mapping[str, Any]]) -> str:
        """One user turn as text, a placeholder for each image and video: the checkpoint's own chat template."""
        content = []
        for part in parts:
            kind = next(kind for kind in ("text", "image", "video") if kind in part)
            content.append({"type": kind, "text": part["text"]} if kind == "text" else {"type": kind})
        turn = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def encoded(inputs: Mapping[str, Any], kind: Literal["image", "video"] = "image") -> list[Tensor] | None:
    """(N, E) features of every image or video, where `generate` encoded it before the forward (transformers 5.20+).

    The forward then gets neither pixels nor sizes, only the features.
    """
    found = (inputs.get("mm_encoder_outputs") or {}).get(kind)
    return None if found is None else [features.flatten(0, -2) for features in found.pooler_output]


def images_by_length(mask: Tensor, lengths: list[int]) -> list[list[int]] | None:
    """Which images each row holds, as indices into ``lengths``, or None if the lengths do not add up to the rows.

    Args:
        mask: (B, S) bool, image tokens. lengths: tokens of every image of the batch, row by row.

    Beam search repeats each row R times and, depending on the transformers release, repeats the images too (each R
    times in place) or not at all; both are undone here.
    """
    totals = mask.sum(1).tolist()
    for repeats in (r for r in range(1, len(totals) + 1) if len(totals) % r == 0):
        for step in {1, repeats}:
            rows = _deal(totals[::repeats], lengths[::step])
            if rows is not None:
                return [[i * step for i in row] for row in rows for _ in range(repeats)]
    return None


def _deal(totals: list[int], lengths: list[int]) -> list[list[int]] | None:
    """Consecutive images that add up to each row's total, all used; None if that does not come out."""
    rows, start = [], 0
    for total in totals:
        end = start
        while total > 0 and end < len(lengths):
            total -= lengths[end]
            end += 1
        if total:
            return None
        rows.append(list(range(start, end)))
        start = end
    return rows if start == len(lengths) else None
