"""Oracle: rounds of ToMe's matching written out, groups as lists. One round is ToMe's own (oracle/tome.py)."""

from __future__ import annotations

import pytest
import torch

from ivcp_eval.interface import Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_signals


def rounds(signals: Signals, first: int, n: int, budget: int) -> dict[int, list[int]]:
    """Of one image, place -> the tokens that are merged there, both counted in the image."""
    key = signals.vision["key"][first : first + n].double()
    groups = {token: [token] for token in range(n)}
    while len(groups) > budget:
        places = sorted(groups)
        mean = {place: key[members].mean(dim=0) for place, members in groups.items()}
        odd = places[1::2]
        found = []
        for place in places[::2]:
            cosines = [float(torch.nn.functional.cosine_similarity(mean[place], mean[other], dim=0)) for other in odd]
            if cosines:
                found.append((-max(cosines), place, odd[cosines.index(max(cosines))]))
        for _, place, other in sorted(found)[: min(len(groups) // 2, len(groups) - budget)]:
            groups[other] += groups.pop(place)
    return groups


@pytest.mark.parametrize("seed", [5, 6, 7])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.8])
def test_rounds(ratio: float, seed: int) -> None:
    """At 0.1 a round merges groups of unequal sizes, whose keys weigh by these."""
    signals = random_signals((5, 7), (2, 3), ratio=ratio, seed=seed)
    selection = make_method("tome_post").select(signals)
    selection.check(signals, "tome_post")
    wanted = torch.zeros(signals.budget, 41)
    kept, first = [], 0
    for image in signals.images:
        groups = rounds(signals, first, image.n_prompt, image.budget)
        for place in sorted(groups):
            members = [first + member for member in groups[place]]
            wanted[len(kept), members] = 1 / len(members)
            kept.append(first + place)
        first += image.n_prompt
    assert selection.keep.tolist() == kept
    assert selection.merge is not None
    torch.testing.assert_close(selection.merge.to_dense(), wanted)
