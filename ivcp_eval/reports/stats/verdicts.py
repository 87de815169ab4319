"""The same questions under several conditions: right or wrong, and one condition against another."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ivcp_eval.reports.stats import PairedResult, paired_bootstrap

__all__ = ["Verdicts"]


@dataclass
class Verdicts:
    """Right or wrong, by condition, of the same questions in the same order.

    Attributes:
        clusters: picture of every question.
        scores: per condition the score in 0..1 of every question.
        recall: per condition the share of the target's tokens that survived, for every question.
    """

    clusters: list[str] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    recall: dict[str, list[float]] = field(default_factory=dict)

    def percent(self, condition: str) -> float:
        """Mean score in percent."""
        return 100 * float(np.mean(self.scores[condition]))

    def estimate(self, condition: str) -> str:
        """Mean score in percent with its interval, clustered by picture: ``96.8 % [95.7, 97.9]``."""
        found = paired_bootstrap([0.0] * len(self.clusters), self.scores[condition], self.clusters, scale=100)
        interval = found.difference_interval
        return f"{found.pruned:.1f} % [{interval.low:.1f}, {interval.high:.1f}]"

    def against(self, condition: str, reference: str) -> PairedResult:
        """``condition`` against ``reference`` in points, paired and clustered by picture."""
        return paired_bootstrap(self.scores[reference], self.scores[condition], self.clusters, scale=100)
