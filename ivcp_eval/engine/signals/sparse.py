"""Sparse layers of a whole prefill: what is masked in each layer's attention and skipped by its MLP is simulated.

Every token stays, and every product is computed: pairs that the method leaves out are masked, and outputs of the MLP
that it skips are replaced. Answers are those of a real implementation; what one would save is counted (`Run`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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


class SparseLayers(Listener):
    """Asks the method before every layer of a prefill, and before its MLP."""

    works_on_prefill = True

    def __init__(self, method: AbstractMethod, name: str, ratio: float) -> None:
        self.method, self.name, self.ratio = method, name, ratio
        self.forget()

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
        self._watched = functools.partial(cutter.watched, state)
        self._shown = cutter.shown(state, Cut(index, self.ratio), hidden, kwargs)
        here = state.now.rows.slots_in(state.now.matrix)
        self._slots = []
        answers = []
        for row, (signals, alive) in enumerate(zip(self._shown, state.now.rows.columns, strict=True)):
            slots = to_device(here[row, here.shape[1] - alive.numel() :], hidden.device)
            self._slots.append(slots[signals.visual] if signals is not None else slots[:0])
            answers.append(None if signals is None else self._seen(index, row, signals))
        heads = max((len(answer) for answer in answers if answer is not None), default=0)
        if not heads:
            return None
        seen = torch.ones(len(answers), heads, *hidden.shape[1:2] * 2, dtype=torch.bool, device=hidden.device)
        for row, (answer, slots) in enumerate(zip(answers, self._slots, strict=True)):
            if answer is not None:
                seen[row, :, slots[:, None], slots] = to_device(answer, hidden.device).expand(heads, -1, -1)
        return seen

    def after(self, state: Prefill) -> None:
        """Read what was counted, and see that every group had a token to take the mean of."""
        counts = iter(to_host([number for _, _, number in self._pairs + self._mlp] + [bad for *_, bad in self._empty]))
        for (index, row, _), into in [
            *((one, state.run.visual_pairs) for one in self._pairs),
            *((one, state.run.visual_mlp) for one in self._mlp),
        ]:
            into[index][row] = int(next(counts))
        for index, row, _ in self._empty:
            if bool(next(counts)):
                raise ValueError(
                    f"method {self.name!r}: `processed` left a group of row {row} in layer {index} without a single "
                    "token that is processed, so there is no update to share; take one at least"
                )

    def forget(self) -> None:
        """Drop what belongs to one forward."""
        self._watched: Callable[..., Any] | None = None
        self._shown: list[Signals | None] = []
        self._slots: list[Tensor] = []
        self._chosen: list[Processed | None] = []
        self._pairs: list[tuple[int, int, Tensor]] = []
        self._mlp: list[tuple[int, int, Tensor]] = []
        self._empty: list[tuple[int, int, Tensor]] = []

    def _seen(self, index: int, row: int, signals: Signals) -> Tensor | None:
        """(H or 1, V, V) bool."""
        assert self._watched is not None
        _, seen = self._watched(signals, self.method.seen)
        if seen is None:
            return None
        check_type(seen, torch.Tensor, self.name, "seen", "a bool tensor (V, V) or (H, V, V), or None")
        n, heads = signals.n_visual, self._heads
        if seen.dtype != torch.bool or tuple(seen.shape) not in ((n, n), (heads, n, n)):
            raise ValueError(
                f"method {self.name!r}: `seen` returned {seen.dtype} {tuple(seen.shape)}, expected bool {(n, n)}, or "
                f"{(heads, n, n)} with each head's own"
            )
        itself = torch.eye(n, dtype=torch.bool, device=seen.device)
        whole = seen.reshape(-1, n, n) | itself
        self._pairs.append((index, row, whole.tril().sum().div(len(whole)).round().long()))
        return whole

    def _before_mlp(self, _module: nn.Module, args: Any) -> None:
        if not isinstance(self._running(), Prefill) or not self._shown:
            return
        assert self._watched is not None
        self._chosen = []
        for row, (signals, slots) in enumerate(zip(self._shown, self._slots, strict=True)):
            if signals is None:
                self._chosen.append(None)
                continue
            states = args[0][row, slots]
            _, chosen = self._watched(signals, functools.partial(self.method.processed, states=states))
            if chosen is not None:
                self._check(chosen, signals.n_visual)
            self._chosen.append(chosen)
        self._shown = []

    def _check(self, chosen: Any, n: int) -> None:
        check_type(chosen, Processed, self.name, "processed", "a Processed, or None")
        token, group = chosen.token, chosen.group
        if token.dtype != torch.bool or group.dtype != torch.int64 or not token.shape == group.shape == (n,):
            raise ValueError(
                f"method {self.name!r}: `processed` returned token {token.dtype} {tuple(token.shape)} and group "
                f"{group.dtype} {tuple(group.shape)}, expected bool {(n,)} and int64 {(n,)}"
            )

    def _after_mlp(self, index: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        chosen, self._chosen = self._chosen, []
        if not isinstance(self._running(), Prefill) or all(one is None for one in chosen):
            return None
        output = output.clone()
        for row, (one, slots) in enumerate(zip(chosen, self._slots, strict=True)):
            if one is None:
                continue
            token, group = to_device(one.token, output.device), to_device(one.group, output.device)
            update = output[row, slots]
            members = torch.zeros(len(group), device=output.device).index_add_(0, group, torch.ones_like(group).float())
            counts = torch.zeros_like(members).index_add_(0, group, token.float())
            sums = torch.zeros_like(update, dtype=torch.float32).index_add(0, group, update.float() * token[:, None])
            means = (sums / counts.clamp_min(1)[:, None]).to(update.dtype)
            output[row, slots] = torch.where(token[:, None], update, means[group])
            self._mlp.append((index, row, token.sum()))
            self._empty.append((index, row, ((members > 0) & (counts == 0)).any()))
        return output
