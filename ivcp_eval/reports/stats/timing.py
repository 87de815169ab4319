"""How much faster or slower a variant is: ratios of times of the same sample, measured side by side in one session.

``timing.json`` lies beside the journal of a cell: ``{"session": ..., "samples": [{"index": ..., "prefill_ms": ...,
"decode_ms_per_token": ..., "end_to_end_ms": ...}, ...], "baseline": [the unpruned model's, of the same session]}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ivcp_eval.files import damage_as_clear_error, read_json

__all__ = ["STAGES", "TimeRatio", "Timings", "paired_ratio", "read_timings", "saving_in_words", "time_ratios"]

NO_TIME = "no time saved"
#: A share of visual tokens up to which a variant counts as saving some.
_SAVES = 0.95

#: Stage as tables name it -> field of a timed sample, in milliseconds.
STAGES = {
    "prefill": "prefill_ms",
    "first_token": "first_token_ms",
    "decode": "decode_ms_per_token",
    "end_to_end": "end_to_end_ms",
}


@dataclass(frozen=True)
class Timings:
    """The timed samples of one cell.

    Attributes:
        session: what ran side by side has the same one. samples: index -> field -> milliseconds; a sample that was
            timed several times has the geometric mean. baseline: those of the unpruned model in the same session; empty
            if it was not timed then.
    """

    session: str
    samples: Mapping[str, Mapping[str, float]]
    baseline: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def of_baseline(self) -> Timings | None:
        """What the variant is to be compared with, whatever was timed since."""
        return Timings(self.session, self.baseline) if self.baseline else None


@dataclass(frozen=True)
class TimeRatio:
    """Time of the variant / time of the baseline; below 1 is faster.

    Attributes:
        ratio: geometric mean over samples, NaN if there is none. low, high: its 95 % interval, NaN below two samples.
        n: samples timed on both sides.
    """

    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0


def read_timings(path: Path) -> Timings | None:
    """The content of a ``timing.json``; None if there is no such file.

    Raises:
        DamagedError: it is no such file.
    """
    if not path.is_file():
        return None
    advice = "remove it and run again to time anew"
    content = read_json(path, advice)
    with damage_as_clear_error(path, advice):
        session, own, baseline = (str(content["session"]), content["samples"], content.get("baseline", []))
        return Timings(session, _means(own), _means(baseline))


def _means(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    logs = _logs(samples)
    return {i: {name: math.exp(np.mean(v)) for name, v in fields.items()} for i, fields in logs.items()}


def _logs(samples: list[dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Logarithms of the times by index and field; what was not measured (None, 0) is left out."""
    logs: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        fields = logs.setdefault(str(sample["index"]), {})
        for name in STAGES.values():
            if sample.get(name):
                fields.setdefault(name, []).append(math.log(sample[name]))
    return logs


def time_ratios(baseline: Timings | None, variant: Timings | None) -> dict[str, TimeRatio]:
    """The ratio of every stage; none of times that were not measured in one session."""
    if baseline is None or variant is None or baseline.session != variant.session:
        return {stage: TimeRatio() for stage in STAGES}
    ratios = {}
    for stage, name in STAGES.items():
        before, after = (
            {index: fields[name] for index, fields in side.samples.items() if name in fields}
            for side in (baseline, variant)
        )
        ratios[stage] = paired_ratio(before, after)
    return ratios


def paired_ratio(baseline: Mapping[str, float], variant: Mapping[str, float], level: float = 0.95) -> TimeRatio:
    """Geometric mean of variant / baseline over the samples that both have, with Student's interval of its logarithm.

    Args:
        baseline, variant: index of a sample -> time > 0, in one unit.
        level: of the interval.
    """
    from scipy import special

    logs = np.array([math.log(variant[index] / baseline[index]) for index in baseline if index in variant])
    if logs.size < 2:
        return TimeRatio(math.exp(logs[0]) if logs.size else math.nan, n=logs.size)
    half = special.stdtrit(logs.size - 1, (1 + level) / 2) * logs.std(ddof=1) / math.sqrt(logs.size)
    mean = logs.mean()
    return TimeRatio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), logs.size)


def saving_in_words(kept: float, times: Mapping[str, TimeRatio]) -> str:
    """Tokens saved and time saved are two things; empty where no tokens are saved.

    Args:
        kept: share of the visual tokens, mean over layers. times: by stage.
    """
    if not kept <= _SAVES:
        return ""
    saved = f"{100 * (1 - kept):.0f} % of the tokens saved"
    stage, name = next(((s, n) for s, n in _FIRST.items() if not math.isnan(times.get(s, TimeRatio()).ratio)), ("", ""))
    if not stage:
        return f"{saved}; no time was measured"
    first, whole = times[stage], times.get("end_to_end", TimeRatio())
    if math.isnan(first.high):
        return f"{saved}; one timed sample does not say whether time is"
    if first.high >= 1:
        return f"{saved} but {NO_TIME}" + (f": {name} is slower" if first.low > 1 else f" in {name}")
    words = f"{saved}, {100 * (1 - first.ratio):.0f} % of the time of {name} saved"
    if math.isnan(whole.high) or whole.high < 1:
        return words
    return f"{words}, but {NO_TIME} end to end" + (", which is slower" if whole.low > 1 else "")


#: Stage that pruning makes faster first -> in words; a server shows the first token only.
_FIRST = {"prefill": "the prefill", "first_token": "the first token"}
