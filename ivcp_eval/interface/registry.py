"""Names are file names: methods live in ivcp_eval/methods, families in model_adapters, benchmarks in datasets/."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.files import file_digest, fingerprint
from ivcp_eval.interface import plugins
from ivcp_eval.interface.variants import numbers_of

if TYPE_CHECKING:
    from ivcp_eval.interface import AbstractAdapter, AbstractMethod

PLUS_IVC, PLUS_DSTP = "+ivc", "+dstp"
#: What may follow a method's name -> module and class that wrap the method.
WRAPPERS: Mapping[str, tuple[str, str]] = {
    PLUS_IVC: ("ivcp_eval.methods._plus_ivc", "PlusIvc"),
    PLUS_DSTP: ("ivcp_eval.methods._plus_dstp", "PlusDstp"),
}


#: Types of parameters, by how they are written; others are left to the method.
_KINDS: Mapping[str, Any] = {
    **{"bool": bool, "int": Integral, "float": Real, "None": type(None)},
    **{"str": str, "Path": (str, Path)},
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error's first sentence: ``; did you mean 'fastv'?``, or a full stop."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for an unknown name: what was got, what is allowed, the nearest match."""
    names = sorted(known)
    return ValueError(f"unknown {kind} {name!r}{nearest(name, names)} Known: {', '.join(names)}.")


def module_names(package: str) -> tuple[str, ...]:
    """Public module names of a package, sorted, without importing any of them."""
    folder = Path(str(import_module(package).__file__)).parent
    return _module_names(folder, tuple(sorted(path.name for path in folder.iterdir())))


@cache
def _module_names(folder: Path, _content: tuple[str, ...]) -> tuple[str, ...]:
    """Looked up for every answer, so not searched anew unless something was added."""
    files = [path.stem for path in folder.glob("*.py")] + [path.parent.name for path in folder.glob("*/__init__.py")]
    return tuple(sorted(name for name in files if not name.startswith("_")))


def method_names() -> tuple[str, ...]:
    """Every registered method, those of installed plug-ins (entry point group ``ivcp_eval.methods``) included.

    Nothing of a plug-in is imported. One whose name cannot be used is left out; `plugins.found` says why.
    """
    usable = {plugin.name for plugin in plugins.found() if not plugin.problem}
    return tuple(sorted({*module_names("ivcp_eval.methods"), *usable}))


def method_class(name: str) -> type[AbstractMethod]:
    """The ``Method`` class of a registered method.

    Raises:
        ValueError: unknown name (the message suggests the nearest one), or a plug-in that cannot be used.
    """
    claimed = [plugin for plugin in plugins.found() if plugin.name == name]
    if name in module_names("ivcp_eval.methods"):
        for plugin in claimed:
            warnings.warn(f"{plugin.title} is not used: {plugin.problem}", stacklevel=2)
        loaded: type[AbstractMethod] = import_module(f"ivcp_eval.methods.{name}").Method
        return loaded
    if claimed:
        return claimed[0].load()
    if file := plugins.file_of(name):
        return file.load()
    raise unknown("method", name, method_names())


def unwrapped_name(name: str) -> tuple[str, str]:
    """``fastv+ivc`` -> ("fastv", "+ivc"); the second is empty for a method without a wrapper."""
    plus = next((suffix for suffix in WRAPPERS if name.endswith(suffix)), "")
    return name.removesuffix(plus), plus


def name_of(method: str) -> str:
    """The name of a method that is given by name or by file: ``./mine.py+ivc`` -> ``mine+ivc``.

    The file is then known in this process. Raises ValueError: no such file, or a name that cannot be used.
    """
    base, plus = unwrapped_name(method)
    return plugins.add_file(Path(base)).name + plus if base.endswith(".py") else method


def absolute(method: str) -> str:
    """``./mine.py`` as other processes find it, wherever they run; a name as it is."""
    base, plus = unwrapped_name(method)
    return f"{Path(base).expanduser().resolve()}{plus}" if base.endswith(".py") else method


def method_source(name: str) -> str:
    """Where the code of a method comes from: empty for this package, ``PACKAGE VERSION (code HASH)`` for a plug-in.

    ``FILE (code HASH)`` for one that was given by its file.
    """
    base, _ = unwrapped_name(name)
    if base in module_names("ivcp_eval.methods"):
        return ""
    file = plugins.file_of(base)
    return next((plugin.source() for plugin in plugins.found() if plugin.name == base), file.source() if file else "")


def make_method(name: str, parameters: Mapping[str, Any] | None = None) -> AbstractMethod:
    """A method with its parameters set.

    ``NAME+ivc`` is NAME with the implicit visual coordinates forced in, ``NAME+dstp`` lets decoding swap tokens in;
    they take the parameters of both.

    Raises:
        ValueError: an unknown name or parameter, a value that is not of the declared type, or a wrapper around a
            method that selects no tokens.
    """
    cls, wrapper = _classes(name)
    given, known = read_parameters(name, parameters or {}), _fields(cls) | _fields(wrapper)
    for key, value in given.items():  # a record holds lists, a field a tuple
        if isinstance(value, list) and _tuple_of(_declared(known[key])) is not None:
            given[key] = tuple(value)
    outer = {key: given.pop(key) for key in _fields(wrapper).keys() & given.keys()}
    method: AbstractMethod = cls(**given)
    return wrapper(method, **outer) if wrapper else method


def read_parameters(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a method as records hold them, of values as users write them.

    Where several numbers are declared, ``2,2,2``, ``(2, 2, 2)`` and lists of them become a list, and a number alone
    where any count will do. Other values stay as they are.

    Raises:
        ValueError: an unknown name or parameter, or a value that is not of the declared type.
    """
    cls, wrapper = _classes(name)
    known = _fields(cls) | _fields(wrapper)
    found = {}
    for parameter, value in parameters.items():
        if parameter not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"method {name!r} has no parameter {parameter!r}{nearest(parameter, known)} Parameters: {names}."
            )
        declared = _declared(known[parameter])
        found[parameter] = read = _listed(value, declared)
        if not _fits(read, declared):
            raise ValueError(
                f"parameter {parameter}={value!r} of method {name!r} must be {_in_words(declared)}; its default is "
                f"{known[parameter].default!r}"
            )
    return found


def values_to_try(name: str, parameter: str, given: Any) -> list[Any]:
    """What a sweep file gives for a parameter, value by value: a list is several values, but one of numbers is a single
    value where the method declares several numbers. A parameter that the method has not is left for `make_method`."""
    if not isinstance(given, list):
        return [given]
    cls, wrapper = _classes(name)
    declared = (_fields(cls) | _fields(wrapper)).get(parameter)
    several = declared is not None and _tuple_of(_declared(declared)) is not None
    return [given] if several and all(isinstance(one, Real) for one in given) else given


def _classes(name: str) -> tuple[type[AbstractMethod], Any]:
    """The method's class, and the wrapper's where the name has one."""
    base, plus = unwrapped_name(name)
    if not plus:
        return method_class(base), None
    module, wrapper = WRAPPERS[plus]
    return method_class(base), getattr(import_module(module), wrapper)


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """The parameters of a class; a wrapper's method is none."""
    return {} if cls is None else {f.name: f for f in dataclasses.fields(cls) if f.name != "inner"}


def default_parameters(name: str) -> dict[str, Any]:
    """The default of every parameter of a method, its wrapper's too. Raises as `make_method`."""
    cls, wrapper = _classes(name)
    known = _fields(cls) | _fields(wrapper)
    return {
        key: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for key, f in known.items()
    }


def _declared(field: dataclasses.Field[Any]) -> ast.expr:
    """The declared type of a parameter, as it is written."""
    kind: Any = field.type
    text = kind if isinstance(kind, str) else kind.__name__ if isinstance(kind, type) else str(kind)
    return ast.parse(text, mode="eval").body


def _union(declared: ast.expr) -> list[ast.expr]:
    if isinstance(declared, ast.BinOp):
        return [*_union(declared.left), *_union(declared.right)]
    return [declared]


def _name(declared: ast.expr) -> str:
    """``tuple`` of ``tuple[int, ...]``, ``Path`` of ``pathlib.Path``."""
    if isinstance(declared, ast.Subscript):
        return _name(declared.value)
    return ast.unparse(declared).rpartition(".")[2]


def _arguments(declared: ast.Subscript) -> list[ast.expr]:
    return declared.slice.elts if isinstance(declared.slice, ast.Tuple) else [declared.slice]


def _tuple_of(declared: ast.expr) -> list[ast.expr] | None:
    """What is declared of the members where a tuple may be given: a type for each, or a type and an ellipsis."""
    for one in _union(declared):
        if isinstance(one, ast.Subscript) and _name(one) == "tuple":
            return _arguments(one)
    return None


def _is_any_count(members: list[ast.expr]) -> bool:
    return isinstance(members[-1], ast.Constant) and members[-1].value is ...


def _in_words(declared: ast.expr) -> str:
    """``float | None``; of a tuple ``3 whole numbers with commas between them``."""
    members = _tuple_of(declared)
    if isinstance(declared, ast.Subscript) and _name(declared) == "Literal":
        return f"one of {', '.join(map(ast.unparse, _arguments(declared)))}"
    if members is None:
        return ast.unparse(declared)
    kind = {"int": "whole numbers", "float": "numbers"}.get(_name(members[0]), f"values ({ast.unparse(members[0])})")
    count = "" if _is_any_count(members) else f"{len(members)} "
    others = [ast.unparse(one) for one in _union(declared) if _name(one) != "tuple"]
    return " or ".join([f"{count}{kind} with commas between them, or a list of these", *others])


def _listed(value: Any, declared: ast.expr) -> Any:
    """A value with the members of a tuple as a list, if one is declared and this may be meant as one."""
    members = _tuple_of(declared)
    if members is None:
        return value
    if isinstance(value, str):
        found = numbers_of(value)
        return value if found is None else found
    if isinstance(value, Real) and not isinstance(value, bool) and _is_any_count(members):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def _fits(value: Any, declared: ast.expr) -> bool:
    """Whether a value is of a declared type (or one of several) that can be read; other types are left to the method.

    Otherwise ``renumber="no"`` would be true. False is 0, a part switched off, where a share is declared.
    """
    return any(_fits_one(value, one) for one in _union(declared))


def _fits_one(value: Any, declared: ast.expr) -> bool:
    name = _name(declared)
    if isinstance(declared, ast.Subscript) and name == "Literal":
        allowed = [ast.literal_eval(one) for one in _arguments(declared)]
        return any(type(value) is type(one) and value == one for one in allowed)
    if isinstance(declared, ast.Subscript) and name == "tuple":
        members = _arguments(declared)
        if not isinstance(value, list):
            return False
        if _is_any_count(members):
            members = members[:1] * len(value)
        return len(value) == len(members) and all(map(_fits_one, value, members))
    if isinstance(value, bool):
        return name == "bool" or (name == "float" and not value) or name not in _KINDS
    return isinstance(value, _KINDS.get(name, object))


def parameters_of(method: AbstractMethod) -> dict[str, Any]:
    """Every parameter of an instance, as it belongs to a run's identity and into its CSV.

    A parameter that is a `pathlib.Path` names a file or a checkpoint's folder that the method reads; its name and
    checksum stand for it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return {name: _file_or(value) for name, value in dataclasses.asdict(method).items()}  # type: ignore[call-overload]


def settable(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What `parameters_of` gave, as `make_method` takes it: the method inside a wrapper has its own beside it."""
    return {**recorded.get("inner", {}), **{name: value for name, value in recorded.items() if name != "inner"}}


def _file_or(value: Any) -> Any:
    if isinstance(value, dict):  # the method inside a wrapper
        return {name: _file_or(inner) for name, inner in value.items()}
    if isinstance(value, Path) and value.is_dir():
        return f"{value.name} (fingerprint {fingerprint(value)})"
    return f"{value.name} (sha256 {file_digest(value)})" if isinstance(value, Path) else value


def family_names() -> tuple[str, ...]:
    """Every model family: the file names in ``model_adapters``."""
    return module_names("model_adapters")


@cache
def adapter(family: str) -> AbstractAdapter:
    """The adapter of a family, by its file name. Adapters hold no state, so there is one of each."""
    instance: AbstractAdapter = _adapter_class(family)()
    return instance


def _adapter_class(family: str) -> type[AbstractAdapter]:
    if family not in family_names():
        raise unknown("model family", family, family_names())
    cls: type[AbstractAdapter] = import_module(f"model_adapters.{family}").Adapter
    return cls


def family_of(model_type: str) -> str:
    """The family that handles a ``config.model_type``; ValueError if none does."""
    types = _model_types(family_names())
    if model_type not in types:
        raise unknown("model type", model_type, types)
    return types[model_type]


@cache
def _model_types(families: tuple[str, ...]) -> dict[str, str]:
    """``config.model_type`` -> family."""
    return {kind: name for name in families for kind in _adapter_class(name).model_types}
