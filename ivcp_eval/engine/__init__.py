"""`prune`: run any supported transformers model with fewer visual tokens, inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ivcp_eval.engine.guards.cuts import check_cuts, check_ratio
from ivcp_eval.engine.guards.refusals import refuse_labels, refuse_other_kernels, refuse_own_pruning, unwrapped
from ivcp_eval.engine.hooks import Pruner, listeners_for
from ivcp_eval.engine.hooks.selftest import self_test
from ivcp_eval.engine.parts import Parts, Resolved
from ivcp_eval.engine.run import Run
from ivcp_eval.interface import (
    AbstractAdapter,
    AbstractMethod,
    Cut,
    Frame,
    Signal,
    Unsupported,
    VisionTap,
)
from ivcp_eval.interface.method import method_name
from ivcp_eval.interface.registry import adapter as load_adapter
from ivcp_eval.interface.registry import family_of, make_method

if TYPE_CHECKING:
    from torch import Tensor, nn

REQUIRED: Any = object()
"""No ratio was given."""

__all__ = ["Resolved", "Run", "prune", "resolve"]


@contextmanager
def prune(
    model: nn.Module,
    method: str | AbstractMethod,
    ratio: float = REQUIRED,
    *,
    family: str | None = None,
    image_mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    tiles: tuple[int, int] | None = None,
    padding: Sequence[int] | None = None,
    frames: Sequence[Sequence[Frame | None]] | None = None,
    seed: int = 0,
    **parameters: Any,
) -> Iterator[Run]:
    """Prune visual tokens in every prefill of ``model`` inside the block.

    Works with ``generate`` (greedy, sampled, beams, prompt lookup), bare forwards, batches with left padding, several
    images, text-only rows (untouched) and a second turn on the pruned cache. After the block, also after an
    exception, the model is as before.

    Bare forwards of a padded batch need the ``position_ids`` that `generate` makes: without them most families count
    the padding, which attention does not feel, but IVC-Prune reads positions.

    Args:
        model: a stock transformers model of a supported family, in eval mode; also inside a PEFT wrapper whose
            adapters sit in its layers.
        method: registered name (see ``ivcp list``) or a method instance.
        ratio: share of each image's visual tokens alive after the last cut, in (0, 1]; ``round(ratio * N)``, at
            least 1. Only the method ``none`` does without.
        family: adapter name; found from ``model.config.model_type`` if not given.
        image_mask: (B, S) bool, the visual tokens of the prompt, for models that get ``inputs_embeds`` or language
            models alone. Overrides what the adapter finds.
        grid, tiles, padding: layout of the image(s) where there is no outer model to ask: (rows, columns) of a grid,
            (w, h) high-resolution tiles, and indices of tokens that show padding only.
        frames: per row of the prompt, for each of its images in order (a video is one per grid step), which frame of
            which video it shows, None for a picture: for frames that come as images, and where the model's inputs do
            not say when a frame is shown. One row serves all.
        seed: of methods that draw; a row draws the same in any batch.
        **parameters: of the method, e.g. ``layer=16``, ``preset="official"``.

    Yields:
        The `Run`, filled by each prefill.

    Raises:
        Unsupported: the method cannot run on the family, with the reason.
        ValueError: unknown method, parameter or model family, no ratio or one outside (0, 1], a layer the model has
            not, a transformers release that the hooks do not fit, a model inside ``nn.DataParallel``, or (inside the
            block) something unsupported: static, offloaded or quantised caches, training, labels, torch.compile,
            videos of a family whose videos are not pruned, chunked prefill, a new image on a filled cache.
    """
    if not isinstance(method, str) and parameters:
        raise ValueError(f"parameters {sorted(parameters)} were given beside a ready method; set them on the method")
    wrapper, model = model, unwrapped(model)
    if ratio is REQUIRED:
        ratio = _without_ratio(method)
    resolved = resolve(model, method, ratio, family, parameters)
    if resolved.cuts or resolved.works_on_cache or resolved.is_sparse:
        self_test(model, resolved.adapter, resolved.family)
    options = {"grid": grid, "tiles": tiles, "padding": None if padding is None else tuple(int(p) for p in padding)}
    parts = Parts(
        model=model,
        resolved=resolved,
        image_mask=image_mask,
        span_options={key: value for key, value in options.items() if value is not None},
        frames=frames,
        seed=seed,
    )
    engine = Pruner(parts, listeners_for(model, resolved))
    labels = wrapper.register_forward_pre_hook(refuse_labels, with_kwargs=True) if wrapper is not model else None
    try:
        engine.attach()
        yield engine.run
        engine.continuity.warn()
    finally:
        engine.detach()
        if labels is not None:
            labels.remove()


def _without_ratio(method: str | AbstractMethod) -> float:
    name = method if isinstance(method, str) else method_name(method)
    if name == "none":
        return 1.0
    raise ValueError(
        f"prune(model, {name!r}) got no ratio: name the share of visual tokens to keep, in (0, 1], as in "
        f"prune(model, {name!r}, 0.5); an unpruned run is prune(model, 'none')"
    )


def resolve(
    model: nn.Module, method: str | AbstractMethod, ratio: float, family: str | None, parameters: Mapping[str, Any]
) -> Resolved:
    """A request, checked; raises as `prune`."""
    check_ratio(ratio)
    name = method if isinstance(method, str) else method_name(method)
    if isinstance(method, str):
        method = make_method(method, parameters)
    config = getattr(model, "config", None)
    refuse_own_pruning(config)
    family = family or family_of(getattr(config, "model_type", type(model).__name__))
    adapter = load_adapter(family)
    facts = adapter.facts(config, family)
    _check_loading(method, adapter, model, name)
    cuts = method.cuts(facts, ratio) if ratio < 1 else ()
    if ratio < 1:
        _check_signals(method, cuts, adapter, model, family, name)
    check_cuts(cuts, facts, name)
    return Resolved(adapter, family, method, name, ratio, cuts)


def _check_loading(method: AbstractMethod, adapter: AbstractAdapter, model: Any, name: str) -> None:
    if not method.loading:
        return
    text_model = adapter.text_model(model)
    loaded = {
        "dtype": str(text_model.dtype).removeprefix("torch."),
        "attention": text_model.config._attn_implementation,
    }
    for what, required in method.loading.items():
        if loaded[what] != required:
            raise Unsupported(
                f"method {name!r} with {what}={required} needs a model that is loaded so; this one has {loaded[what]}. "
                "Load it anew, or let `ivcp eval` or a sweep do so"
            )


def _check_signals(
    method: AbstractMethod, cuts: tuple[Cut, ...], adapter: AbstractAdapter, model: Any, family: str, name: str
) -> None:
    shrinks = method.pixel_share(0.5) is not None  # whatever the ratio
    if shrinks and type(adapter).shrunk_size is AbstractAdapter.shrunk_size:
        raise Unsupported(
            f"method {name!r} shrinks the image, but on {family!r} every image costs the same number of visual tokens"
        )
    cached: frozenset[Signal] = frozenset({"cached_key"}) if "step" in method.needs else frozenset()
    for signal in sorted(method.needs.union(cached, *(cut.needs for cut in cuts))):
        reason = adapter.unsupported(model, signal)
        if reason:
            raise Unsupported(f"method {name!r} needs the signal {signal!r}, which {family!r} cannot give: {reason}")
    if "sparse" in method.needs:
        refuse_other_kernels(adapter.text_model(model), f"method {name!r} masks pairs of tokens")
    if "vision" in method.needs:
        _check_blocks(method, adapter.vision_tap(model), family, name)


def _check_blocks(method: AbstractMethod, tap: VisionTap | None, family: str, name: str) -> None:
    assert tap is not None  # the adapter was asked
    if "group" in method.tower_signals and not tap.between:
        raise Unsupported(
            f"method {name!r} merges patches inside the vision tower, but on {family!r} a visual token is not one "
            "patch: it is made of several, or tiles are cropped and joined behind the tower"
        )
    if "luma" in method.tower_signals and tap.luma is None:
        raise Unsupported(
            f"method {name!r} needs the pixels of every visual token, but on {family!r} a token is no rectangle of them"
        )
    for number in method.tower_blocks(tap.facts).values():
        if not 0 <= number < tap.facts.n_blocks:
            raise ValueError(
                f"method {name!r} listens to block {number} of the vision tower, which has blocks "
                f"0..{tap.facts.n_blocks - 1}"
            )
