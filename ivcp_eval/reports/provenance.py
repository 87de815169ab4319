"""Which rows belong together, which is whose baseline, and may the two be compared: what differs between them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from ivcp_eval import benchmarks
from ivcp_eval.interface.models import unquantised
from ivcp_eval.interface.variants import BASELINE, OWN, Server
from ivcp_eval.reports.table import KEY, Row, row_key

if TYPE_CHECKING:
    from ivcp_eval.reports.comparison import ComparedRow

__all__ = [
    "AGAIN",
    "CHOSEN",
    "PLACED",
    "REFUSED",
    "VARIANT",
    "Against",
    "Group",
    "NotComparable",
    "Reference",
    "Selection",
    "Telling",
    "baseline_of",
    "candidates",
    "described",
    "differences",
    "finished_headline",
    "grouped",
    "label",
    "merged",
    "one_reference",
    "remarks",
    "sample_differences",
    "settings",
    "telling_parameters",
    "unknown_provenance",
    "variant_key",
    "why_none",
]

#: Method of the rows that answer the baseline a second time.
AGAIN = "again"
#: Against this, rows of quantised models are compared with the unpruned model of full weights.
FULL = "full"
REFUSED = (
    "judge",
    "vlmeval_version",
    "prompt_sha256",
    "min_pixels",
    "max_pixels",
    "max_new_tokens",
    "generation",
    "video",
    "benchmark_sha256",
    "limit",
    "revision",
    "trained_weights",
)
"""Columns whose difference changes scores by itself, so that a comparison would blame or praise the pruning for it."""

#: Of `REFUSED`, what is a server's own and not known here, or sent to it in other words.
_UNKNOWN_OF_SERVERS = ("revision", "trained_weights", "min_pixels", "max_pixels", "generation")

_REMARKED = (
    "checkpoint",
    "quantised",
    "dtype",
    "device",
    "attention",
    "torch_version",
    "transformers_version",
    "ivcp_commit",
)
#: Where and how a run was computed: rows that differ here alone are shown with it.
PLACED = ("dtype", "attention", "device", "video")
#: What `variant_key` reads, the names of its columns in exports.
VARIANT = ("model", "benchmark", "limit", "metric", "method", "method_parameters", "ratio_asked", "budget", *PLACED)
_MEASURED = (
    *("score", "ratio_method", "ratio_kept_final", "ratio_layer_mean", "ratio_kv_cache", "ratio_flops"),
    *("ratio_kv_analytic", "ratio_flops_analytic"),
    *("visual_tokens_prompt_mean", "new_tokens_mean"),
)


class NotComparable(ValueError):
    """There is nothing to compare, the settings differ, or several baselines fit; the message says which and why."""


Group = tuple[Row, ...]
"""Rows of one variant, benchmark and metric that differ in their seed only; most have one row."""


@dataclass(frozen=True)
class Reference:
    """A pruned variant as the baseline.

    Attributes:
        method: its method. parameters: all of them; None for whatever the file has.
        ratio: the share that it asked for; None: that, and the budget, of the row that is compared with it.
    """

    method: str
    parameters: Mapping[str, Any] | None = None
    ratio: float | None = None

    def fits(self, row: Row) -> bool:
        """Whether a row is of this variant; without a ratio of its own, at any."""
        given = json.loads(row["method_parameters"] or "{}")
        same_ratio = self.ratio in (None, row["ratio_asked"])
        same_parameters = self.parameters is None or given == self.parameters
        return bool(row["method"] == self.method and same_ratio and same_parameters)


#: Columns of a row that a user may ask for by their values, as options of these names.
CHOSEN = ("seed", "dtype", "attention", "device")


@dataclass(frozen=True)
class Selection:
    """Which pruned rows a user asks for; None is any.

    Attributes:
        method, ratio: of the row. budget: kind that it holds; "own" for none. parameters: of the method; those that are
            not among them are its usual ones. limit: of the run; 0 for none. benchmarks: their names.
        seed, dtype, attention, device: of the row, as `CHOSEN` has them.
    """

    method: str | None = None
    ratio: float | None = None
    budget: str | None = None
    parameters: Mapping[str, Any] | None = None
    limit: int | None = None
    benchmarks: Collection[str] | None = None
    seed: int | None = None
    dtype: str | None = None
    attention: str | None = None
    device: str | None = None

    def fits(self, row: Row) -> bool:
        """Whether a row is among them."""
        given = json.loads(row["method_parameters"] or "{}")
        kind = row["budget"].partition("(")[0] or OWN
        # Through JSON, as the file has them.
        parameters = json.loads(json.dumps(dict(self.parameters or {})))
        unusual = set(row["set_parameters"].split()) if self.parameters is not None else set()
        return bool(
            self.method in (None, row["method"])
            and self.ratio in (None, row["ratio_asked"])
            and self.budget in (None, kind)
            and self.limit in (None, row["limit"] or 0)
            and (self.benchmarks is None or row["benchmark"] in self.benchmarks)
            and all(getattr(self, name) in (None, row[name]) for name in CHOSEN)
            and unusual <= parameters.keys()
            and all(name in given and given[name] == value for name, value in parameters.items())
        )


Against = Literal["none", "same_method", "full"] | str | Reference
"""Which rows are the baseline; any other text is METHOD, or METHOD:RATIO for one variant."""


def finished_headline(row: Row) -> bool:
    """Whether a row is finished and of its benchmark's headline metric."""
    return bool(row["status"] == "ok" and row["metric"] == benchmarks.headline(row))


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Seeds of one variant put together, in the order of the rows; unfinished rows stay apart from finished ones."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (value for name, value in zip(KEY, row_key(row), strict=True) if name != "seed")
        name = *key, *(row[column] for column in (*REFUSED, "status"))
        copies = 0  # of this seed: they are no seeds of one variant
        while row["seed"] in [other["seed"] for other in groups.get((*name, copies), ())]:
            copies += 1
        groups.setdefault((*name, copies), []).append(row)
    return [tuple(group) for group in groups.values()]


def merged(group: Group) -> Row:
    """One row for a group: means over the seeds of what was measured, the rest as in the first; ``seed`` is None."""
    if len(group) == 1:
        return group[0]
    means = {}
    for name in _MEASURED:
        values = [row[name] for row in group]
        means[name] = None if None in values else fmean(values)
    return {**group[0], **means, "seed": None}


Telling = Mapping[tuple[str, str, str], Collection[str]]
"""Parameters to be stated beside those that a row's variant set, by what else names it (`_named`).

Under a model and two empty texts stand the columns of `PLACED` to be stated of each of its rows.
"""


def telling_parameters(rows: Iterable[Row]) -> Telling:
    """The parameters that tell variants apart of which the same parameters were set to the same values.

    There are none but where defaults changed in between, and in files that do not say what was set. Likewise `PLACED`,
    where a file has answers to the same questions that were computed in several ways.
    """
    rows = list(rows)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        parameters = json.loads(row["method_parameters"] or "{}")
        others = groups.setdefault(_named(row), [])
        others += [] if parameters in others else [parameters]
    missing = object()
    return _placed(rows) | {
        named: [
            name
            for name in dict.fromkeys(name for one in several for name in one)
            if any(one.get(name, missing) != several[0].get(name, missing) for one in several)
        ]
        for named, several in groups.items()
    }


def _is_placed(row: Row) -> bool:
    """Whether `PLACED` may tell a row: not of published ones, of servers', and of those that differ by intent."""
    return not row["source"] and not row["served"] and row["method"] != AGAIN


def _placed(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[str]]:
    values: dict[tuple[str, str], set[tuple[Any, ...]]] = {}
    for row in rows:
        if _is_placed(row):
            values.setdefault((row["model"], row["benchmark"]), set()).add(tuple(row[name] for name in PLACED))
    found: dict[tuple[str, str, str], list[str]] = {}
    for (model, _), several in values.items():
        names = [name for name, of in zip(PLACED, zip(*several, strict=True), strict=True) if len(set(of)) > 1]
        known = found.setdefault((model, "", ""), [])
        known += [name for name in names if name not in known]
    return found


def _named(row: Row) -> tuple[str, str, str]:
    """Model, method, and what was set."""
    return row["model"], row["method"], _stated(row, row["set_parameters"].split())


def variant_key(row: Row | ComparedRow) -> tuple[Any, ...]:
    """What tells a variant on a benchmark from others, seeds apart; equal for a row and for what became of it.

    What is missing is None in a row and may be NaN in a compared one, which equals nothing: here both are None.
    """
    values = row if isinstance(row, Mapping) else vars(row)
    return tuple(None if values[name] != values[name] else values[name] for name in VARIANT)


def settings(row: Row, telling: Telling) -> str:
    """``layer=3, ivc=0.0``: the parameters that the row's variant set, and those that tell it from others.

    The usual variant has an empty text, whatever other variants there are. An empty value says that a parameter was
    not set.
    """
    placed = telling.get((row["model"], "", ""), ()) if _is_placed(row) else ()
    stated = _stated(row, {*row["set_parameters"].split(), *telling.get(_named(row), ())})
    return ", ".join([*([stated] if stated else []), *(f"{name}={row[name]}" for name in placed if row[name])])


def _stated(row: Row, names: Collection[str]) -> str:
    parameters = json.loads(row["method_parameters"] or "{}")
    return ", ".join(f"{n}={_plain(value)}" for n, value in parameters.items() if n in names and value != "")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _empty(value: Any) -> bool:
    return value is None or value == ""


def _shown(value: Any) -> str:
    text = "empty" if _empty(value) else str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _unequal(baseline: Mapping[str, Any], pruned: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    published = bool(baseline["source"] or pruned["source"])
    if _half_served(baseline, pruned):
        columns = [name for name in columns if name not in _UNKNOWN_OF_SERVERS]
    lines = []
    for name in columns:
        before, after = baseline[name], pruned[name]
        # In an own row an empty cell is a statement (the default); in a published one it is ignorance, and so are
        # generation parameters, which were not noted at first.
        ignorance = (published or name == "generation") and (_empty(before) or _empty(after))
        if before != after and not ignorance:
            lines.append(f"{name}: baseline {_shown(before)}, results {_shown(after)}")
    return lines


def differences(baseline: Row, pruned: Row) -> list[str]:
    """What forbids the comparison, one line per column; empty if nothing does."""
    return _unequal(baseline, pruned, REFUSED)


def remarks(baseline: Row, pruned: Row) -> list[str]:
    """What differs and may matter, but does not forbid the comparison."""
    lines = _unequal(baseline, pruned, _REMARKED)
    if _half_served(baseline, pruned):
        served = json.loads(pruned["served"] or baseline["served"])["base_url"]
        unknown = ", ".join(_UNKNOWN_OF_SERVERS)
        lines.append(f"one side is answered by a server ({served}), whose {unknown} may be others than those here")
    elif baseline["served"] and pruned["method"] != AGAIN and _server(baseline).target == _server(pruned).target:
        url = _server(pruned).base_url
        lines.append(f"nothing but chance: one server answers both, asked in the same way ({url})")
    return lines


def _server(row: Row) -> Server:
    return Server.of(json.loads(row["served"]))


def _half_served(baseline: Mapping[str, Any], pruned: Mapping[str, Any]) -> bool:
    """Whether one of the two rows was answered by a server, and the other here."""
    return bool(baseline["served"]) != bool(pruned["served"])


def unknown_provenance(baseline: Row, pruned: Row) -> list[str]:
    """Columns of `REFUSED` that a published row does not state, so that nobody can check them."""
    if not (baseline["source"] or pruned["source"]):
        return []
    return [name for name in REFUSED if _empty(baseline[name]) != _empty(pruned[name])]


def sample_differences(baseline: Mapping[str, Collection[Any]], pruned: Mapping[str, Collection[Any]]) -> list[str]:
    """What is not the same question; both sides are columns of the same samples in the same order."""
    lines = []
    for name, what in (("prompt_sha256", "prompts"), ("answer", "true answers")):
        sides = zip(baseline["index"], baseline[name], pruned[name], strict=True)
        unequal = [index for index, one, other in sides if one != other and not (_empty(one) or _empty(other))]
        if unequal:
            n = len(baseline["index"])
            lines.append(f"{what} of {len(unequal)} of {n} samples differ, e.g. index {unequal[0]}")
    return lines


def candidates(results: Sequence[Row], baselines: Sequence[Row], against: Against, *, own: bool) -> list[Row]:
    """Rows to compare: pruned ones that are not the baseline themselves, and with a foreign file unpruned ones too."""
    if against == FULL:
        return [row for row in results if unquantised(row["model"])[1] and row["method"] != AGAIN]
    if own or against not in ("none", "same_method"):
        reference = _reference(against)
        unpruned = (BASELINE, AGAIN) if reference else (BASELINE,)
        return [r for r in results if r["method"] not in unpruned and not (reference and reference.fits(r))]
    known = {row["run_id"] for row in baselines if row["run_id"]}
    return [row for row in results if row["method"] != BASELINE or row["run_id"] not in known]


def _reference(against: Against) -> Reference | None:
    if isinstance(against, Reference):
        return against
    if against in ("none", "same_method", FULL):
        return None
    method, colon, ratio = against.partition(":")
    try:
        return Reference(method, ratio=float(ratio) if colon else None)
    except ValueError:
        raise NotComparable(f"{against!r} is not METHOD or METHOD:RATIO, e.g. ivc_prune:0.5") from None


def one_reference(against: Against) -> bool:
    """Whether all rows are compared with one variant, at one ratio."""
    reference = _reference(against)
    return reference is not None and reference.ratio is not None


def described(against: Against) -> str:
    """The baseline rows in words."""
    words = {
        "none": "unpruned rows",
        "same_method": "rows of the same method",
        FULL: "unpruned rows of weights that are not quantised",
    }
    reference = _reference(against)
    if reference is None:
        return words[str(against)]
    return f"{reference.method} rows" if reference.ratio is None else f"{reference.method} {reference.ratio:g}"


def label(row: Row) -> str:
    """A row's name in messages."""
    ratio = "" if row["ratio_asked"] is None or row["method"] == BASELINE else f" {row['ratio_asked']:g}"
    budget = f" of {row['budget']}" if row["budget"] else ""
    limit = f" (first {row['limit']})" if row["limit"] else ""
    return f"{row['model']} {row['benchmark']} {row['metric']} {row['method']}{ratio}{budget}{limit}"


def why_none(results: Sequence[Row]) -> str:
    """Why no row is to be compared: there is no pruned one, or none that was asked for; then what there is."""
    pruned = [row for row in results if row["method"] != BASELINE]
    if not pruned:
        return "no pruned row"
    telling = telling_parameters(results)
    names = list(dict.fromkeys(f"{label(merged(g))} {settings(g[0], telling)}".strip() for g in grouped(pruned)))
    more = f"\n    ... and {len(names) - 20} more" if len(names) > 20 else ""
    return "no row is the one asked for; there are:\n    " + "\n    ".join(names[:20]) + more


def _lacking(row: Row, baselines: Sequence[Group]) -> str:
    """Of model, benchmark and metric the first that the baseline file has not, and what it has; or nothing."""
    rows = [g[0] for g in baselines]
    for name in ("model", "benchmark", "metric"):
        there = sorted({r[name] for r in rows})
        if row[name] not in there:
            return f"; the baseline file knows the {name}s {', '.join(there) or 'none'}"
        rows = [r for r in rows if r[name] == row[name]]
    return ""


def _variants(baselines: Sequence[Group]) -> str:
    """The pruned variants that a reference can name."""
    pruned = [g[0] for g in baselines if g[0]["method"] not in (BASELINE, AGAIN) and g[0]["ratio_asked"] is not None]
    names = dict.fromkeys(f"{row['method']}:{row['ratio_asked']:g}" for row in pruned)
    return f"; the baseline file has {', '.join(names) or 'no pruned row'}"


def baseline_of(group: Group, baselines: Sequence[Group], against: Against) -> Group | str:
    """The one baseline of a group, or why there is none. Raises NotComparable if there are several that fit equally."""
    row = group[0]
    unpruned = {**row, "model": unquantised(row["model"])[0]} if against == FULL else row
    same = [g for g in baselines if all(g[0][name] == unpruned[name] for name in ("model", "benchmark", "metric"))]
    reference = _reference(against)
    if against in ("none", FULL):
        same = [g for g in same if g[0]["method"] == BASELINE]
    else:
        if reference is None or reference.ratio is None:
            same = [g for g in same if all(g[0][name] == row[name] for name in ("ratio_asked", "budget"))]
        same = [g for g in same if (reference.fits(g[0]) if reference else g[0]["method"] == row["method"])]
    finished = [g for g in same if g[0]["status"] == "ok"]
    if not finished:
        if same:
            return f"its baseline is {same[0][0]['status']} ({same[0][0]['reason']})"
        what = "baseline row"
        if reference:
            what = f"row of {described(against) if reference.ratio else f'{reference.method} at the same cost'}"
        return f"no {what}{_lacking(unpruned, baselines) or (_variants(baselines) if reference else '')}"
    alike = [g for g in finished if not differences(g[0], row)]
    chosen = alike or finished
    # Then who was computed most alike, so that another dtype's baseline is taken for want of an own one alone.
    least = min(len(_unequal(g[0], row, _REMARKED)) for g in chosen)
    chosen = [g for g in chosen if len(_unequal(g[0], row, _REMARKED)) == least]
    # Of a server and the model here, that which answers where the row's own answers come from.
    chosen = [g for g in chosen if not _half_served(g[0], row)] or chosen
    if len(chosen) > 1:
        unequal = [name for name in row if len({str(g[0][name]) for g in chosen}) > 1]
        raise NotComparable(
            f"{len(chosen)} baseline rows fit {label(row)}; they differ in {', '.join(unequal) or 'nothing'}. "
            "Keep one of them in the baseline file."
        )
    return chosen[0]
