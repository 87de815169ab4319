"""Variants ranked by their difference to one of them, and the best of those that cost the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ivcp_eval.reports.comparison import ComparedRow

__all__ = ["SAME_COST", "best_at_equal_cost", "ranked"]

#: Shares of visual tokens, mean over layers, that differ by no more than this cost the same.
SAME_COST = 0.02


_ROUNDING = 1e-9


def ranked(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    """With ranks among the rows of the same benchmark and metric and their reference, whose difference is exactly 0.

    A variant ranks surely before another where its interval lies wholly above the other's. Intervals of differences to
    one reference that do not overlap belong to different variants with more than their 95 %.
    """
    with_ranks = []
    for row in rows:
        others = [other for other in rows if _place(other) == _place(row) and other is not row]
        ends = [(other.difference_low, other.difference_high) for other in others] + [(0.0, 0.0)]
        # Equal scores differ by rounding.
        better = sum(other.difference > row.difference + _ROUNDING for other in others) + (row.difference < -_ROUNDING)
        before = sum(low > row.difference_high for low, _ in ends)  # False where an interval is missing
        behind = sum(high < row.difference_low for _, high in ends)
        with_ranks.append(replace(row, rank=1 + better, rank_low=1 + before, rank_high=1 + len(others) + 1 - behind))
    return with_ranks


def best_at_equal_cost(rows: Sequence[ComparedRow], reference: str) -> list[str]:
    """One line per benchmark and metric: which of the variants that cost as much as the reference scores highest."""
    lines = []
    for place in dict.fromkeys(map(_place, rows)):
        here = [row for row in rows if _place(row) == place]
        cost = here[0].baseline_ratio_layer_mean
        alike = [row for row in here if abs(row.ratio_layer_mean - cost) <= SAME_COST + 1e-9]
        if math.isnan(cost):
            continue
        share = f"{cost:.2f} of the visual tokens, mean over layers"
        where = f"At the measured cost of {reference} ({share}), {' '.join(place[:3])}"
        best = max(alike, key=lambda row: row.difference, default=None)
        if best is None:
            lines.append(f"{where}: no other variant was measured.")
        elif best.difference <= _ROUNDING:
            lines.append(f"{where}: {reference} is best of {len(alike) + 1}.")
        else:
            sure = "significantly" if best.p_holm < 0.05 else "not significantly"
            lines.append(
                f"{where}: {best.variant} is best of {len(alike) + 1}, {sure} better ({best.difference:+.2f} "
                f"[{best.difference_low:+.2f}, {best.difference_high:+.2f}])."
            )
    return lines


def _place(row: ComparedRow) -> tuple[str, str, str, int | None]:
    return row.model, row.benchmark, row.metric, row.limit
