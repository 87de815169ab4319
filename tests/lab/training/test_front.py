"""What was learned beside what a search found."""

from __future__ import annotations

import pytest

from ivcp_eval.lab.training.front import Learned, compare


def candidate(layer: int, asked: float, score: float, method: str = "fastv", budget: str = "flops") -> dict[str, str]:
    return {
        **{"method": method, "parameters": f'{{"layer": {layer}}}', "ratio": "0.3", "budget": budget, "n": "40"},
        **{"asked": str(asked), "score": str(score), "difference": str(score - 90)},
        **{"difference_low": str(score - 95), "difference_high": str(score - 85)},
    }


def test_each_budget_has_the_best_layer_and_the_learned_one() -> None:
    tuned = [candidate(1, 0.5, 60), candidate(3, 0.5, 80), candidate(4, 0.5, 70), candidate(1, 0.4, 55)]
    tuned += [candidate(2, 0.5, 99, method="random"), candidate(2, 0.4, 99, budget="layer_mean")]
    rows = compare(tuned, lambda flops: Learned(3.4, 0.2, 4 if flops == 0.5 else None, flops))
    assert [row["flops"] for row in rows] == [0.5, 0.4]
    first, second = rows
    assert (first["grid_layer"], first["grid_score"], first["learned_layer"], first["learned_score"]) == (3, 80, 4, 70)
    assert (first["rank"], first["of"], first["learned_low"], first["learned_high"]) == (2, 3, 65, 75)
    assert (second["grid_layer"], second["learned_layer"], second["learned_score"], second["rank"]) == (1, "", "", "")


def test_a_search_without_fastv_is_refused() -> None:
    with pytest.raises(ValueError, match="--methods fastv"):
        compare([candidate(2, 0.5, 99, method="random")], lambda _: Learned(1, 1, 1, 1))
