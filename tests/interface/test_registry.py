"""Names are file names; unknown ones are answered with the nearest; methods are well-formed."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ivcp_eval.interface import AbstractAdapter, AbstractMethod, ModelFacts, plugins, registry
from ivcp_eval.methods import none

ROOT = Path(__file__).parents[2]


def test_names_are_the_files() -> None:
    def files(folder: Path) -> set[str]:
        found = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        return {name for name in found if name[0] != "_"}

    assert set(registry.method_names()) >= files(ROOT / "ivcp_eval" / "methods") >= {"none", "ivc_prune"}
    assert set(registry.family_names()) == files(ROOT / "model_adapters")


@pytest.mark.parametrize(
    ("name", "hint"), [("ivcprune", "ivc_prune"), ("fast_v", "fastv"), ("nnoe", "none"), ("zzz", None)]
)
def test_unknown_method(name: str, hint: str | None) -> None:
    with pytest.raises(ValueError, match=f"unknown method '{name}'") as caught:
        registry.make_method(name)
    assert (f"did you mean '{hint}'?" in str(caught.value)) == (hint is not None)
    assert "Known: " in str(caught.value)


def test_unknown_parameter() -> None:
    with pytest.raises(ValueError, match=r"has no parameter 'ivcs'; did you mean 'ivc'\? Parameters: .*layer"):
        registry.make_method("ivc_prune", {"ivcs": 0.2})
    with pytest.raises(ValueError, match=r"method 'none' has no parameter 'x'\. Parameters: none"):
        registry.make_method("none", {"x": 1})


def test_parameters_are_set_and_checked() -> None:
    assert registry.make_method("ivc_prune", {"ivc": 0.2}).ivc == 0.2  # type: ignore[attr-defined]
    for wrong in ({"ivc": 1.5}, {"layer": 0}, {"preset": "oficial"}):
        with pytest.raises(ValueError):
            registry.make_method("ivc_prune", wrong)


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("pyramiddrop", {"renumber": "no"}),  # would be true
        ("ivc_prune", {"foreground": 0}),
        ("ivc_prune", {"ivc": True}),
        ("ivc_prune", {"ivc": "0.1"}),
        ("fastv", {"layer": True}),
        ("fastv", {"layer": 2.5}),
        ("fastv", {"layer": None}),
        ("uniform", {"layer": "2"}),
        ("fastv+ivc", {"ivc_share": None}),
    ],
    ids=str,
)
def test_parameters_of_another_type_are_refused(method: str, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"parameter {name}=.* of method '.*' must be (bool|int|float).*; its default"):
        registry.make_method(method, wrong)


#: Methods with a parameter of several numbers -> it, what people write and the list that this is.
SEVERAL = {
    "adaspark": ("cube", "2,2,3", [2, 2, 3]),
    "fastocr": ("focal", "0.25,0.5", [0.25, 0.5]),
    "pyramiddrop": ("depths", "(0.3, 0.6)", [0.3, 0.6]),
    "quota": ("depths", "0.3, 0.6", [0.3, 0.6]),
    "sparsevlm": ("depths", "0.1,0.2,0.4", [0.1, 0.2, 0.4]),
}


def several_of(name: str) -> list[str]:
    fields = dataclasses.fields(registry.method_class(name))  # type: ignore[arg-type] # methods are dataclasses
    return [field.name for field in fields if re.search("tuple|list", str(field.type))]


def test_every_parameter_of_several_numbers_is_in_the_table() -> None:
    found = {name: several_of(name) for name in registry.module_names("ivcp_eval.methods")}
    assert {name: names for name, names in found.items() if names} == {k: [v[0]] for k, v in SEVERAL.items()}


@pytest.mark.parametrize("method", SEVERAL)
def test_several_numbers_are_read_as_people_write_them(method: str) -> None:
    """On the command line as text, in a file as a list, in Python as a tuple: one method, and one record of it."""
    name, text, wanted = SEVERAL[method]
    for written in (text, wanted, tuple(wanted), str(wanted)):
        assert registry.read_parameters(method, {name: written}) == {name: wanted}
        assert getattr(registry.make_method(method, {name: written}), name) == tuple(wanted)
        wrapped = registry.read_parameters(f"{method}+dstp", {name: written, "hold": 3})
        assert wrapped == {name: wanted, "hold": 3}
    assert registry.values_to_try(method, name, wanted) == [wanted], "no grid of numbers"
    assert registry.values_to_try(method, name, [text, wanted, None]) == [text, wanted, None]
    assert registry.values_to_try("fastv", "layer", [2, 3]) == [2, 3]


@pytest.mark.parametrize("wrong", ["nonsense", "1,x", "2 2 2", "", None, True, [True, 0.5], {"a": 1}, ["a"], [[1]], ()])
@pytest.mark.parametrize("method", SEVERAL)
def test_what_is_no_several_numbers_is_refused(method: str, wrong: Any) -> None:
    name = SEVERAL[method][0]
    if wrong is None and method == "sparsevlm":
        assert registry.make_method(method, {name: None}).depths is None  # type: ignore[attr-defined]
        return
    with pytest.raises(ValueError, match=name) as caught:
        registry.make_method(method, {name: wrong})
    assert wrong in ("", ()) or "numbers with commas between them, or a list of these" in str(caught.value)


@pytest.mark.parametrize("wrong", ["2,2", "2,2,2,2", "2,2,1.5", 2, [2, 2], "2,2,0"])
def test_a_cube_has_three_whole_sides(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"cube=.* must be (3 whole numbers with commas|frames, rows and columns)"):
        registry.make_method("adaspark", {"cube": wrong})


def test_one_number_may_stand_alone_where_any_count_will_do() -> None:
    assert registry.make_method("pyramiddrop", {"depths": 0.5}).depths == (0.5,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", registry.method_names())
def test_whatever_is_given_a_wrong_value_is_refused_in_words(name: str) -> None:
    """Choices, paths and several numbers too: a list is none of the words, and a number no file."""
    for field in dataclasses.fields(registry.method_class(name)):  # type: ignore[arg-type] # methods are dataclasses
        with pytest.raises(ValueError, match=field.name):
            registry.make_method(name, {field.name: {"a": 1}})
        if "Path" in str(field.type):
            with pytest.raises(ValueError, match=rf"{field.name}=5 .* must be Path \| None"):
                registry.make_method(name, {field.name: 5})


def test_parts_are_switched_off() -> None:
    method: Any = registry.make_method("ivc_prune", {"ivc": False, "foreground": False, "layer": None, "seeds": 0})
    assert (method.ivc, method.foreground, method.layer, method.seeds) == (0, False, None, 0)


def test_unknown_family_and_model_type() -> None:
    with pytest.raises(ValueError, match="did you mean 'qwen2_5_vl'"):
        registry.adapter("qwen25_vl")
    with pytest.raises(ValueError, match="unknown model type 'bert'"):
        registry.family_of("bert")


def test_every_model_type_has_one_family() -> None:
    seen: dict[str, str] = {}
    for family in registry.family_names():
        adapter = registry.adapter(family)
        assert isinstance(adapter, AbstractAdapter)
        for kind in adapter.model_types:
            assert kind not in seen, f"{kind} is claimed by {seen.get(kind)} and {family}"
            seen[kind] = family
            assert registry.family_of(kind) == family


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Entry points as installed packages declare them; they are scanned once per process."""

    def declare(*entries: EntryPoint) -> None:
        monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == plugins.GROUP else [])
        plugins.found.cache_clear()

    yield declare
    plugins.found.cache_clear()


def test_names_are_looked_up_without_scanning_installed_packages_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer makes a method; a scan of what is installed takes 10 ms."""
    scans: list[str] = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: scans.append(group) or [])
    plugins.found.cache_clear()
    for _ in range(3):
        registry.make_method("fastv")
        registry.family_of("qwen2_5_vl")
    assert scans == [plugins.GROUP]
    assert registry.adapter("qwen2_5_vl") is registry.adapter("qwen2_5_vl")
    plugins.found.cache_clear()


def test_a_method_that_is_added_while_the_process_runs_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "growing_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    assert registry.module_names("growing_methods") == ()
    (package / "late.py").touch()
    assert registry.module_names("growing_methods") == ("late",)


def test_installed_plug_ins_are_methods(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("some_plug_in")
    module.Method = none.Method  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_plug_in", module)
    entries = [
        EntryPoint("from_a_module", "some_plug_in", plugins.GROUP),
        EntryPoint("from_a_class", "some_plug_in:Method", plugins.GROUP),
    ]
    install(*entries)
    for name in ("from_a_module", "from_a_class"):
        assert name in registry.method_names()
        assert registry.method_class(name) is none.Method


@dataclasses.dataclass(frozen=True)
class NeedsAValue(none.Method):
    """A parameter without a default."""

    layer: int = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class Unfinished(AbstractMethod):
    """Two methods are missing."""


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("NeedsAValue", "parameters without a default: layer"),
        ("Unfinished", "does not define cuts, select"),
        ("ROOT", "is a PosixPath, not a class"),
        ("gone", r"cannot be imported \(AttributeError"),
    ],
)
def test_a_plug_in_that_is_no_method(target: str, words: str, install: Install) -> None:
    entry = EntryPoint("strange", f"{__name__}:{target}", plugins.GROUP)
    install(entry)
    with pytest.raises(ValueError, match=f"method 'strange' of an unknown package .*{words}"):
        registry.make_method("strange")
    assert registry.make_method("none") == none.Method()


@pytest.mark.parametrize("statement", ["import sys; sys.exit(0)", "class Odd(BaseException): pass\nraise Odd('x')"])
def test_a_plug_in_that_ends_programs_while_it_is_imported(
    statement: str, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving_plug_in.py").write_text(statement)
    install(EntryPoint("leaving", "leaving_plug_in", plugins.GROUP))
    with pytest.raises(ValueError, match=r"cannot be imported \(StrayExit: its module raised .*uninstall that package"):
        registry.make_method("leaving")


def test_names_that_a_plug_in_cannot_have(install: Install) -> None:
    names = ("twice", "twice", "fastv", "a__b", "A", "+ivc", "fine")
    entries = [EntryPoint(name, f"{none.__name__}:Method", plugins.GROUP) for name in names]
    install(*entries)
    assert set(registry.method_names()) - set(registry.module_names("ivcp_eval.methods")) == {"fine"}
    with pytest.raises(ValueError, match=r"'twice' .* cannot be used: several installed packages claim this name"):
        registry.make_method("twice")
    with pytest.warns(UserWarning, match="'fastv' of an unknown package is not used: 'fastv' is a method of ivcp-eval"):
        assert registry.method_class("fastv").__module__ == "ivcp_eval.methods.fastv"


def test_the_source_of_a_plug_in_follows_its_code(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sourced" / "deep").mkdir(parents=True)
    (tmp_path / "sourced" / "__init__.py").write_text("")
    (tmp_path / "sourced" / "deep" / "__init__.py").write_text("from ivcp_eval.methods.none import Method\n")
    entry = EntryPoint("mine", "sourced.deep", plugins.GROUP)
    install(entry)
    before = registry.method_source("mine")
    assert re.fullmatch(r"an unknown package \(code [0-9a-f]{12}\)", before)
    assert registry.method_source("mine+ivc") == before
    (tmp_path / "sourced" / "helper.py").write_text("x = 1\n")
    assert registry.method_source("mine") != before
    assert registry.method_source("fastv") == registry.method_source("fastv+ivc") == ""


@pytest.mark.parametrize("name", registry.method_names())
def test_method_is_well_formed(name: str) -> None:
    cls = registry.method_class(name)
    assert issubclass(cls, AbstractMethod)
    assert cls.__dataclass_params__.frozen, "parameters belong to the identity of a run"  # type: ignore[attr-defined]
    assert all(f.default is not dataclasses.MISSING for f in dataclasses.fields(cls)), "every parameter has a default"  # type: ignore[arg-type]
    assert cls() == cls()
    assert cls.faithfulness in ("faithful", "from_formula", "variant", "control")


@pytest.mark.parametrize("name", registry.method_names())
@pytest.mark.parametrize("n_layers", [6, 28, 36])
def test_cuts_fit_any_depth(name: str, n_layers: int) -> None:
    """Published layers of one model never leave a shallower one, and the last cut reaches the asked ratio."""
    for first in (0, 3):
        cuts = registry.make_method(name).cuts(ModelFacts("qwen2_5_vl", n_layers, first), 0.3)
        layers = [cut.layer for cut in cuts]
        assert layers == sorted(set(layers))
        removing = [cut for cut in cuts if cut.ratio < 1 and not cut.evicts]
        assert all(first <= cut.layer for cut in removing)
        assert all(0 <= layer < n_layers for layer in layers)
        assert all(0 < cut.ratio <= 1 for cut in cuts)


@pytest.mark.parametrize(
    "name", [n for n in registry.method_names() if n in registry.module_names("ivcp_eval.methods")]
)
def test_method_docstring_has_the_form(name: str) -> None:
    """One line on what it keeps; where it comes from, unless it is a control; what differs."""
    cls = registry.method_class(name)
    text = inspect.getdoc(sys.modules[cls.__module__])
    assert text, f"{name} has no docstring"
    first = text.splitlines()[0]
    assert first.endswith((".", ":"))
    assert re.search(r"^Differs:", text, re.M), "name the gaps you filled, or say that nothing differs"
    if cls.faithfulness != "control" and not cls.is_served:
        assert re.search(r"^Paper: https?://", text, re.M), "give the paper"
    if cls.faithfulness == "faithful":
        assert re.search(r"^Reference: https?://\S+ @ [0-9a-f]{7,40}", text, re.M), "give repository @ commit"
    tree = ast.parse(inspect.getsource(cls))
    assert ast.get_docstring(tree.body[0]), "the class says what its parameters mean"  # type: ignore[arg-type]
    documented = "".join(inspect.getdoc(base) or "" for base in cls.__mro__ if dataclasses.is_dataclass(base))
    for parameter in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert re.search(rf"\b{parameter.name}\b", documented), f"parameter {parameter.name} is not documented"


@pytest.mark.parametrize("name", registry.method_names())
def test_text_given_for_a_path_becomes_one(name: str, tmp_path: Path) -> None:
    """In one place for all methods: the command line and sweep files have text."""
    paths = [field.name for field in dataclasses.fields(registry.method_class(name)) if "Path" in str(field.type)]
    made = registry.make_method(name, dict.fromkeys(paths, str(tmp_path)))
    assert [getattr(made, path) for path in paths] == [tmp_path] * len(paths)
