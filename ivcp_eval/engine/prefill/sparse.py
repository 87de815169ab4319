"""Sparse layers of a whole prefill: what is masked in each layer's attention and skipped by its MLP is simulated.

Every token stays, and every product is computed: pairs that the method leaves out are masked, and outputs of the MLP
that it skips are replaced. Answers are those of a real implementation; what one would save is counted (`Run`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivcp_eval.engine.parts import Listener
from ivcp_eval.engine.prefill import Cutter, Prefill
from ivcp_eval.interface import AbstractMethod, Cut, Processed, Signals
from ivcp_eval.interface.method import check_type
from ivcp_eval.interface.ops import to_device, to_host

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ivcp_eval.engine.parts import Forward


@dataclass
class _Now:
    """What belongs to the forward that is running.

    Attributes:
        watched: asks the method. shown: what it is shown of each row in the layer that is running.
        slots: where the visual tokens of each row stand. chosen: what the MLP is to do, per row.
        pairs, mlp: (layer, row, number) of what is left in, not read yet. empty: whether a group had no token.
    """

    watched: Callable[..., Any] | None = None
    shown: list[Signals | None] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)
    chosen: list[Processed | None] = field(default_factory=list)
    pairs: list[tuple[int, int, Tensor]] = field(default_factory=list)
    mlp: list[tuple[int, int, Tensor]] = field(default_factory=list)
    empty: list[tuple[int, int, Tensor]] = field(default_factory=list)


class SparseLayers(Listener):
    """Asks the method before every layer of a prefill, and before its MLP."""

    works_on_prefill = True

    def __init__(self, method: AbstractMethod, name: str, ratio: float) -> None:
        self.method, self.name, self.ratio = method, name, ratio
        self._now = _Now()

    def attach(self, decoder: Any, running: Callable[[], Forward]) -> list[Any]:
        """Listen to what enters the MLP of every layer, and to what leaves it."""
        self._running, self._heads, handles = running, decoder.config.num_attention_heads, []
        for index, layer in enumerate(decoder.layers):
            handles.append(layer.post_attention_layernorm.register_forward_pre_hook(self._before_mlp))
            handles.append(layer.mlp.register_forward_hook(functools.partial(self._after_mlp, index)))
        return handles

    def begin(self, state: Prefill) -> None:
        """So far every layer is whole."""
        n_layers, prompt = len(state.layers), state.run.visual_prompt
        state.run.visual_pairs = [[n * (n + 1) // 2 for n in prompt] for _ in range(n_layers)]
        state.run.visual_mlp = [list(prompt) for _ in range(n_layers)]

    def entered(
        self, state: Prefill, cutter: Cutter, index: int, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """(B, H or 1, n, n) bool: what each token sees in the layer, but for causality; None for all."""
        self._now.watched, hidden = functools.partial(cutter.watched, state), cutter.at_layer(index, hidden)
        self._now.shown = cutter.shown(state, Cut(index, self.ratio), hidden, kwargs)
        here = state.now.rows.slots_in(state.now.matrix)
        self._now.slots = []
        answers = []
        for row, (signals, alive) in enumerate(zip(self._now.shown, state.now.rows.columns, strict=True)):
            slots = to_device(here[row, here.shape[1] - alive.numel() :], hidden.device)
            self._now.slots.append(slots[signals.visual] if signals is not None else slots[:0])
            answers.append(None if signals is None else self._seen(index, row, signals))
        heads = max((len(answer) for answer in answers if answer is not None), default=0)
        if not heads:
            return None
        seen = torch.ones(len(answers), heads, *hidden.shape[1:2] * 2, dtype=torch.bool, device=hidden.device)
        for row, (answer, slots) in enumerate(zip(answers, self._now.slots, strict=True)):
            if answer is not None:
                seen[row, :, slots[:, None], slots] = to_device(answer, hidden.device).expand(heads, -1, -1)
        return seen

    def after(self, state: Prefill) -> None:
        """Read what was counted, and see that every group had a token to take the mean of."""
        counts = iter(
            to_host([number for _, _, number in self._now.pairs + self._now.mlp] + [bad for *_, bad in self._now.empty])
        )
        for (index, row, _), into in [
            *((one, state.run.visual_pairs) for one in self._now.pairs),
            *((one, state.run.visual_mlp) for one in self._now.mlp),
        ]:
            into[index][row] = int(next(counts))
        for index, row, _ in self._now.empty:
            if bool(next(counts)):
                raise ValueError(
                    f"method {self.name!r}: `mlp_tokens` left a group of row {row} in layer {index} without a single "
                    "token that is processed, so there is no update to share; take one at least"
                )

    def forget(self) -> None:
        """Drop what belongs to one forward."""
        self._now = _Now()

    def _seen(self, index: int, row: int, signals: Signals) -> Tensor | None:
        """(H or 1, V, V) bool."""
        assert self._now.watched is not None
        _, seen = self._now.watched(signals, self.method.attended_pairs)
        if seen is None:
            return None
        check_type(seen, torch.Tensor, self.name, "attended_pairs", "a bool tensor (V, V) or (H, V, V), or None")
        n, heads = signals.n_visual, self._heads
        if seen.dtype != torch.bool or tuple(seen.shape) not in ((n, n), (heads, n, n)):
            raise ValueError(
                f"method {self.name!r}: `attended_pairs` returned {seen.dtype} {tuple(seen.shape)}, expected bool "
                f"{(n, n)}, or {(heads, n, n)} with each head's own"
            )
        itself = torch.eye(n, dtype=torch.bool, device=seen.device)
        whole = seen.reshape(-1, n, n) | itself
        self._now.pairs.append((index, row, whole.tril().sum().div(len(whole)).round().long()))
        return whole

    def _before_mlp(self, _module: nn.Module, args: Any) -> None:
        if not isinstance(self._running(), Prefill) or not self._now.shown:
            return
        assert self._now.watched is not None
        self._now.chosen = []
        for row, (signals, slots) in enumerate(zip(self._now.shown, self._now.slots, strict=True)):
            if signals is None:
                self._now.chosen.append(None)
                continue
            states = args[0][row, slots]
            _, chosen = self._now.watched(signals, functools.partial(self.method.mlp_tokens, states=states))
            if chosen is not None:
                self._check(chosen, signals.n_visual)
            self._now.chosen.append(chosen)
        self._now.shown = []

    def _check(self, chosen: Any, n: int) -> None:
        check_type(chosen, Processed, self.name, "mlp_tokens", "a Processed, or None")
        token, group = chosen.token, chosen.group
        if token.dtype != torch.bool or group.dtype != torch.int64 or not token.shape == group.shape == (n,):
            raise ValueError(
                f"method {self.name!r}: `mlp_tokens` returned token {token.dtype} {tuple(token.shape)} and group "
                f"{group.dtype} {tuple(group.shape)}, expected bool {(n,)} and int64 {(n,)}"
            )

    def _after_mlp(self, index: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        chosen, self._now.chosen = self._now.chosen, []
        if not isinstance(self._running(), Prefill) or all(one is None for one in chosen):
            return None
        output = output.clone()
        for row, (one, slots) in enumerate(zip(chosen, self._now.slots, strict=True)):
            if one is None:
                continue
            token, group = to_device(one.token, output.device), to_device(one.group, output.device)
            update = output[row, slots]
            members = torch.zeros(len(group), device=output.device).index_add_(0, group, torch.ones_like(group).float())
            counts = torch.zeros_like(members).index_add_(0, group, token.float())
            sums = torch.zeros_like(update, dtype=torch.float32).index_add(0, group, update.float() * token[:, None])
            means = (sums / counts.clamp_min(1)[:, None]).to(update.dtype)
            output[row, slots] = torch.where(token[:, None], update, means[group])
            self._now.mlp.append((index, row, token.sum()))
            self._now.empty.append((index, row, ((members > 0) & (counts == 0)).any()))
        return output
