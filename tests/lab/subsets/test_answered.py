"""Losses of many subsets at once are those of pruning one by one, and a search on a real model finds better ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ivcp_eval.engine import prune
from ivcp_eval.interface import AbstractMethod, Cut, ModelFacts, Selection, Signals
from ivcp_eval.interface.registry import adapter
from ivcp_eval.lab.subsets.answered import Answered
from ivcp_eval.lab.subsets.evolution import Settings, search, token_groups
from ivcp_eval.lab.training.frozen import Encoded, Frozen


@dataclass(frozen=True)
class Given(AbstractMethod):
    """Keeps given tokens at the input."""

    tokens: tuple[int, ...] = ()

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(model.first_cut, ratio),)

    def select(self, signals: Signals) -> Selection:
        return Selection(torch.tensor(self.tokens), exact=False)


@pytest.fixture(scope="module")
def answered(frozen: Frozen, boxes: list[Encoded]) -> Answered:
    wired, family = adapter(frozen.weights.family), frozen.weights.family
    facts = wired.facts(frozen.model.config, family)
    return Answered.of(frozen.model, wired, facts, boxes[0].inputs, boxes[0].labels, boxes[0].layout)


def drawn(answered: Answered, count: int, budget: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = answered.visual.numel()
    return torch.stack([torch.randperm(n, generator=generator)[:budget].sort().values for _ in range(count)])


def test_all_tokens_cost_what_the_model_says(frozen: Frozen, boxes: list[Encoded], answered: Answered) -> None:
    with torch.no_grad():
        assert answered.whole_loss() == pytest.approx(float(frozen.answer_loss(boxes[0])), rel=1e-4)


def test_a_subset_costs_what_pruning_to_it_costs(frozen: Frozen, boxes: list[Encoded], answered: Answered) -> None:
    subsets = drawn(answered, 3, 20)
    together = answered.losses(subsets)
    for subset, loss in zip(subsets, together, strict=True):
        with torch.no_grad(), prune(frozen.model, Given(tuple(subset.tolist())), 0.5):
            assert float(frozen.answer_loss(boxes[0])) == pytest.approx(float(loss), rel=1e-4)
    assert len(set(together.tolist())) == 3


def test_budgets_and_question_are_those_that_a_method_sees(
    frozen: Frozen, boxes: list[Encoded], answered: Answered
) -> None:
    signals = frozen.signals(boxes[0], Given(), 0.25)
    assert [image.budget for image in answered.images(0.25)] == [image.budget for image in signals.images]
    assert answered.question.equal(signals.question)
    assert answered.embeddings.equal(signals.hidden[signals.visual])


def test_a_search_beats_random_subsets_on_a_real_model(frozen: Frozen, answered: Answered) -> None:
    groups = token_groups(answered.embeddings, frozen.model.get_input_embeddings().weight)
    settings = Settings(population=10, parents=3, generations=6)
    result = search(answered.losses, groups, 17, settings, torch.Generator().manual_seed(0))
    assert result.loss < float(answered.losses(drawn(answered, result.asked, 17, seed=1)).min())
    assert result.loss == pytest.approx(float(answered.losses(result.subset[None])), rel=1e-4)
