"""Names are file names: methods live in ivcp_eval/methods, families in model_adapters, benchmarks in datasets/."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from ivcp_eval.interface import AbstractAdapter, AbstractMethod

PLUS_IVC, PLUS_DSTP = "+ivc", "+dstp"
#: What may follow a method's name -> module and class that wrap the method.
WRAPPERS: Mapping[str, tuple[str, str]] = {
    PLUS_IVC: ("ivcp_eval.methods._plus_ivc", "PlusIvc"),
    PLUS_DSTP: ("ivcp_eval.methods._plus_dstp", "PlusDstp"),
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
    own, added = _fields(cls), _fields(wrapper)
    known = own | added
    for parameter, value in (parameters or {}).items():
        if parameter not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"method {name!r} has no parameter {parameter!r}{nearest(parameter, known)} Parameters: {names}."
            )
        declared = getattr(known[parameter].type, "__name__", str(known[parameter].type))
        if not _fits(value, declared):
            raise ValueError(
                f"parameter {parameter}={value!r} of method {name!r} must be {declared}; its default is "
                f"{known[parameter].default!r}"
            )
    given = dict(parameters or {})
    outer = {key: given.pop(key) for key in added.keys() & given.keys()}
    method: AbstractMethod = cls(**given)
    return wrapper(method, **outer) if wrapper else method


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


def _fits(value: Any, declared: str) -> bool:
    """Whether a value is of a declared plain type (or union of such); other types are left to the method.

    Otherwise ``renumber="no"`` would be true. False is 0, a part switched off, where a share is declared.
    """
    kinds = {"bool": bool, "int": Integral, "float": Real, "None": type(None)}
    names = [name.strip() for name in declared.split("|")]
    if not set(names) <= set(kinds):
        return True
    if isinstance(value, bool):
        return "bool" in names or ("float" in names and not value)
    return isinstance(value, tuple(kinds[name] for name in names if name != "bool"))


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
