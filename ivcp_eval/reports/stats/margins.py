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
        difference: pruned - baseline. error: its standard error, as the tests use it. n_clusters: independent ones.
    """

    p_not_worse: float
    p_worse: float
    difference: float
    error: float
    n_clusters: int

    def lowest(self, alpha: float) -> float:
        """Lower end of the difference's one-sided interval; above -margin where ``p_not_worse`` is below ``alpha``."""
        return self.difference - self._reach(alpha)

    def highest(self, alpha: float) -> float:
        """Upper end of the difference's one-sided interval; below -margin where ``p_worse`` is below ``alpha``."""
        return self.difference + self._reach(alpha)

    def _reach(self, alpha: float) -> float:
        from scipy import special

        return float(special.stdtrit(self.n_clusters - 1, 1 - alpha)) * self.error


def loss_test(
    difference: float, standard_error: float, n_clusters: int, margin: float, scale: float
) -> LossTest | None:
    """Student's tests of difference (pruned - baseline) against -margin; None where nothing can be tested.

    The standard error is never taken below that of a loss of exactly the margin by whole answers,
    sqrt(margin * (scale - margin) / clusters): where hardly any answer changed, the data's own is too small, and says 0
    where none did. With no change at all this is close to the rule of three.

    Args:
        standard_error: bootstrap's, over clusters. n_clusters: independent ones. margin: > 0. scale: largest score.

    Raises:
        ValueError: the margin is not positive.
    """
    from scipy import special

    if not margin > 0:
        raise ValueError(f"the margin must be above 0 (what loss would you accept?), got {margin!r}")
    if n_clusters < 2 or math.isnan(standard_error):
        return None
    # The bootstrap divides by n where the sample deviation divides by n - 1.
    own = standard_error * math.sqrt(n_clusters / (n_clusters - 1))
    error = max(own, math.sqrt(margin * max(scale - margin, 0) / n_clusters))
    t = (difference + margin) / error
    return LossTest(
        float(special.stdtr(n_clusters - 1, -t)),
        float(special.stdtr(n_clusters - 1, t)),
        difference,
        error,
        n_clusters,
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
