"""Evolutionary search for a subset of visual tokens under which a model answers well and that is diverse.

Paper: https://arxiv.org/abs/2604.17087 (EvoComp, labels of its compressor; q=48, p=12, L=10, crossover .9, mutation .2)

A population of subsets of exactly the budget is scored; the best are parents of the next one. Tokens are grouped by the
vocabulary entry that their embedding is most like, and a subset is better if it covers more groups.

Differs: no code is public. How groups enter is not said: here the first population goes round the groups, and a
subset's fitness is its loss plus ``diversity`` times the share of groups that it could cover and does not. What the
mutation rate counts is not said: here children, of which a share ``exchanged`` of the tokens gives way to others; so do
those of a child that was met before, as most children of few parents would be.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


TRIES = 4  # to change a child into one that was not met before; there may be none


@dataclass(frozen=True)
class Settings:
    """How to search; the first five defaults are the paper's.

    Attributes:
        population: q, subsets that are alive at once. parents: p, of them the best, which go on and have children.
        generations: L. crossover: probability that a child has two parents. mutation: that it is changed in any case.
        exchanged: share of a changed child's tokens that others take the place of.
        diversity: nats of loss that covering all groups is worth.
    """

    population: int = 48
    parents: int = 12
    generations: int = 10
    crossover: float = 0.9
    mutation: float = 0.2
    exchanged: float = 0.1
    diversity: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values that no search can mean."""
        if not 2 <= self.parents <= self.population or self.generations < 0:
            raise ValueError(
                f"population={self.population}, parents={self.parents}, generations={self.generations}: at least 2 "
                "parents, no more than the population, and 0 or more generations"
            )
        shares = (self.crossover, self.mutation, self.exchanged)
        if not all(0 <= share <= 1 for share in shares) or self.diversity < 0:
            raise ValueError(
                f"crossover={self.crossover}, mutation={self.mutation}, exchanged={self.exchanged} must be in 0..1, "
                f"diversity={self.diversity} 0 or more"
            )


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        subset: (K,) int64, increasing. loss: its loss in nats. covered: share of the groups it could cover.
        curve: the best fitness of the first population and after each generation; it never rises.
        asked: how many losses were computed.
    """

    subset: Tensor
    loss: float
    covered: float
    curve: tuple[float, ...]
    asked: int


def token_groups(embeddings: Tensor, vocabulary: Tensor) -> Tensor:
    """(N,) int64: which row of the vocabulary (W, E) each embedding (N, E) is most like, by cosine."""
    unit = torch.nn.functional.normalize(vocabulary.float(), dim=1)
    return (torch.nn.functional.normalize(embeddings.float(), dim=1) @ unit.T).argmax(dim=1)


def search(
    losses: Callable[[Tensor], Tensor], groups: Tensor, budget: int, settings: Settings, generator: torch.Generator
) -> Found:
    """The best subset met.

    Args:
        losses: (n, K) int64 increasing indices 0..N-1 -> (n,) losses.
        groups: (N,) int64 on CPU, the group of each token. budget: K. generator: on CPU; all chance comes from it.

    Raises:
        ValueError: a budget outside 1..N.
    """
    if not 1 <= budget <= groups.numel():
        raise ValueError(f"a budget of {budget} is outside 1..{groups.numel()}, the visual tokens there are")
    numbered = groups.unique(return_inverse=True)[1]
    possible = min(budget, int(numbered.max()) + 1)
    known: dict[bytes, float] = {}

    def fitness(subsets: Tensor) -> Tensor:
        keys = [subset.numpy().tobytes() for subset in subsets]
        new = {key: row for row, key in enumerate(keys) if key not in known}
        if new:
            found = losses(subsets[list(new.values())]).double().cpu().tolist()
            known.update(zip(new, found, strict=True))
        loss = torch.tensor([known[key] for key in keys], dtype=torch.float64)
        return loss + settings.diversity * (1 - covered(subsets, numbered) / possible)

    alive = torch.stack([_first(numbered, budget, generator) for _ in range(settings.population)])
    score = fitness(alive)
    curve = [float(score.min())]
    for _ in range(settings.generations):
        best = score.argsort(stable=True)[: settings.parents]
        parents, of_parents = alive[best], score[best]
        children = torch.stack(
            [
                _child(parents, known, numbered.numel(), settings, generator)
                for _ in range(settings.population - len(best))
            ]
            or [parents[0]]
        )
        alive, score = torch.cat((parents, children)), torch.cat((of_parents, fitness(children)))
        curve.append(float(score.min()))
    winner = alive[int(score.argmin())]
    share = float(covered(winner[None], numbered)) / possible
    return Found(winner, known[winner.numpy().tobytes()], share, tuple(curve), len(known))


def covered(subsets: Tensor, numbered: Tensor) -> Tensor:
    """(n,) float64: how many groups, numbered from 0, the subsets (n, K) hold."""
    there = torch.zeros(len(subsets), int(numbered.max()) + 1, dtype=torch.float64)
    return there.scatter_(1, numbered[subsets], 1.0).sum(dim=1)


def _first(numbered: Tensor, budget: int, generator: torch.Generator) -> Tensor:
    """A random subset that goes round the groups: none has two tokens more than another that still has tokens."""
    order = torch.randperm(numbered.numel(), generator=generator)
    ranks = torch.zeros_like(order)
    for group in numbered.unique().tolist():
        own = order[numbered[order] == group]
        ranks[own] = torch.arange(own.numel())
    # Ties of the round are broken by the random order.
    return order[ranks[order].argsort(stable=True)[:budget]].sort().values


def _child(parents: Tensor, known: Container[bytes], n: int, settings: Settings, generator: torch.Generator) -> Tensor:
    """One subset of the parents' size; most likely none of those ``known``."""
    budget = parents.shape[1]
    one, other = torch.randperm(len(parents), generator=generator)[:2].tolist()
    taken = torch.zeros(n, dtype=torch.bool)
    taken[parents[one]] = True
    if _happens(settings.crossover, generator):
        mixed = torch.zeros(n, dtype=torch.bool)
        mixed[parents[other]] = True
        both, either = taken & mixed, (taken ^ mixed).nonzero().flatten()
        filled = either[torch.randperm(either.numel(), generator=generator)[: budget - int(both.sum())]]
        taken = both
        taken[filled] = True
    child = taken.nonzero().flatten()
    changed = _happens(settings.mutation, generator)
    for _ in range(TRIES):
        if not changed and child.numpy().tobytes() not in known:
            break
        outside = (~taken).nonzero().flatten()
        moved = min(max(1, round(settings.exchanged * budget)), outside.numel())
        taken[child[torch.randperm(budget, generator=generator)[:moved]]] = False
        taken[outside[torch.randperm(outside.numel(), generator=generator)[:moved]]] = True
        child, changed = taken.nonzero().flatten(), False
    return child


def _happens(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability
