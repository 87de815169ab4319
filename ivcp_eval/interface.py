"""The seam: everything a pruning method sees (`Signals`), returns (`Selection`), and what a model family provides.

Shape legend used in every file:
    B batch rows, S prompt columns (padding included), n tokens of one row alive at a cut, V visual tokens of one row
    alive at a cut, K kept, T text tokens, H query heads, G key/value heads, D head size, E hidden size,
    A rotary axes (3 for M-RoPE, else 1), R rotary dimensions.

A method handles one row (one sample) at a time and thinks in visual tokens 0..V-1. It never sees padding, the
cache, position ids to be edited, or the batch: `ivcp_eval.engine` applies what it chose. See docs/design/engine.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Signal = Literal["value", "key", "query", "raw_value", "vision", "cached_key"]
"""What must be captured for a method: projections of the decoder layer before the cut, or of the vision tower.

``raw_value`` is the value projection of the hidden states entering that layer, without its input norm; ``cached_key``
are the keys of every layer after the prefill, for `AbstractMethod.edit_keys`.
"""

CachePolicy = Literal["all_layers", "from_cut", "all_but_first"]
"""Whose KV cache loses the dropped tokens: every layer, only the layers from the cut on, or all but layer 0."""

Faithfulness = Literal["faithful", "from_formula", "variant", "control"]
"""Checked against the authors' code | transcribed from the paper | gaps filled by us (each named) | a control."""


class Unsupported(ValueError):
    """This method cannot work on this model; the message says why.

    Raised by `AbstractMethod.cuts` or an adapter, never for bad input. The contract tests skip such a pair.
    """


@dataclass(frozen=True)
class ModelFacts:
    """What a method may know of the model when it lays out its cuts."""

    family: str  # file name of the adapter
    n_layers: int  # decoder layers
    first_cut: int = 0  # lowest layer whose input may be cut (Qwen3-VL adds visual features to its first layers)


@dataclass(frozen=True)
class Cut:
    """One cut: the hidden states entering decoder layer ``layer`` (0-based) lose tokens.

    ``ratio`` is the share of the *prompt's* visual tokens alive afterwards, in (0, 1]. With ratio 1 it is a look: the
    method sees the signals and may remember something, nothing is removed or merged.
    ``renumber`` re-numbers the positions of the survivors 0..n-1 from this layer on; otherwise they keep theirs.
    ``needs`` are signals to capture for this cut beyond those of the method (what a preset of one family asks for).
    """

    layer: int
    ratio: float
    cache: CachePolicy = "all_layers"
    renumber: bool = False
    needs: frozenset[Signal] = frozenset()


@dataclass(frozen=True)
class ImageSpan:
    """One image of one row, in prompt columns, as an adapter finds it.

    Attributes:
        columns: (N,) int64 on CPU, increasing: the prompt columns of its visual tokens.
        grid: (rows, columns) if the tokens form one row-major grid, else None.
        tiles: (w, h) tiles of the high-resolution view, for families that tile.
        padding: prompt-independent indices (0..N-1) of tokens that show padding only.
        views: lengths of the consecutive stretches that each show the picture or a tile of it on their own (tiles,
            thumbnail, overview), adding up to N; empty if the image is one view.
    """

    columns: Tensor
    grid: tuple[int, int] | None = None
    tiles: tuple[int, int] | None = None
    padding: tuple[int, ...] = ()
    views: tuple[int, ...] = ()


@dataclass(frozen=True)
class Image:
    """One image as a method sees it at one cut.

    Attributes:
        tokens: (N,) int64: its alive tokens, as indices into the row's visual tokens 0..V-1.
        budget: how many of them may survive this cut.
        n_prompt: how many visual tokens it had in the prompt.
        span: where it came from.
        view: (N,) int64: to which of the span's views each alive token belongs; None if the image is one view.
    """

    tokens: Tensor
    budget: int
    n_prompt: int
    span: ImageSpan
    view: Tensor | None = None


@dataclass
class Signals:
    """What a method sees of one row at one cut before layer k. Tensors live on the model's device.

    Attributes:
        images: the row's images with their budgets; every visual token belongs to exactly one.
        visual: (V,) int64: where the visual tokens stand among the row's n alive tokens.
        text: (T,) int64: where the text tokens stand.
        question: (Q,) int64: text tokens after the last image (closing marker excluded), which in a causal model
            have seen every image and the whole prompt; all text tokens where nothing follows the last image.
        hidden: (n, E) hidden states entering layer k.
        value, key, query: (G, n, D), (G, n, D), (H, n, D) projections of layer k-1 before RoPE; only if in `needs`.
        raw_value: (G, n, D) value projection of layer k-1 on its input as it is, not normalised; only if in `needs`.
        rope: ``rope()`` gives float32 (cos, sin) of the row's positions, each (A, n, R): the full spectrum of every
            axis, as the rotary embedding computes it before M-RoPE sections are joined.
        attention: ``attention(rows, entering=False)`` gives (H, len(rows), n) float32 causal softmax rows of layer
            k-1 (needs query and key), or of layer k on the entering hidden states with ``entering=True``.
        rotate: ``rotate(states)`` applies RoPE at the row's positions to (heads, n, D) queries or keys of layer k-1.
        vision: per visual token signals of the vision tower (see `VisionTap`), only if "vision" is in `needs`:
            ``received`` (V,) float32 attention that the token receives inside its image, summed over queries; ``cls``
            (V,) float32 attention of the class token, where the tower has one; ``key`` (V, D) keys, mean over heads;
            ``feature`` (V, F) hidden states of the tapped block.
        stage: 0 for the first cut, 1 for the second, ...
        family: the adapter's name, for presets that reproduce one family's released code.
        generator: CPU generator seeded from (method seed, row), the only source of randomness.
        memory: kept from one cut of this row to the next.
    """

    images: tuple[Image, ...]
    visual: Tensor
    text: Tensor
    question: Tensor
    hidden: Tensor
    rope: Callable[[], tuple[Tensor, Tensor]]
    attention: Callable[..., Tensor]
    value: Tensor | None = None
    key: Tensor | None = None
    query: Tensor | None = None
    raw_value: Tensor | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    stage: int = 0
    family: str = ""
    generator: torch.Generator | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def n_visual(self) -> int:
        """V, the visual tokens alive before the cut."""
        return int(self.visual.numel())

    @property
    def budget(self) -> int:
        """How many visual tokens of the row may survive this cut."""
        return sum(image.budget for image in self.images)


@dataclass(frozen=True)
class CachedKeys:
    """What a method that edits cached keys sees of one row in one decoder layer, after the prefill.

    Attributes:
        layer: decoder layer, 0-based.
        key: (G, V, D) keys of the visual tokens as they lie in the cache, RoPE applied.
        query: (H, W, D) queries of the row's last W prompt tokens, RoPE applied.
        ratio: what the user asked for, in (0, 1).
    """

    layer: int
    key: Tensor
    query: Tensor
    ratio: float


@dataclass(frozen=True)
class Selection:
    """What a method returns for one row.

    Attributes:
        keep: (K,) int64 indices into the row's visual tokens, strictly increasing.
        merge: optional (K, V) weights; survivor i continues as ``merge[i] @ hidden[visual]`` (float32, then cast).
        exact: False if the method's own rule overrides the budget (a released rule without one).
    """

    keep: Tensor
    merge: Tensor | None = None
    exact: bool = True

    def check(self, signals: Signals, method: str) -> None:
        """Raise ValueError if indices are not strictly increasing, leave 0..V-1, or miss the budget."""
        keep = self.keep
        if keep.ndim != 1 or (keep.numel() and not bool((keep[1:] > keep[:-1]).all())):
            raise ValueError(f"method {method!r} returned indices that are not a strictly increasing vector: {keep}")
        if keep.numel() and (int(keep[0]) < 0 or int(keep[-1]) >= signals.n_visual):
            raise ValueError(f"method {method!r} returned indices outside 0..{signals.n_visual - 1}: {keep}")
        if self.exact and keep.numel() != signals.budget:
            raise ValueError(f"method {method!r} kept {keep.numel()} visual tokens, its budget is {signals.budget}")
        if self.merge is not None and tuple(self.merge.shape) != (keep.numel(), signals.n_visual):
            raise ValueError(
                f"method {method!r} returned merge weights {tuple(self.merge.shape)}, "
                f"expected {(keep.numel(), signals.n_visual)}"
            )


class AbstractMethod(ABC):
    """A pruning method: a frozen dataclass whose fields are its parameters. It chooses; the engine applies.

    The class is named ``Method`` and lives in ``ivcp_eval/methods/<name>.py``; the file name is its only name.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset()
    faithfulness: ClassVar[Faithfulness] = "variant"
    query_window: ClassVar[int] = 0  # W of `CachedKeys`, for a method that needs "cached_key"

    @abstractmethod
    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Where to cut, in increasing layer order. Called once per `prune`, never for ratio 1."""

    @abstractmethod
    def select(self, signals: Signals) -> Selection:
        """Choose the surviving visual tokens of one row at one cut. Must not modify the signals (but `memory`)."""

    def edit_keys(self, cached: CachedKeys) -> Tensor:
        """(G, V, D) keys that replace ``cached.key`` for decoding; called for "cached_key" in `needs` only."""
        raise NotImplementedError

    def pixel_share(self, ratio: float) -> float | None:
        """Share of its visual tokens to which an image is shrunk before the processor; None leaves images alone."""
        return None

    def key_share(self, ratio: float) -> float:
        """Share of the key channels that a real implementation would store for visual tokens (analytic)."""
        return 1.0


class AbstractScorer(AbstractMethod):
    """A method that ranks visual tokens: the best of each image within its budget survive."""

    @abstractmethod
    def score(self, signals: Signals) -> Tensor:
        """(V,) scores, higher survives. NaN counts as lowest; ties fall to the lower index."""

    def select(self, signals: Signals) -> Selection:
        """Keep the ``budget`` best-scored tokens of each image."""
        from ivcp_eval.ops import top_of_each_image

        return Selection(top_of_each_image(self.score(signals), signals.images))


QuestionKind = Literal["grounding", "mcq", "yes_no", "short_answer"]
"""Kinds of benchmark question for which a family may have a published prompt of its own."""


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint of a family.

    Attributes:
        name: short name users type (``qwen25``).
        hub: repository id on the Hugging Face hub; empty for a model shipped with this repository.
        revision: commit or tag; "main" where no commit is known to us (it is resolved and recorded at run time).
        local: folder inside the ``ivcp_eval`` package, for a shipped model.
        methods: parameters of a method that were tuned for this checkpoint, by method name; users' values win.
        max_new_tokens: longest answer, where it is not the family's.
        note: one line for ``ivcp list``.
    """

    name: str
    hub: str = ""
    revision: str = "main"
    local: str = ""
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_new_tokens: int | None = None
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


@dataclass(frozen=True)
class VisionTap:
    """Where the engine listens in a vision tower, and how patches become visual tokens.

    Attributes:
        attention: the attention module whose queries and keys are wanted; the one VisionZip reads.
        block: the module around it whose output is ``feature``.
        tower: the module whose forward ends the encoding of one set of images.
        method: another method of ``tower`` that does, where `generate` of transformers 5.20+ calls it outside of any
            forward and only it sees the sizes of the images (LLaVA-NeXT's ``get_image_features``).
        states: ``states(module, args, kwargs)`` gives the `PatchStates` of one call of `attention`.
        tokens: ``tokens(patches, args, kwargs)``: from per-patch tensors (P, *) and the arguments of the tower's call
            the same of the visual tokens, (N, *), all images one after the other in prompt order. With ``method``
            every argument comes by its name.
    """

    attention: Any
    block: Any
    tower: Any
    states: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], PatchStates]
    tokens: Callable[[Mapping[str, Tensor], tuple[Any, ...], Mapping[str, Any]], dict[str, Tensor]]
    method: str = "forward"


class AbstractAdapter(ABC):
    """How one model family is wired. The class is named ``Adapter`` and lives in ``model_adapters/<family>.py``.

    The first half serves pruning, the second (from `checkpoints` on) evaluation. Baseline and pruned runs go through
    the same methods with the same arguments, so nothing but the pruning can differ.
    """

    model_types: ClassVar[tuple[str, ...]]  # `config.model_type` of the models it handles
    closing_tokens: ClassVar[int] = 0  # marker tokens that close an image span (Qwen: <|vision_end|>)

    checkpoints: ClassVar[tuple[Checkpoint, ...]] = ()
    box_format: ClassVar[str] = ""  # key of ivcp_eval.boxes.FORMATS; empty if the family was not trained to ground
    min_pixels: ClassVar[int | None] = None  # limits of the published evaluation, where the processor has such
    max_pixels: ClassVar[int | None] = None
    generation: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 512, "do_sample": False}

    def facts(self, config: Any, family: str) -> ModelFacts:
        """Layer counts for `AbstractMethod.cuts`, from a model's ``config``."""
        return ModelFacts(family=family, n_layers=config.get_text_config().num_hidden_layers)

    @abstractmethod
    def multimodal_model(self, model: Any) -> Any:
        """The module whose forward receives ``input_ids`` and ``pixel_values`` and calls the text model."""

    @abstractmethod
    def text_model(self, model: Any) -> Any:
        """The decoder with ``layers`` and ``rotary_emb``."""

    @abstractmethod
    def image_mask(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """(B, S) bool: visual tokens of images among ``inputs['input_ids']``; None if no image is passed."""

    @abstractmethod
    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """For each row its images in order. ``mask``: (B, S) bool on CPU."""

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
        """(width, height) at which an image of ``size`` costs ``share`` of its visual tokens, never more.

        None where the number of visual tokens does not follow the image's size.
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
    ) -> tuple[Any, Any]:
        """(model in eval mode, processor) from a local folder or hub id. ``device="auto"`` spreads over all GPUs."""

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """The family's published wording of a question; None leaves the benchmark's own."""
        return None

    @abstractmethod
    def encode(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Tensor]:
        """Model inputs for a batch, padded on the left.

        Args:
            processor: as returned by `load`.
            conversations: per sample the ordered parts of one user turn, ``{"image": PIL.Image}`` or ``{"text": str}``.
        """

    def layout(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Any]:
        """Options of `prune` that only the pictures tell, such as InternVL's ``tiles``; as `encode` is called."""
        return {}

    def box_frame(self, processor: Any, inputs: Mapping[str, Tensor], sample: int) -> tuple[int, int] | None:
        """(width, height) of the picture that pixel boxes of ``sample`` refer to; None where boxes are relative."""
        return None
