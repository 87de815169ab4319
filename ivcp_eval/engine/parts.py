"""What an engine is made of: the resolved request, where to find the images, and optional listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ivcp_eval.interface import AbstractAdapter, AbstractMethod, Cut, Frame, ImageSpan

if TYPE_CHECKING:
    from torch import Tensor

    from ivcp_eval.engine.cache import PrunedLayer
    from ivcp_eval.engine.decoding.continuation import Continuation
    from ivcp_eval.engine.prefill import Cutter, Prefill

    Forward: TypeAlias = Prefill | Continuation | None
    """The state of the forward that is running: a pruned prefill, a forward on a pruned cache, or neither."""


@dataclass(frozen=True)
class Resolved:
    """A checked request: which method cuts where in which model family.

    Attributes:
        adapter, family: of the model, and the adapter's name.
        method, name: the method, and the name it is registered under.
        ratio: the retention ratio asked for, in (0, 1].
        cuts: in increasing layer order; none where nothing is removed from the sequence.
    """

    adapter: AbstractAdapter
    family: str
    method: AbstractMethod
    name: str
    ratio: float
    cuts: tuple[Cut, ...]

    @property
    def first_cut(self) -> int | None:
        """The decoder layer before which tokens leave the sequence for the first time; None if none ever do."""
        return next((cut.layer for cut in self.cuts if cut.ratio < 1 and not cut.evicts), None)

    @property
    def works_on_tower(self) -> bool:
        """Whether the method merges inside the vision tower, at this ratio, so that no other can share its features."""
        return self.ratio < 1 and "group" in self.method.tower_signals

    @property
    def works_on_cache(self) -> bool:
        """Whether the method evicts from, edits or masks the cache of a whole prompt, at this ratio."""
        on_cache = bool(self.method.needs & {"cached_key", "step"}) or any(cut.evicts for cut in self.cuts)
        return self.ratio < 1 and on_cache

    @property
    def is_sparse(self) -> bool:
        """Whether the method leaves out parts of a whole prefill's attention and MLPs, at this ratio."""
        return self.ratio < 1 and "sparse" in self.method.needs


@dataclass(frozen=True)
class Parts:
    """Everything an engine works with.

    Attributes:
        model: the outer model. resolved: what runs on it.
        image_mask: (B, S) bool, the visual tokens of the prompt; None: the adapter finds them.
        span_options: fields of `ImageSpan` that the caller knows better than the adapter.
        frames: per row, which frame each of its images shows, likewise; one row serves all.
        seed: of methods that draw.
        text_model: decoder to hook in place of the model's own.
    """

    model: Any
    resolved: Resolved
    image_mask: Tensor | None = None
    span_options: Mapping[str, Any] = field(default_factory=dict)
    frames: Sequence[Sequence[Frame | None]] | None = None
    seed: int = 0
    text_model: Any = None

    @property
    def decoder(self) -> Any:
        """The text model that is hooked, with ``layers``, ``norm`` and ``rotary_emb``."""
        return self.resolved.adapter.text_model(self.model) if self.text_model is None else self.text_model

    def completed(self, spans: list[list[ImageSpan]]) -> list[list[ImageSpan]]:
        """The images of every row with what the caller said of them.

        Raises:
            ValueError: ``frames`` do not fit the rows, or do not count clips and their steps from 0.
        """
        spans = [[replace(span, **self.span_options) for span in row] for row in spans]
        if self.frames is None or not spans:
            return spans
        if not self.frames or len(spans) % len(self.frames):
            raise ValueError(f"frames were given for {len(self.frames)} rows, the prompt has {len(spans)}")
        repeats = len(spans) // len(self.frames)  # beams repeat every row
        made = []
        for number, row in enumerate(spans):
            given = self.frames[number // repeats]
            if len(given) != len(row):
                raise ValueError(
                    f"frames name {len(given)} images of row {number}, which has {len(row)} (each grid step of a video "
                    "is one); give a Frame for each, None for a picture"
                )
            _check_frames(given)
            made.append([replace(span, frame=frame) for span, frame in zip(row, given, strict=True)])
        return made


def _check_frames(frames: Sequence[Frame | None]) -> None:
    """Raise ValueError unless clips and their steps are counted from 0, in the prompt's order and without gaps."""
    clip, step, broken = -1, 0, False
    for frame in frames:
        if frame is None:
            broken = True
            continue
        goes_on = f"Frame({clip}, {step}) or " if clip >= 0 else ""
        if (frame.clip, frame.index) not in ((clip, step), (clip + 1, 0)):
            raise ValueError(
                f"got {frame}, expected {goes_on}Frame({clip + 1}, 0); count the clips of a row, and the frames of "
                "each, in the prompt's order from 0"
            )
        if broken and frame.index:
            raise ValueError(f"a picture stands between frames of clip {clip}; the frames of a clip follow each other")
        clip, step, broken = frame.clip, frame.index + 1, False


class Listener:
    """An optional part of an engine. Every hook does nothing unless a listener has a use for it.

    Of each forward come, in this order: `encode` where the vision tower runs inside it; then for a prefill with images
    `begin`, `entered` before every layer, `after`, and for a forward on a pruned cache `attended` before every layer;
    always `forget`.
    """

    works_on_cache: ClassVar[bool] = False
    """Whether it needs the cache of the prompt, also where no token is removed."""
    works_on_prefill: ClassVar[bool] = False
    """Whether it needs the layers of the prefill, also where no token is removed."""

    def attach(self, decoder: Any, running: Callable[[], Forward]) -> list[Any]:
        """Register hooks of its own; returns their handles. ``running()`` gives the state of the forward."""
        return []

    def encode(self) -> None:
        """Images are about to be encoded inside the forward that begins."""

    def begin(self, state: Prefill) -> None:
        """A prefill with images is about to run through the layers."""

    def entered(
        self, state: Prefill, cutter: Cutter, index: int, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """(B, H or 1, n, n) bool: what each token sees in layer ``index`` of a prefill, causality apart; None: all.

        Args:
            hidden: (B, n, E) what enters it. kwargs: what else it gets.
        """
        return None

    def attended(self, index: int, cached: PrunedLayer, new: int, embeddings: Any) -> Tensor | None:
        """(B, m) bool: the slots to which layer ``index`` may attend in a forward on a pruned cache; None for all.

        Args:
            cached: the layer's cache before the forward. new: tokens of the forward, which are the last slots.
            embeddings: position embeddings that the layer gets.
        """
        return None

    def after(self, state: Prefill) -> None:
        """The layers ran, and what was removed is counted."""

    def forget(self) -> None:
        """The forward ended, perhaps by an exception: drop every tensor of it."""
