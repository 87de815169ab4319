"""Oracle: the outer products themselves (norms and inner products of rank-one matrices), with an exponential kernel's
values in double precision, and the greedy selection with Python loops.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Signals
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.iwp import Updates
from tests.methods.material import GROUPS, HEADS, SIZE, random_signals


def kappa(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.exp(float(a.double() @ b.double()) / SIZE**0.5)


def slow_magnitude(signals: Signals, queries: list[int], heads: str) -> list[float]:
    assert signals.key is not None
    assert signals.value is not None
    assert signals.query is not None
    out = []
    for token in signals.visual.tolist():
        per_head = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            norm = float(signals.value[group, token].double().norm())
            mean = sum(kappa(signals.query[head, q], signals.key[group, token]) for q in queries) / len(queries)
            per_head.append(mean * norm)
        out.append(max(per_head) if heads == "max" else sum(per_head) / HEADS)
    return out


def slow_duplication(signals: Signals, i: int, j: int, heads: str) -> float:
    """Eq. 12 as printed, mean or max over heads; i and j among the row's tokens."""
    assert signals.key is not None
    assert signals.value is not None
    assert signals.rotate is not None
    key, found = signals.rotate(signals.key), []
    for group in range(GROUPS):
        a, b = signals.value[group, i].double(), signals.value[group, j].double()
        k_i, k_j = key[group, i], key[group, j]
        kernel = kappa(k_i, k_j) / math.sqrt(kappa(k_i, k_i) * kappa(k_j, k_j))
        found.append(float(a @ b / (a.norm() * b.norm())) * kernel)
    return max(found) if heads == "max" else sum(found) / GROUPS


def slow_selection(signals: Signals, magnitude: list[float], parameters: dict[str, Any]) -> list[int]:
    trade, chunks = parameters.get("trade", 0.5), parameters.get("chunks", 8)
    log, scaled = parameters.get("relevance") != "linear", parameters.get("scale") != "none"
    chosen_all: list[int] = []
    for image in signals.images:
        tokens = image.tokens.tolist()
        most = max(magnitude[t] for t in tokens)
        raw = [math.log(magnitude[t]) if log else magnitude[t] / most for t in tokens]
        low, span = (min(raw), max(raw) - min(raw)) if scaled else (0.0, 1.0)
        relevance = {t: (r - low) / span for t, r in zip(tokens, raw, strict=True)}
        chosen: list[int] = []
        for chunk in range(chunks):
            size = image.budget * (chunk + 1) // chunks - image.budget * chunk // chunks
            score = {}
            for t in (t for t in tokens if t not in chosen):
                at = int(signals.visual[t])
                heads = parameters.get("key_heads", "mean")
                worst = max((slow_duplication(signals, at, int(signals.visual[c]), heads) for c in chosen), default=0.0)
                score[t] = relevance[t] - trade * worst
            chosen += sorted(score, key=lambda t: (-score[t], t))[:size]
        chosen_all += chosen
    return sorted(chosen_all)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"trade": 0.0},
        {"trade": 2.0, "chunks": 3},
        {"heads": "max", "queries": "last"},
        {"relevance": "linear", "chunks": 100},
        {"key_heads": "max", "trade": 2.0},
        {"scale": "none", "trade": 1.0},
        {"scale": "none", "relevance": "linear"},
    ],
    ids=str,
)
def test_formula(parameters: dict[str, Any]) -> None:
    signals = random_signals((4, 5), (2, 4), ratio=0.4, seed=4)
    queries = signals.question.tolist() if parameters.get("queries") != "last" else [signals.hidden.shape[0] - 1]
    magnitude = slow_magnitude(signals, queries, parameters.get("heads", "mean"))
    wanted = slow_selection(signals, magnitude, parameters)
    assert make_method("iwp", parameters).select(signals).keep.tolist() == wanted


def test_duplication_is_the_cosine_of_rank_one_matrices() -> None:
    """With kappa an inner product, S_ij is the cosine between phi(k_i)^T v_i and phi(k_j)^T v_j.

    Checked with a kernel whose feature map is finite: the exponential series of two-dimensional keys.
    """
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 5, 2, generator=generator) for _ in range(2))

    def phi(k: torch.Tensor) -> torch.Tensor:  # exp(a.b/s) = sum over degrees m of (a.b)^m / (s^m m!)
        scale, features = 2**0.25, []
        for degree in range(30):
            for power in range(degree + 1):
                weight = math.sqrt(1 / (math.factorial(power) * math.factorial(degree - power)))
                features.append(weight * float(k[0] / scale) ** power * float(k[1] / scale) ** (degree - power))
        return torch.tensor(features, dtype=torch.float64)

    updates = [torch.outer(phi(key[0, i]), value[0, i].double()) for i in range(5)]
    every = torch.arange(5)
    got = Updates.of(key, value).duplication(every, every, "mean")
    for i in range(5):
        for j in range(5):
            cosine = float((updates[i] * updates[j]).sum() / (updates[i].norm() * updates[j].norm()))
            assert float(got[i, j]) == pytest.approx(cosine, abs=1e-5)


def test_duplicates_leave_first() -> None:
    """Four copies of the strongest token: without the trade-off all stay, with it one does (per chunk of one)."""
    signals = random_signals((4, 5), ratio=0.2, seed=5)
    assert signals.key is not None
    assert signals.value is not None
    magnitude = slow_magnitude(signals, signals.question.tolist(), "mean")
    strongest = max(range(20), key=lambda i: magnitude[i])
    copies = [strongest, *[i for i in range(20) if i != strongest][:3]]
    for copy in copies:
        at, source = int(signals.visual[copy]), int(signals.visual[strongest])
        signals.key[:, at], signals.value[:, at] = signals.key[:, source], signals.value[:, source]
    object.__setattr__(signals, "rotate", lambda states: states)  # copies stay copies under RoPE here
    alone = make_method("iwp", {"trade": 0.0}).select(signals).keep.tolist()
    assert sorted(copies) == alone
    traded = make_method("iwp", {"trade": 5.0, "chunks": 4}).select(signals).keep.tolist()
    assert len(set(copies) & set(traded)) == 1


def test_extreme_logits_do_not_overflow() -> None:
    signals = random_signals((4, 5), ratio=0.5)
    assert signals.query is not None
    signals.query.mul_(1e4)
    assert make_method("iwp").select(signals).keep.numel() == 10


def test_keys_with_a_large_common_part() -> None:
    """Qwen2.5's key biases run into the hundreds; what tells keys apart must not drown in them."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(1, 40, 8, generator=generator), torch.randn(1, 40, 8, generator=generator)
    every = torch.arange(40)
    plain = Updates.of(key, value).duplication(every, every, "mean")
    shifted = Updates.of(key + 2000, value).duplication(every, every, "mean")
    assert torch.allclose(shifted, plain, atol=2e-3)
    assert torch.allclose(shifted.diagonal(), torch.ones(40), atol=1e-6)


@pytest.mark.parametrize("relevance", ["log", "linear"])
def test_a_token_without_value_or_with_nan_is_the_worst(relevance: str) -> None:
    signals = random_signals((4, 5), ratio=0.5, seed=6)
    assert signals.value is not None
    wanted = make_method("iwp", {"relevance": relevance, "trade": 0.0}).select(signals).keep.tolist()
    outside = [i for i in range(20) if i not in wanted]
    signals.value[:, int(signals.visual[outside[0]])] = 0
    signals.value[:, int(signals.visual[outside[1]])] = torch.nan
    for trade in (0.0, 0.5):
        kept = make_method("iwp", {"relevance": relevance, "trade": trade}).select(signals).keep.tolist()
        assert not {outside[0], outside[1]} & set(kept)
        if not trade:
            assert kept == wanted


def test_bad_parameters() -> None:
    for parameters in (
        {"layer": 0},
        {"chunks": 0},
        {"trade": -1.0},
        {"trade": math.nan},
        {"heads": "sum"},
        {"relevance": "rank"},
    ):
        with pytest.raises(ValueError, match="|".join(parameters)):
            make_method("iwp", parameters)
