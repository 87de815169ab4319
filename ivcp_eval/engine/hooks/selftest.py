"""A trial of the hooks on the first two layers of a decoder, once per model class in a process.

`names.check_names` knows whether forwards *take* what the hooks replace; the trial knows whether they use it. Ten
tokens are pruned and continued by one; what comes out must be what the same layers, unhooked, make of the tokens that
are kept. It runs on copies of the modules' shells (weights are shared), so hooks of other code neither run nor are
seen.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

from ivcp_eval.engine.cache import PrunedLayer
from ivcp_eval.engine.guards.refusals import refuse_compiled
from ivcp_eval.engine.hooks import Pruner
from ivcp_eval.engine.parts import Parts, Resolved
from ivcp_eval.interface import AbstractAdapter, AbstractMethod, Cut, ModelFacts, Selection, Signals
from ivcp_eval.interface.names import TESTED, check_names, output_cache, spelling

if TYPE_CHECKING:
    from torch import Tensor, nn

LENGTH = 10
VISUAL = slice(2, 8)
KEPT = (0, 1, 2, 4, 6, 8, 9)  # every other visual token leaves
TOLERANCE = 0.05  # of the norm; what goes wrong is off by about the norm itself, rounding by far less

_passed: set[tuple[Any, ...]] = set()


def self_test(model: Any, adapter: AbstractAdapter, family: str) -> None:
    """Raise ValueError if hooks on this class of model, in this release of transformers, do not do what they should.

    Costs six forwards of ten tokens through two layers, once; later calls look up a set, and leave the model's own
    state to `Engine.attach`. Models that accelerate has
    dispatched (their modules' forwards are bound to the originals) are checked by names alone.
    """
    text_model = adapter.text_model(model)
    key = (family, type(text_model), *{type(layer) for layer in text_model.layers[:2]}, transformers.__version__)
    modules = [text_model, *text_model.layers[:2]]
    if key in _passed:
        return
    refuse_compiled(model)
    check_names(model, text_model)
    if model.training or any("forward" in vars(module) for module in modules):
        return
    try:
        with torch.no_grad():
            trial = _Trial(model, adapter, family, len(modules) - 2)
            trial.compare()
    except Exception as error:
        raise ValueError(
            f"pruning hooks do not work on {type(text_model).__name__} of transformers {transformers.__version__}: "
            f"{error}. Install a tested release of transformers ({TESTED})."
        ) from error
    _passed.add(key)


@dataclass(frozen=True)
class _EveryOther(AbstractMethod):
    layer: int = 0

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(self.layer, ratio),)

    def select(self, signals: Signals) -> Selection:
        return Selection(torch.arange(0, signals.n_visual, 2, device=signals.visual.device))


@dataclass(frozen=True)
class _Outputs:
    prefill: Any
    step: Any


class _Trial:
    """Two layers of a decoder under the hooks, and without them."""

    def __init__(self, model: Any, adapter: AbstractAdapter, family: str, last: int) -> None:
        self.model, self.adapter, self.family, self.last = model, adapter, family, last
        text_model = adapter.text_model(model)
        self.shell = _shell(text_model)
        self.shell.layers = torch.nn.ModuleList(_shell(layer) for layer in text_model.layers[:2])
        self.device = text_model.get_input_embeddings().weight.device

    def compare(self) -> None:
        """Raise AssertionError, in words, at the first difference."""
        hooked = self._hooked(0)
        plain = self._forward(list(KEPT), DynamicCache())
        expected = self._forward([LENGTH], output_cache(plain), behind=len(KEPT))
        for what, got, right in (("prefill", hooked.prefill, plain), ("decoding step", hooked.step, expected)):
            _same(what, got.last_hidden_state[:, -1], right.last_hidden_state[:, -1])
        cache = output_cache(self._hooked(self.last).step)
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        if not all(isinstance(layer, PrunedLayer) for layer in cache.layers) or set(lengths) != {len(KEPT) + 1}:
            raise AssertionError(f"the caches hold {lengths} tokens instead of {len(KEPT) + 1} in every layer")

    def _hooked(self, layer: int) -> _Outputs:
        """A pruned prefill and one step on its cache."""
        method = _EveryOther(layer)
        mask = torch.zeros(1, LENGTH, dtype=torch.bool)
        mask[:, VISUAL] = True
        cuts = method.cuts(ModelFacts(self.family, len(self.shell.layers)), 0.5)
        resolved = Resolved(self.adapter, self.family, method, "self-test", 0.5, cuts)
        engine = Pruner(Parts(self.model, resolved, image_mask=mask, text_model=self.shell))
        try:
            engine.attach()
            prefill = self._forward(list(range(LENGTH)), DynamicCache())
            step = self._forward([LENGTH], output_cache(prefill), behind=LENGTH)
            if not engine.continuity.continued:
                raise AssertionError("the step after a pruned prompt was not recognised as its continuation")
        finally:
            engine.detach()
        return _Outputs(prefill, step)

    def _forward(self, columns: list[int], cache: Any, behind: int = 0) -> Any:
        ids = torch.tensor([columns], device=self.device)
        ones = torch.ones(1, behind + len(columns), dtype=torch.int64, device=self.device)
        inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": ones, "use_cache": True}
        return self.shell(**inputs, **{spelling("cache"): cache})


def _shell(module: nn.Module) -> Any:
    """A module with the weights and children of another, but none of its forward hooks."""
    shell = copy.copy(module)
    vars(shell).update({name: OrderedDict() for name in vars(module) if name.startswith("_forward_")})
    vars(shell)["_modules"] = dict(module._modules)
    return shell


def _same(what: str, got: Tensor, expected: Tensor) -> None:
    if not bool(expected.isfinite().all()):
        return  # weights that overflow tell nothing of the hooks
    off = float((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))
    if not off <= TOLERANCE:
        raise AssertionError(f"the {what} of a pruned prompt is off by {off:.0%}")
