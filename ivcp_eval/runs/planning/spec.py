"""A sweep file: what is to be measured, checked before anything runs. No torch.

    models: [qwen25, internvl25]            # or a mapping of name to a local folder, or to {path, served, quantise}
    benchmarks: [matrix]                    # names or groups
    methods:
      - method: ivc_prune                   # or the path of a file with a class `Method`: ./mine.py
        ratios: [0.75, 0.5, 0.25]
        parameters: {layer: [14, 16]}        # a list is a grid; write [[...]] for one value that is a list
        seeds: [0, 1]                       # of a method that draws; left out: as many as it declares
        models: [qwen25]                    # only these; also `benchmarks`
        served: {base_url: URL, model: NAME}  # a server that was started to prune answers (docs/design/served.md)
        budget: layer_mean                  # what its ratios are shares of; also sweep-wide (docs/sweeps.md)
    exclude:
      - {method: ivc_prune, benchmark: MME}
    judge: gpt-4o                           # and every other option of `options.py`

The unpruned baseline of every model and benchmark is always part. So are the controls (random, uniform, ...; of videos
also fewer_frames and the like) at every ratio or budget at which a model's other methods meet a benchmark, unless the
file lists them itself or chooses some by ``controls: [random]`` or none by ``controls: []``. ``controls: [again]``
answers the baseline a second time, each sample alone: what differs then is the noise floor of every comparison. A
control's own parameters are written as a method's, ``controls: [again, {method: again, parameters: {attention: eager,
dtype: [bfloat16, float16]}}]``: the baseline a second time with another kernel, and in other data types.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ivcp_eval import benchmarks, files, vlmeval_bridge
from ivcp_eval.interface import AbstractMethod, models
from ivcp_eval.interface.marked import Marked, Place, SpecError
from ivcp_eval.interface.registry import absolute, make_method, method_names, name_of, unknown
from ivcp_eval.interface.variants import BASELINE, OWN, CostTarget, Server, Variant
from ivcp_eval.methods._cards import control_names
from ivcp_eval.runs.planning.finished import eval_state
from ivcp_eval.runs.planning.options import Options
from ivcp_eval.runs.planning.options import check as check_option

__all__ = ["Spec", "SpecError", "check", "load"]

_OPTIONS = tuple(field.name for field in dataclasses.fields(Options))
_CONTROL = ("method", "parameters")
_ENTRY = ("method", "ratios", "parameters", "seeds", "models", "benchmarks", "budget", "served")
_MODEL = ("path", "served", "quantise")
_EXCLUDE = ("model", "method", "benchmark", "ratio", "budget")
_SERVER = tuple(field.name for field in dataclasses.fields(Server))
_BUDGET = ("budget", "budget_prompt")
MOST_CELLS = 100_000


@dataclass(frozen=True)
class Spec:
    """What was asked for, checked.

    Attributes:
        name: of the file, or of the run. models: short name -> local folder or None.
        cells: (variant, benchmark name) in order, baselines first. options: all other settings.
        raw: what it was made from, as plain values: `check` makes an equal spec from it.
        kind: of an "eval", a variant that its model cannot run is an error, not a row that says so.
    """

    name: str
    models: Mapping[str, str | None]
    cells: tuple[tuple[Variant, str], ...]
    options: Options = field(default_factory=Options)
    raw: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["sweep", "eval"] = "sweep"

    def with_options(self, given: Mapping[str, Any]) -> Spec:
        """With other options, such as ``timeout``."""
        options = replace(self.options, **{name: check_option(name, value) for name, value in given.items()})
        return replace(self, options=options, raw={**self.raw, **given})

    def state(self, runs: Path) -> Path:
        """Folder of the run's leases, marks and logs, beside the folder where cells live."""
        return eval_state(runs, self.name) if self.kind == "eval" else runs.parent / "sweeps" / self.name

    def variants(self, model: str) -> list[Variant]:
        """Of one model, without repetition."""
        return list({variant.key: variant for variant, _ in self.cells if variant.model == model}.values())

    def benchmarks(self, model: str) -> list[str]:
        """Of one model, without repetition."""
        return list(dict.fromkeys(name for variant, name in self.cells if variant.model == model))


def load(path: str | Path) -> Spec:
    """Read and check a sweep file.

    Raises:
        FileNotFoundError: there is none. SpecError: what is wrong, with its line.
    """
    path = files.sweep_file(path)
    return _checked(Marked(path), path.stem)


def check(raw: Mapping[str, Any], name: str) -> Spec:
    """The spec of plain values, keyed as in a sweep file.

    Raises:
        SpecError: what is wrong.
    """
    return _checked(Marked(None, raw), name)


def _checked(marked: Marked, name: str) -> Spec:
    keys = ("name", "models", "benchmarks", "methods", "controls", "exclude", "kind", *_BUDGET, *_OPTIONS)
    raw = marked.keys((), marked.value, keys)
    for key in ("models", "benchmarks", "methods"):
        if not raw.get(key):
            raise marked.error((key,), f"{key} is missing or empty")
    models, servers = _models(marked, raw["models"])
    benchmarks_of_all = _benchmarks(marked, ("benchmarks",), raw["benchmarks"])
    cells: dict[tuple[str, str], tuple[Variant, str]] = {}
    for model, benchmark in itertools.product(models, benchmarks_of_all):
        baseline = Variant(model, server=servers.get(model))
        cells[_key(baseline, benchmark)] = baseline, benchmark
    entries = marked.listed(("methods",), raw["methods"], dict, "a method with its ratios")
    shared = {key: raw[key] for key in _BUDGET if raw.get(key) is not None}
    _budget(marked, (), {}, shared, 1.0)
    for i, entry in enumerate(entries):
        before = len(cells)
        for variant, benchmark in _entry(marked, ("methods", i), entry, list(models), benchmarks_of_all, shared):
            cells[_key(variant, benchmark)] = variant, benchmark
        if len(cells) == before and entry["method"] != BASELINE:
            raise marked.error(
                ("methods", i), "this entry adds nothing to those above it, or one of its lists is empty"
            )
    listed = [cell for cell in cells.values() if cell[0].method != BASELINE]
    for variant, _ in listed:
        if variant.model in servers and variant.server is None:
            raise marked.error(
                ("methods",),
                f"method {variant.method!r} runs on weights that are here, and the baseline of {variant.model} is "
                "served; list a model without `served` for it, or limit the entry by `models`",
            )
    here = [cell for cell in listed if cell[0].server is None]  # a control is run where its neighbours are
    for variant, benchmark in _controls(marked, raw, here):
        cells[_key(variant, benchmark)] = variant, benchmark
    left = _without(marked, list(cells.values()), raw.get("exclude") or [])
    options = _options(marked, raw)
    if options.sampling:
        _of_videos(marked, "nframe" if options.nframe else "fps", benchmarks_of_all)
    raw = {**raw, "methods": [{**entry, "method": absolute(entry["method"])} for entry in entries]}
    return Spec(_name(marked, raw, name), models, tuple(left), options, raw, _kind(marked, raw))


def _name(marked: Marked, raw: Mapping[str, Any], name: str) -> str:
    """A run's own name names its folder and its CSV."""
    name = raw.get("name") or name
    if not isinstance(name, str) or name.startswith(".") or not name.isprintable() or "/" in name or "\\" in name:
        raise marked.error(("name",), f"name {name!r} names a folder: text without / and \\ that begins with no dot")
    return name


def _kind(marked: Marked, raw: Mapping[str, Any]) -> Any:
    kind = raw.get("kind", "sweep")
    if kind not in ("sweep", "eval"):
        raise marked.error(("kind",), f"kind {kind!r}; allowed: sweep, eval")
    return kind


def _options(marked: Marked, raw: Mapping[str, Any]) -> Options:
    given = {}
    for key in _OPTIONS:
        if raw.get(key) is None:
            continue
        try:
            given[key] = check_option(key, raw[key])
        except ValueError as error:
            raise marked.error((key,), str(error)) from None
    try:
        return Options(**given)
    except ValueError as error:  # two that do not go together; it begins with one of them
        raise marked.error((str(error).split()[0],), str(error)) from None


def _of_videos(marked: Marked, key: str, names: list[str]) -> None:
    """Raise SpecError unless all benchmarks show videos, of which frames can be chosen."""
    others = [name for name in names if not _shows_videos(name)]
    if others:
        raise marked.error(
            (key,), f"{key} says which frames of videos are shown, and {', '.join(others)} shows none; leave {key} "
            "away, or these benchmarks to a run of their own"
        )  # fmt: skip


def _shows_videos(benchmark: str) -> bool:
    """Whether it is declared to."""
    return benchmark in benchmarks.names() and bool(benchmarks.load(benchmark).sampling)


def _key(variant: Variant, benchmark: str) -> tuple[str, str]:
    return variant.key, benchmark


def _models(marked: Marked, raw: Any) -> tuple[dict[str, str | None], dict[str, Server]]:
    """Name -> local folder, with a name of its own for every way of quantising; and whose baseline is served."""
    found: dict[str, str | None] = {}
    servers: dict[str, Server] = {}
    if not isinstance(raw, dict):
        raw = dict.fromkeys(marked.listed(("models",), raw, str, "the short name of a model"))
    for i, (name, given) in enumerate(raw.items()):
        place: Place = ("models", name) if ("models", name) in marked.lines else ("models", i)
        if not isinstance(name, str) or not isinstance(given, str | Mapping | None):
            raise marked.error(place, f"{name!r}: {given!r} is not a short name and a folder, or nothing")
        entry = marked.keys(place, given, _MODEL) if isinstance(given, Mapping) else {"path": given}
        names = [name]
        if "quantise" in entry:
            kinds = marked.listed(
                (*place, "quantise"), entry["quantise"], str, f"{', '.join(models.QUANTISED)} or none"
            )
            names = [name if kind == "none" else f"{name}@{kind}" for kind in kinds]
        try:
            for each in names:
                models.find(each)
            if "served" in entry:
                servers |= dict.fromkeys(names, Server.of(marked.keys((*place, "served"), entry["served"], _SERVER)))
        except SpecError:
            raise
        except ValueError as error:
            raise marked.error(place, str(error)) from None
        if "served" in entry and "quantise" in entry:
            raise marked.error(place, f"{name}: weights of a served model are not ours to quantise; remove one of them")
        if not isinstance(entry.get("path"), str | None):
            raise marked.error(place, f"path {entry['path']!r} is no folder")
        found |= dict.fromkeys(names, entry.get("path"))
    return found, servers


def _benchmarks(marked: Marked, place: Place, raw: Any) -> list[str]:
    known = {*benchmarks.names(), *benchmarks.groups()}
    names = marked.listed(place, raw, str, "the name of a benchmark or group")
    for i, name in enumerate(names):
        if name not in known and not vlmeval_bridge.knows(name):
            raise marked.error((*place, i), str(unknown("benchmark or group", name, known)))
    return list(benchmarks.expand(names))


def _entry(
    marked: Marked,
    place: Place,
    raw: Any,
    all_models: list[str],
    all_benchmarks: list[str],
    shared: Mapping[str, Any],
) -> Iterator[tuple[Variant, str]]:
    entry = marked.keys(place, raw, _ENTRY)
    method = entry.get("method")
    if not isinstance(method, str):
        raise marked.error(place, f"an entry under methods needs a method; known: {', '.join(method_names())}")
    try:
        method = name_of(method)
        make_method(method)
    except ValueError as error:
        raise marked.error((*place, "method"), str(error)) from None
    server = _server(marked, place, entry, method)
    chosen = marked.listed((*place, "models"), entry.get("models", all_models), str, "the short name of a model")
    for i, name in enumerate(chosen):
        if name not in all_models:
            raise marked.error((*place, "models", i), f"model {name!r} is not among the sweep's models")
    sets = _benchmarks(marked, (*place, "benchmarks"), entry.get("benchmarks", all_benchmarks))
    for i, name in enumerate(sets):
        if name not in all_benchmarks:
            raise marked.error((*place, "benchmarks", i), f"benchmark {name!r} is not among the sweep's benchmarks")
    ratios = marked.listed(
        (*place, "ratios"), entry.get("ratios", [1.0] if method == BASELINE else []), int | float, "a ratio"
    )
    if not ratios:
        raise marked.error(place, f"method {method!r} needs ratios, e.g. ratios: [0.5, 0.25]")
    for i, ratio in enumerate(ratios):
        if not 0 < ratio <= 1:
            raise marked.error((*place, "ratios", i), f"retention ratio {ratio!r} is outside (0, 1]: 0.5 keeps half")
    declared = list(make_method(method).sweep_seeds)
    seeds = marked.listed((*place, "seeds"), entry.get("seeds", declared), int, "a whole number")
    others = math.prod(map(len, [chosen, ratios, seeds, sets]))
    for parameters in _grid(marked, place, entry, others):
        for model, ratio, seed, name in itertools.product(chosen, ratios, seeds, sets):
            if method != BASELINE:
                budget = None if server else _budget(marked, place, entry, shared, float(ratio))
                yield Variant(model, method, float(ratio), parameters, seed, budget, server=server), name


def _server(marked: Marked, place: Place, entry: Mapping[str, Any], method: str) -> Server | None:
    """Who answers in place of this process; raises SpecError where a method wants a server and has none, or has one."""
    if make_method(method).is_served != ("served" in entry):
        raise marked.error(
            place,
            f"method {method!r} needs served: {{base_url: http://host:8000/v1}}"
            if "served" not in entry
            else f"method {method!r} runs here; a server that prunes is measured with a method that is served",
        )
    if "served" not in entry:
        return None
    if entry.get("budget", OWN) != OWN or "seeds" in entry:
        raise marked.error(place, "a served entry has no budget and no seeds: the server was started as it was")
    try:
        return Server.of(marked.keys((*place, "served"), entry["served"], _SERVER))
    except SpecError:
        raise
    except ValueError as error:
        raise marked.error((*place, "served"), str(error)) from None


def _controls(
    marked: Marked, raw: Mapping[str, Any], listed: list[tuple[Variant, str]]
) -> Iterator[tuple[Variant, str]]:
    """What every other method is to be compared with, wherever one is measured."""
    chosen, known = raw.get("controls"), control_names()
    controls = {name: make_method(name) for name in known}
    usual = [name for name, control in controls.items() if not control.repeats_baseline]
    entries = usual if chosen is None else chosen
    of_videos = {name: _shows_videos(name) for name in {benchmark for _, benchmark in listed}}
    for i, entry in enumerate(
        marked.listed(("controls",), entries, str | dict, "a control or its {method, parameters}")
    ):
        place: Place = ("controls", i)
        entry = marked.keys(place, {"method": entry} if isinstance(entry, str) else entry, _CONTROL)
        method = entry.get("method")
        if method not in known:
            raise marked.error(place, str(unknown("control", str(method), known)))
        if entry.keys() == {"method"} and any(variant.method == method for variant, _ in listed):
            continue
        for parameters in _grid(marked, place, entry, len(listed)):
            made = make_method(method, parameters)
            fitting = [cell for cell in listed if _fits(made, of_videos[cell[1]])]
            if listed and not fitting and chosen is not None:
                what = "pictures" if made.for_videos else "videos"
                raise marked.error(place, f"control {method!r} fits no benchmark of this sweep: all show {what}")
            for variant, name in fitting:
                if made.repeats_baseline:
                    yield Variant(variant.model, method, parameters=parameters), name
                    continue
                for seed in made.sweep_seeds:
                    yield replace(variant, method=method, parameters=parameters, seed=seed), name


def _fits(control: AbstractMethod, of_videos: bool) -> bool:
    """Whether a control says something of a benchmark: those of videos repeat others on pictures, and a video cannot be
    shrunk as a picture is (`fewer_frames` is its counterpart)."""
    return control.pixel_share(0.5) is None if of_videos else not control.for_videos


def _budget(
    marked: Marked, place: Place, entry: Mapping[str, Any], shared: Mapping[str, Any], target: float
) -> CostTarget | None:
    """What the entry holds equal, else what the whole sweep does; None for the methods' own ratios."""
    place = (*place, "budget") if "budget" in entry else ("budget",)
    prompt = None
    if "budget_prompt" in shared:
        listed = marked.listed(
            ("budget_prompt",), shared["budget_prompt"], int, "a number of tokens: [visual, text]", True
        )
        prompt = tuple(listed)
    try:
        CostTarget.of(OWN, target, prompt)
    except ValueError as error:
        raise marked.error(("budget_prompt",), str(error)) from None
    try:
        return CostTarget.of(entry.get("budget", shared.get("budget", OWN)), target, prompt)
    except ValueError as error:
        raise marked.error(place, str(error)) from None


def _grid(marked: Marked, place: Place, entry: Mapping[str, Any], others: int) -> Iterator[dict[str, Any]]:
    """Every combination of the parameters of an entry's method, each checked; ``others``: cells of each."""
    method, raw = name_of(entry["method"]), entry.get("parameters") or {}
    if not isinstance(raw, dict):
        raise marked.error((*place, "parameters"), f"expected parameters as a mapping, got {raw!r}")
    axes = [value if isinstance(value, list) else [value] for value in raw.values()]
    n = others * math.prod(map(len, axes))
    if n > MOST_CELLS:
        raise marked.error(place, f"this entry asks for {n} cells; a sweep has at most {MOST_CELLS}")
    for values in itertools.product(*axes):
        parameters = dict(zip(raw, values, strict=True))
        try:
            make_method(method, parameters)
        except (ValueError, TypeError) as error:
            text = str(error) if isinstance(error, ValueError) else f"{parameters} do not fit {method}: {error}"
            raise marked.error((*place, "parameters"), text) from None
        yield parameters


def _without(marked: Marked, cells: list[tuple[Variant, str]], raw: Any) -> list[tuple[Variant, str]]:
    for i, rule in enumerate(marked.listed(("exclude",), raw, dict, "a rule with model, method, benchmark or ratio")):
        rule = marked.keys(("exclude", i), rule, _EXCLUDE)

        def hit(variant: Variant, name: str, rule: Mapping[str, Any] = rule) -> bool:
            has = {"model": variant.model, "method": variant.method, "benchmark": name, "ratio": variant.requested}
            has["budget"] = variant.budget.kind if variant.budget else OWN
            return all(has[key] == value for key, value in rule.items())

        left = [cell for cell in cells if not hit(*cell)]
        if len(left) == len(cells):
            raise marked.error(("exclude", i), f"the rule {dict(rule)} excludes nothing; is a name misspelt?")
        baselines = {(variant.model, name) for variant, name in left if variant.method == BASELINE}
        bare = [(variant.model, name) for variant, name in left if (variant.model, name) not in baselines]
        if bare or not left:
            lost = f"the unpruned baseline of {bare[0][0]} on {bare[0][1]}, which others need" if bare else "everything"
            raise marked.error(("exclude", i), f"the rule {dict(rule)} excludes {lost}; add a method, ratio or model")
        cells = left
    return cells
