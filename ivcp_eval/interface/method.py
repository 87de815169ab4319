"""The half of the seam that a pruning method sees: `Signals` in, `Selection` out, at the `Cut` it asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

Signal = Literal["value", "key", "query", "raw_value", "vision", "cached_key", "step", "motion", "sparse"]
"""What must be captured for a method: projections of the decoder layer before the cut, or of the vision tower.

``raw_value`` is the value projection of the hidden states entering that layer, without its input norm; ``cached_key``
are the keys of every layer after the prefill, for `AbstractMethod.edit_keys`; ``step`` is every layer of every forward
after the prefill, for `AbstractMethod.attended`; ``motion`` is that of the encoded stream (`Frame.motion`); ``sparse``
is every layer of the prefill, for `AbstractMethod.attended_pairs` and `AbstractMethod.mlp_tokens`.
"""

CachePolicy = Literal["all_layers", "from_cut", "all_but_first", "own"]
"""Whose KV cache loses the dropped tokens: every layer, only the layers from the cut on, all but layer 0; or none but
the layer's own, and nothing leaves the sequence (`Cut.evicts`).
"""

BudgetOf = Literal["image", "clip"]
"""What a budget holds for: each image, frames of a video too; or each clip, inside which the method may move it."""

TowerSignal = Literal["received", "cls", "query", "key", "feature", "joint_cls", "joint_key", "group", "luma"]
"""What a block of the vision tower can say of each visual token; shapes are those of `Signals.vision`.

"group" is wanted by methods that merge inside the tower, and by these alone (`AbstractMethod.merge_patches`). "luma" is
what the tower was shown, whatever the block.
"""

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
    position_axes: int = 1  # of a token's position: 3 for M-RoPE

    def renumbers(self, requested: bool | None) -> bool:
        """Whether survivors are numbered anew: as asked, None being the way of released LLaVA code and its ports.

        LLaVA code numbers 0..n-1 whatever is left; on M-RoPE the ports keep the position of every survivor.
        """
        return self.position_axes == 1 if requested is None else requested


@dataclass(frozen=True)
class TowerFacts:
    """What a method may know of the vision tower when it names the blocks it wants to hear.

    Attributes:
        n_blocks: how many blocks it has.
        own: the block whose output the projector reads, or the last one whose attention spans the image; 0-based.
        whole: the blocks whose attention spans the image, increasing: all of them, but in windowed towers.
        class_token: whether it has a class token.
    """

    n_blocks: int
    own: int
    whole: tuple[int, ...]
    class_token: bool

    def at(self, share: float) -> int:
        """The first block at or behind ``share`` of the depth whose attention spans the image; else the last such."""
        return next((block for block in self.whole if block >= int(share * self.n_blocks)), self.whole[-1])


@dataclass(frozen=True)
class Patches:
    """What one block of the vision tower still tells apart of one picture or tile, between its attention and MLP.

    Attributes:
        key: (n, D) float32 keys of the attention, mean over heads, in the order of the numbers given last; before that
            of the picture, a class token first.
        block: 0-based. total: patches of the picture. ratio: what the user asked for, in (0, 1). tower: the facts.
    """

    key: Tensor
    block: int
    total: int
    ratio: float
    tower: TowerFacts


@dataclass(frozen=True)
class Cut:
    """One cut: the hidden states entering decoder layer ``layer`` (0-based) lose tokens.

    ``ratio`` is the share of the *prompt's* visual tokens alive afterwards, in (0, 1]. With ratio 1 it is an
    observation: the method sees the signals and may remember something, nothing is removed or merged.
    ``renumber`` re-numbers the positions of the survivors 0..n-1 from this layer on; otherwise they keep theirs.
    ``needs`` are projections to capture for this cut beyond those of the method (what a preset of one family asks for).
    With ``budget="clip"`` the method may keep more of one frame of a video and less of another; the clip's sum holds.

    With ``cache="own"`` it is an eviction: the prompt goes through every layer whole, and once ``layer`` has run, its
    cache alone loses the tokens. `Signals.hidden` is then that layer's output, projections and attention are its own,
    and ``ratio`` is the share that its cache keeps. With ``late`` the tokens leave once the last layer has run, so that
    a layer's share may follow from what all of them show: `AbstractMethod.observe` is given the signals, and `select`
    is asked afterwards, with signals without any states.
    """

    layer: int
    ratio: float
    cache: CachePolicy = "all_layers"
    renumber: bool = False
    needs: frozenset[Signal] = frozenset()
    budget: BudgetOf = "image"
    late: bool = False

    @property
    def evicts(self) -> bool:
        """Whether tokens leave one layer's cache only."""
        return self.cache == "own"


Rectangle = tuple[float, float, float, float]
"""(x0, y0, x1, y1) as fractions of a picture's width and height, from its upper left corner."""

WHOLE: Rectangle = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """One of the rectangular grids of tokens in which an image is shown: the whole picture once, or a tile of it.

    Attributes:
        name: what the family calls it: ``picture`` where there is no other, ``tiles``, ``overview``, ``tile 1``, ...
        cells: (rows, columns) int64 numpy array: which of the image's tokens 0..N-1 shows each cell, -1 where none
            does. Tokens that show no part of the picture (newlines, separators, class tokens) are in no cell.
        covers: what the grid covers of the picture; beyond 0..1 where it shows padding. None where the family cannot
            know it from the model's inputs.
    """

    name: str
    cells: npt.NDArray[np.int64]
    covers: Rectangle | None = None


def grid_view(span: ImageSpan, covers: Rectangle | None = None) -> tuple[View, ...]:
    """The one view of an image whose tokens are a row-major grid; none where its grid is not known."""
    if span.grid is None:
        return ()
    import numpy as np

    return (View("picture", np.arange(span.columns.numel()).reshape(span.grid), covers),)


@dataclass(frozen=True)
class Geometry:
    """What a frame shows of a scene in space: a pinhole camera whose axis goes through the middle of the picture.

    Attributes:
        depth: (rows, columns) float32 numpy array over the whole frame: metres along the camera's axis to what the ray
            through the middle of each cell meets; 0 where that is nothing, or not known.
        pose: (3, 4) float64 numpy array: camera (x right, y down, z forward) to world coordinates, in metres.
        focal: focal lengths along x and y, in widths and heights of the picture.
    """

    depth: npt.NDArray[np.float32]
    pose: npt.NDArray[np.float64]
    focal: tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """Which part of which video an `ImageSpan` shows: one grid step, of one frame or of those the tower joins.

    Attributes:
        clip: the video, counted from 0 in its row. index: the step, counted from 0 in the video.
        seconds: when the step's first frame is shown, from the video's start; None where the inputs do not say.
        motion: (rows, columns) float32 numpy array over the whole frame: how many pixels each cell moved since the step
            before, as the encoded stream says, infinite where it is new. None where nobody says it.
        geometry: depth and camera of the step's first frame; None where nobody says it.
    """

    clip: int
    index: int
    seconds: float | None = None
    motion: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    geometry: Geometry | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ImageSpan:
    """One image of one row, or one grid step of a video, in prompt columns, as an adapter finds it.

    Attributes:
        columns: (N,) int64 on CPU, increasing: the prompt columns of its visual tokens.
        grid: (rows, columns) if the tokens form one row-major grid, else None.
        tiles: (w, h) tiles of the high-resolution view, for families that tile.
        padding: prompt-independent indices (0..N-1) of tokens that show padding only.
        views: lengths of the consecutive stretches that each show the picture or a tile of it on their own (tiles,
            thumbnail, overview), adding up to N; empty if the image is one view.
        lay_out: ``lay_out(span)`` gives the grids in which the tokens show the picture, the one of highest resolution
            that spans the whole picture first; it is asked after a user's own ``grid`` or ``tiles`` are filled in.
        frame: which part of which video it shows; None for a picture.
    """

    columns: Tensor
    grid: tuple[int, int] | None = None
    tiles: tuple[int, int] | None = None
    padding: tuple[int, ...] = ()
    views: tuple[int, ...] = ()
    lay_out: Callable[[ImageSpan], tuple[View, ...]] = grid_view
    frame: Frame | None = None


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
        images: the row's images with their budgets; every visual token belongs to exactly one. The grid steps of a
            video are an image each (`ImageSpan.frame`).
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
            k-1 (needs query and key), or of layer k on the entering hidden states with ``entering=True``. A ``range``
            of rows comes without the columns behind its end, which none of them sees.
        rotate: ``rotate(states)`` applies RoPE at the row's positions to (heads, n, D) queries or keys.
        project: ``project("query")`` gives the queries (H, n, D), ``project("key")`` the keys (G, n, D) that layer k
            itself makes of the entering hidden states, before RoPE.
        normed: ``normed()`` gives the hidden states (n, E) after the decoder's final norm.
        vision: per visual token signals of the vision tower, only if "vision" is in `needs`, those in the method's
            `tower_signals` of the blocks in its `tower_blocks`, by signal or ``BLOCK/SIGNAL``: ``received`` (V,)
            float32 attention that the token receives inside its image, summed over queries; ``cls`` (V,) float32
            attention of the class token, where the tower has one; both mean over heads; ``key`` (V, D) keys, mean over
            heads; ``query`` (V, H, D) queries, times the root of what scales logits; ``feature`` (V, F) hidden states
            behind the block; ``joint_key`` (V, H * D) keys of all heads side by side, and ``joint_cls`` (V,) the class
            token's attention by these, where there is one; ``luma`` (V, F, M) float32 brightness (BT.601) of the M
            pixels of each of the F frames that the token shows, 0 black and 1 white, always by that name alone.
        columns: (V,) int64 on CPU, increasing: the prompt column of each visual token, which names it at every cut.
        cut: the cut itself. ids: (n,) int64 token ids, where the prompt came as ids.
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
    project: Callable[[Literal["query", "key"]], Tensor] | None = None
    normed: Callable[[], Tensor] | None = None
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Tensor | None = None
    cut: Cut | None = None
    ids: Tensor | None = None
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

    @property
    def image(self) -> Tensor:
        """(V,) int64: the image, counted in the prompt, of each visual token; views inside one are `Image.view`."""
        found = self.visual.new_zeros(self.n_visual)
        for number, image in enumerate(self.images):
            found.index_fill_(0, image.tokens.to(found.device), number)
        return found

    @property
    def clips(self) -> tuple[tuple[Image, ...], ...]:
        """The images in prompt order, those of one video together; a picture is a clip of its own."""
        joined: list[list[Image]] = []
        for image in self.images:
            frame = image.span.frame
            last = joined[-1][-1].span.frame if joined else None
            if frame is None or last is None or last.clip != frame.clip:
                joined.append([])
            joined[-1].append(image)
        return tuple(tuple(clip) for clip in joined)


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
class Step:
    """What a method sees of one row before one decoder layer of a forward after the prefill.

    Attributes:
        layer: decoder layer about to run, 0-based.
        number: tokens cached since the prompt: 0 in the first decode step.
        token: (C,) int64, increasing, on CPU: which of the prompt's visual tokens 0..N-1 this layer's cache holds.
        ratio: what the user asked for, in (0, 1).
        query: (H, q, D) queries of this forward's tokens (mostly one) in the layer before, RoPE applied; None for
            layer 0.
        key: (G, C', D) keys of the visual tokens in the cache of the layer before, RoPE applied; None for layer 0.
        key_token: (C',) int64, as ``token``, of these keys; None for layer 0.
        other_keys: ``other_keys()`` gives (G, R, D) keys of all other tokens in that cache, those of this forward
            among them; None for layer 0.
        scaling: of the logits in the layer before. n_layers: of the decoder.
        memory: of the row; begins as `Signals.memory` was left by the prefill, and is kept from step to step.
    """

    layer: int
    number: int
    token: Tensor
    ratio: float
    query: Tensor | None = None
    key: Tensor | None = None
    key_token: Tensor | None = None
    scaling: float = 1.0
    n_layers: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    other_keys: Callable[[], Tensor] | None = None

    def logits(self) -> Tensor:
        """(H, C') float32: how the last token of this forward matched each cached visual token in the layer before."""
        assert self.key is not None
        return self._match(self.key)

    def attention(self) -> Tensor:
        """(H, C') float32: how much of its attention that token paid to each of them, beside all other tokens."""
        assert self.key is not None
        assert self.other_keys is not None
        import torch

        logits = torch.cat((self.logits(), self._match(self.other_keys())), dim=1)
        return logits.softmax(dim=1)[:, : self.key.shape[1]]

    def _match(self, key: Tensor) -> Tensor:
        """(H, n) float32 logits of the last token's queries for keys (G, n, D)."""
        assert self.query is not None
        query = self.query[:, -1].float().unflatten(0, (key.shape[0], -1))  # (G, H/G, D)
        return (query @ key.float().transpose(1, 2)).flatten(0, 1) * self.scaling


@dataclass(frozen=True)
class Processed:
    """Which visual tokens of one row the MLP of one layer processes; the others get the mean update of their group.

    Attributes:
        token: (V,) bool. group: (V,) int64 in 0..V-1; of every group one token at least is processed.
    """

    token: Tensor
    group: Tensor


@dataclass(frozen=True)
class Selection:
    """What a method returns for one row.

    Attributes:
        keep: (K,) int64 indices into the row's visual tokens, strictly increasing. At an eviction also (G, K): what
            each key head keeps, of each image equally many; real memory is freed either way.
        merge: optional (K, V) weights, dense or sparse (`ivcp_eval.interface.ops.sparse_weights`); survivor i
            continues as ``merge[i] @ hidden[visual]`` (float32, then cast). At an eviction its cached key and value
            become the like sums of the layer's cached keys and values; (G, K, V) for each key head its own.
        exact: False if the method's own rule overrides the budget (a released rule without one).
        nonfinite: how many scores of visual tokens were NaN or infinite, where the method counts, () int64 or a number;
            the engine counts what is ranked in any way (`Run.nonfinite_scores`).
    """

    keep: Tensor
    merge: Tensor | None = None
    exact: bool = True
    nonfinite: int | Tensor = 0

    def check(self, signals: Signals, method: str) -> None:
        """Raise ValueError if indices are not strictly increasing, leave 0..V-1, or miss the budget.

        Raises:
            TypeError: ``keep`` or ``merge`` are no tensors, or ``keep`` holds no whole numbers.
        """
        self.check_form(signals, method)
        self.check_values(signals, method, self.keep.cpu())

    def check_form(self, signals: Signals, method: str) -> None:
        """What `check` finds without a look at the indices, for which a GPU would make the host wait."""
        import torch

        keep = self.keep
        check_type(keep, torch.Tensor, method, "Selection.keep", "an int64 tensor of indices")
        if keep.dtype == torch.bool or keep.is_floating_point() or keep.is_complex():
            raise TypeError(
                f"method {method!r}: Selection.keep is a {keep.dtype} tensor, expected int64 indices "
                "(of a mask: `mask.nonzero().flatten()`)"
            )
        if self.merge is not None:
            check_type(self.merge, torch.Tensor, method, "Selection.merge", "a tensor of weights (K, V), or None")
        per_head = keep.ndim == 2 and signals.cut is not None and signals.cut.evicts
        if not (keep.ndim == 1 or per_head):
            raise ValueError(f"method {method!r} returned indices that are not a strictly increasing vector: {keep}")
        if self.exact and keep.shape[-1] != signals.budget:
            # What is wrong with the indices themselves says more.
            self.check_values(signals, method, keep.cpu())
            raise ValueError(f"method {method!r} kept {keep.shape[-1]} visual tokens, its budget is {signals.budget}")
        if self.merge is not None and tuple(self.merge.shape) != (*keep.shape, signals.n_visual):
            raise ValueError(
                f"method {method!r} returned merge weights {tuple(self.merge.shape)}, "
                f"expected {(*keep.shape, signals.n_visual)}"
            )

    def check_values(self, signals: Signals, method: str, keep: Tensor, images: Sequence[Tensor] | None = None) -> None:
        """What `check` finds in the indices; ``keep`` is a copy of them on the host, ``images`` of `Image.tokens`."""
        import torch

        if not bool((keep[..., 1:] > keep[..., :-1]).all()):
            raise ValueError(f"method {method!r} returned indices that are not a strictly increasing vector: {keep}")
        if keep.numel() and (int(keep.min()) < 0 or int(keep.max()) >= signals.n_visual):
            raise ValueError(f"method {method!r} returned indices outside 0..{signals.n_visual - 1}: {keep}")
        per_head = keep.ndim == 2
        if not per_head and not (self.exact and signals.cut is not None and signals.cut.budget == "clip"):
            return
        # Those of `Signals.image`, which is where the states are.
        image = torch.full((signals.n_visual,), 0)
        for number, tokens in enumerate(images or [part.tokens.cpu() for part in signals.images]):
            image[tokens] = number
        if self.exact and signals.cut is not None and signals.cut.budget == "clip" and not signals.cut.evicts:
            counts = torch.bincount(image[keep], minlength=len(signals.images)).tolist()
            start = 0
            for number, clip in enumerate(signals.clips):
                kept, budget = sum(counts[start : start + len(clip)]), sum(image.budget for image in clip)
                start += len(clip)
                if kept != budget:
                    raise ValueError(
                        f"method {method!r} kept {kept} visual tokens of clip {number}, the clip's budget is {budget}"
                    )
        sorted_images = image[keep].sort(dim=-1).values
        if per_head and bool((sorted_images != sorted_images[:1]).any()):
            raise ValueError(f"method {method!r} kept more visual tokens of an image in one head than in another")


def check_type(value: object, expected: type, method: str, where: str, words: str = "") -> None:
    """Raise TypeError unless ``value``, which a method returned from ``where``, is of the type ``expected``."""
    if not isinstance(value, expected):
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        shown = "None" if value is None else f"a {name}"
        words = words or f"a {expected.__name__}"
        raise TypeError(f"method {method!r}: `{where}` gave {shown}, expected {words}")


class AbstractMethod(ABC):
    """A pruning method: a frozen dataclass whose fields are its parameters. It chooses; the engine applies.

    The class is named ``Method`` and lives in ``ivcp_eval/methods/<name>.py``; the file name is its only name.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset()
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls", "key", "feature"})
    faithfulness: ClassVar[Faithfulness] = "variant"
    sweep_seeds: ClassVar[tuple[int, ...]] = (0,)  # of a sweep, if its file names none
    repeats_baseline: ClassVar[bool] = False  # prunes nothing; answers in passes of its own, once per benchmark
    is_served: ClassVar[bool] = False  # a server does what it does (`variants.Server`); nothing of it is known here
    for_videos: ClassVar[bool] = False  # a control that on pictures repeats another one, so sweeps leave it out there
    query_window: ClassVar[int] = 0  # W of `CachedKeys`, for a method that needs "cached_key"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # values of parameters that `faithfulness` holds for

    def __post_init__(self) -> None:
        """Make paths of the parameters that are declared so: the command line and sweep files have text."""
        for one in fields(self):  # type: ignore[arg-type] # methods are dataclasses
            if "Path" in str(one.type) and isinstance(value := getattr(self, one.name), str):
                object.__setattr__(self, one.name, Path(value))

    @property
    def label(self) -> Faithfulness:
        """`faithfulness` with these parameters: a value that was never released makes the method a variant."""
        departs = any(getattr(self, name) not in values for name, values in self.released.items())
        return "variant" if departs else self.faithfulness

    @property
    def loading(self) -> Mapping[str, str]:
        """What the model has to be loaded with, of "dtype" and "attention"; what is left out is as for other methods.

        Only for a method that `repeats_baseline`, since what it measures is this difference.
        """
        return {}

    @abstractmethod
    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Where to cut, in increasing layer order. Called once per `prune`, never for ratio 1."""

    @abstractmethod
    def select(self, signals: Signals) -> Selection:
        """Choose the surviving visual tokens of one row at one cut. Must not modify the signals (but `memory`)."""

    def observe(self, signals: Signals) -> None:
        """Remember in ``signals.memory`` what `select` needs of a layer at a ``late`` cut; called for these only."""
        raise NotImplementedError

    def merge_patches(self, patches: Patches) -> Tensor:
        """(n,) int64 0..m-1: of each patch the number that it goes on under; those of one number become their mean.

        Called between attention and MLP of every block of the tower up to the one whose output is read, for each
        picture or tile on its own, of methods with "group" in `tower_signals`. A mean weighs every patch of the
        picture alike, however it was merged before. `Signals.vision` then holds the last numbers.
        """
        raise NotImplementedError

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """Blocks of the vision tower to listen to, by the name under which `Signals.vision` holds them.

        The empty name needs no prefix there. Called for "vision" in `needs` only.

        Raises:
            Unsupported: the tower has nothing to rank by.
        """
        return {"": tower.own}

    def edit_keys(self, cached: CachedKeys) -> Tensor:
        """(G, V, D) keys that replace ``cached.key`` for decoding; called for "cached_key" in `needs` only."""
        raise NotImplementedError

    def attended(self, step: Step) -> Tensor | None:
        """(C,) bool: the cached visual tokens that one layer attends to in one forward after the prefill; None for all.

        Called for "step" in `needs` only; may modify ``step.memory``. Nothing leaves the cache. Beams are refused.
        """
        raise NotImplementedError

    def attended_pairs(self, signals: Signals) -> Tensor | None:
        """(V, V) or (H, V, V) bool: which visual tokens (last axis) each visual token attends to in the layer entered.

        Called in the prefill before every layer, for "sparse" in `needs` only, with ``cut`` naming layer and ratio and
        with `Signals.project`; None for all. A token sees itself, and later ones never, whatever is said of them; text
        sees all, and all see the text before them. Nothing leaves the sequence: all layers of decoding see every token.
        """
        return None

    def mlp_tokens(self, signals: Signals, states: Tensor) -> Processed | None:
        """Which visual tokens go through the layer's MLP, called as `attended_pairs` is and after it; None for all.

        Args:
            states: (V, E) of the visual tokens between the layer's attention and the norm before its MLP.
        """
        return None

    def sparse_shares(self, model: ModelFacts, ratio: float, n_visual: int) -> Sequence[tuple[float, float]]:
        """What `attended_pairs` and `mlp_tokens` leave in at a retention ratio, from which a budget in FLOPs is solved.

        Args:
            n_visual: visual tokens of the prompt.

        Returns:
            For each decoder layer the share of the pairs of visual tokens that its attention looks at, and of visual
            tokens that its MLP processes, before rounding; none where nothing is left out, or not by the ratio.
        """
        return ()

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
        import torch

        from ivcp_eval.interface.ops import top_of_each_image

        score = self.score(signals)
        check_type(score, torch.Tensor, method_name(self), "score", "a torch tensor (V,), one number per visual token")
        if tuple(score.shape) != (signals.n_visual,):
            raise ValueError(
                f"`score` returned shape {tuple(score.shape)}, expected ({signals.n_visual},): one number per visual "
                "token, as in signals.hidden[signals.visual]"
            )
        nonfinite = (~torch.isfinite(score)).sum()
        return Selection(top_of_each_image(score, signals.images), nonfinite=nonfinite)


def method_name(method: AbstractMethod) -> str:
    """The registered name of an instance: its module's, or what the instance itself says (wrappers, plug-ins)."""
    return str(getattr(method, "name", type(method).__module__.rsplit(".", 1)[-1]))
