"""Is a loss below a margin? One-sided tests of one metric, and how many samples would decide."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LossTest", "clusters_to_decide", "loss_test"]


@dataclass(frozen=True)
class LossTest:
    """Whether a loss is below a margin, both ways; unit of the scores.

    Attributes:
        p_not_worse: of a loss of the margin or more, if small it is refuted. p_worse: of a loss of the margin or less.
        lowest: lower end of the one-sided interval of the difference; the loss is refuted where it lies above -margin.
        error: standard error that the tests use.
    """

    p_not_worse: float
    p_worse: float
    lowest: float
    error: float


def loss_test(
    difference: float, standard_error: float, n_clusters: int, margin: float, scale: float, alpha: float
) -> LossTest | None:
    """Student's tests of difference (pruned - baseline) against -margin; None where nothing can be tested.

    The standard error is never taken below that of a loss of exactly the margin by whole answers,
    sqrt(margin * (scale - margin) / clusters): where hardly any answer changed, the data's own is too small, and says 0
    where none did. With no change at all this is close to the rule of three.

    Args:
        standard_error: bootstrap's, over clusters. n_clusters: independent ones. margin: > 0. scale: largest score.
        alpha: one-sided level of ``lowest``.
    """
    from scipy import special

    if n_clusters < 2 or math.isnan(standard_error):
        return None
    # The bootstrap divides by n where the sample deviation divides by n - 1.
    own = standard_error * math.sqrt(n_clusters / (n_clusters - 1))
    error = max(own, math.sqrt(margin * max(scale - margin, 0) / n_clusters))
    t = (difference + margin) / error
    return LossTest(
        float(special.stdtr(n_clusters - 1, -t)),
        float(special.stdtr(n_clusters - 1, t)),
        difference - float(special.stdtrit(n_clusters - 1, 1 - alpha)) * error,
        error,
    )


def clusters_to_decide(
    difference: float, error: float, n_clusters: int, margin: float, alpha: float, power: float = 0.8
) -> float:
    """Clusters with which a true difference as large as the observed one is decided; inf at the margin itself."""
    from scipy import special

    distance = abs(difference + margin)
    if distance == 0:
        return math.inf
    return n_clusters * ((special.ndtri(1 - alpha) + special.ndtri(power)) * error / distance) ** 2
