"""The half of the seam that a model family provides: `AbstractAdapter`, and what it says of checkpoints and towers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from ivcp_eval.interface.method import ImageSpan, ModelFacts, Rectangle, Signal, TowerFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

QuestionKind = Literal["grounding", "mcq", "yes_no", "short_answer", "list"]
"""Kinds of benchmark question for which a family may have a published prompt of its own."""


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint of a family.

    Attributes:
        name: short name users type (``qwen25``).
        hub: repository id on the Hugging Face hub; empty for a model shipped with this repository, or made by its user.
        revision: commit or tag; "main" where no commit is known to us (it is resolved and recorded at run time).
        local: folder inside the ``ivcp_eval`` package, for a shipped model.
        methods: parameters of a method that were tuned for this checkpoint, by method name; users' values win.
        max_new_tokens: longest answer, where it is not the family's.
        benchmarks: what an evaluation runs where none is named; names and groups.
        note: one line for ``ivcp list``.
    """

    name: str
    hub: str = ""
    revision: str = "main"
    local: str = ""
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_new_tokens: int | None = None
    benchmarks: tuple[str, ...] = ("matrix",)
    note: str = ""


@dataclass(frozen=True)
class PatchStates:
    """Queries and keys of one attention call of a vision tower, all images packed one after the other.

    Attributes:
        query, key: (H, P, D) as they meet in the attention, position embedding applied.
        segments: lengths of the stretches that attend to themselves only; they add up to P.
        scaling: of the logits.
        class_token: whether each segment begins with a class token.
    """

    query: Tensor
    key: Tensor
    segments: tuple[int, ...]
    scaling: float
    class_token: bool = False


TokensOf: TypeAlias = "Callable[[Mapping[str, Tensor], tuple[Any, ...], Mapping[str, Any]], dict[str, Tensor]]"
"""From per-patch tensors (P, *) and the arguments of the tower's call the same of the visual tokens (N, *)."""


@dataclass(frozen=True)
class VisionTap:
    """Where the engine listens in a vision tower, and how patches become visual tokens.

    Attributes:
        blocks: of every block its attention module, whose queries and keys are wanted, and the block itself, whose
            output is ``feature``.
        facts: which of them are of use; ``facts.own`` is the one VisionZip reads.
        tower: the module whose forward ends the encoding of one set of images.
        method: another method of ``tower`` that does, where `generate` of transformers 5.20+ calls it outside of any
            forward and only it sees the sizes of the images (LLaVA-NeXT's ``get_image_features``).
        states: ``states(module, args, kwargs)`` gives the `PatchStates` of one call of an attention module.
        tokens: ``tokens(patches, args, kwargs)``: from per-patch tensors (P, *) and the arguments of the tower's call
            the same of the visual tokens, (N, *), all images one after the other in prompt order. With ``method``
            every argument comes by its name.
        video: where images have a ``method`` of their own, that of videos and the ``tokens`` that belong to it.
        luma: ``luma(args, kwargs)``: from the arguments of the tower's call the brightness of the visual tokens'
            pixels, as `Signals.vision` has it and in the order of ``tokens``; None where no token is a rectangle of
            pixels. That pixels are normalised as by the family's published processors is taken for granted.
        between: of every block the norm between attention and MLP, which is given the very tensor that the block adds
            the MLP's output to; empty where a visual token is not one patch, so that merging patches leaves as many.
    """

    blocks: Sequence[tuple[Any, Any]]
    facts: TowerFacts
    tower: Any
    states: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], PatchStates]
    tokens: TokensOf
    method: str = "forward"
    video: tuple[str, TokensOf] | None = None
    luma: Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor] | None = None
    between: Sequence[Any] = ()


GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""The generation parameters of every published evaluation that is wired here (VLMEvalKit's model classes)."""


class AbstractAdapter(ABC):
    """How one model family is wired. The class is named ``Adapter`` and lives in ``model_adapters/<family>.py``.

    The first half serves pruning, the second (from `checkpoints` on) evaluation. Baseline and pruned runs go through
    the same methods with the same arguments, so nothing but the pruning can differ.
    """

    model_types: ClassVar[tuple[str, ...]]  # `config.model_type` of the models it handles
    position_axes: ClassVar[int] = 1  # of a token's position: 3 for M-RoPE
    closing_tokens: ClassVar[int] = 0  # marker tokens that close an image span (Qwen: <|vision_end|>)
    no_videos: ClassVar[str] = "its adapter does not find them"  # why videos are refused; empty where they are pruned

    checkpoints: ClassVar[tuple[Checkpoint, ...]] = ()
    box_format: ClassVar[str] = ""  # key of `benchmarks.boxes.FORMATS`; empty if the family was not trained to ground
    min_pixels: ClassVar[int | None] = None  # limits of the published evaluation, where the processor has such
    max_pixels: ClassVar[int | None] = None
    # Everything that is not stated here is neutral, whatever the checkpoint's generation_config.json asks for.
    generation: ClassVar[Mapping[str, Any]] = {**GREEDY, "max_new_tokens": 512}

    def stated(self) -> dict[str, Any]:
        """The generation parameters in force, all others being neutral; the length is a limit of the run."""
        return {name: value for name, value in self.generation.items() if name != "max_new_tokens"}

    def facts(self, config: Any, family: str) -> ModelFacts:
        """Layer counts for `AbstractMethod.cuts`, from a model's ``config``."""
        n_layers = config.get_text_config().num_hidden_layers
        return ModelFacts(family=family, n_layers=n_layers, position_axes=self.position_axes)

    @abstractmethod
    def multimodal_model(self, model: Any) -> Any:
        """The module whose forward receives ``input_ids`` and ``pixel_values`` and calls the text model."""

    @abstractmethod
    def text_model(self, model: Any) -> Any:
        """The decoder with ``layers`` and ``rotary_emb``."""

    @abstractmethod
    def image_mask(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """(B, S) bool: visual tokens among ``inputs['input_ids']``; None if neither image nor video is passed."""

    def video_mask(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """(B, S) bool: those of `image_mask` that come as a video's; None if no video is passed.

        The tower encodes them in a call of their own, after the images, wherever they stand in the prompt.
        """
        return None

    @abstractmethod
    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """For each row its images and the grid steps of its videos, in prompt order. ``mask``: (B, S) bool on CPU."""

    @abstractmethod
    def projection(self, layer: Any, signal: Signal) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """The module of a decoder layer whose output carries ``signal``, and (B, S, *) -> (B, heads, S, D) for it."""

    @abstractmethod
    def rotate(self, states: Tensor, position_embeddings: Any) -> Tensor:
        """Apply RoPE to (heads, n, D) states, with the position embeddings of that one row (batch axis kept)."""

    def vision_tap(self, model: Any) -> VisionTap | None:
        """Where to listen in the vision tower; None where that is not wired."""
        return None

    def unsupported(self, model: Any, signal: Signal) -> str | None:
        """Why the family cannot give a signal, in words; None if it can."""
        if signal == "vision" and self.vision_tap(model) is None:
            return "its vision tower is not wired (AbstractAdapter.vision_tap)"
        return None

    def shrunk_size(self, processor: Any, size: tuple[int, int], share: float) -> tuple[int, int] | None:
        """(width, height) at which an image of ``size`` costs ``share`` of its visual tokens.

        More only where no size is cheap enough; then the cheapest, and the results say so. None where the number
        of visual tokens does not follow the image's size.
        """
        return None

    # -- evaluation -------------------------------------------------------------------------------------------------

    def config(self, source: str) -> Any:
        """The transformers configuration of a local checkpoint folder, without its weights."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source)

    @abstractmethod
    def load(
        self,
        source: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        device: str,
        attention: str,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        trust_remote_code: bool = False,
        quantization_config: Any = None,
    ) -> tuple[Any, Any]:
        """(model in eval mode, processor) from a local folder or hub id.

        Args:
            device: "auto" spreads over all GPUs.
            quantization_config: transformers' own, for weights that are quantised while they are loaded.

        Raises:
            ValueError: the checkpoint is not whole, or cannot be loaded so.
        """

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """The family's published wording of a question; None leaves the benchmark's own."""
        return None

    @abstractmethod
    def encode(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Tensor]:
        """Model inputs for a batch, padded on the left.

        Args:
            processor: as returned by `load`.
            conversations: per sample the ordered parts of one user turn: ``{"image": PIL.Image}``, ``{"text": str}``,
                or a decoded video, ``{"video": frames, "seconds": times}``: PIL images of one size or a uint8 array
                (T, H, W, 3), and when each of them is shown, in seconds from the video's start. `layout` also reads
                ``motion`` (T, rows, columns), what `Frame.motion` is of each, and ``geometry``, T of `Frame.geometry`.

        Raises:
            ValueError: a video, where the family takes none, without frames, or without increasing times.
        """

    def layout(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Any]:
        """Options of `prune` that only the conversations tell, such as InternVL's ``tiles``; as `encode` is called."""
        return {}

    def covered(self, processor: Any, size: tuple[int, int]) -> Rectangle | None:
        """What views of a picture of ``size`` (width, height) show of it, where only the processor knows that.

        It fills in `View.covers` where `image_spans` could not; None where that always can.
        """
        return None

    def box_frame(self, processor: Any, inputs: Mapping[str, Tensor], sample: int) -> tuple[int, int] | None:
        """(width, height) of the picture that pixel boxes of ``sample`` refer to; None where boxes are relative."""
        return None
