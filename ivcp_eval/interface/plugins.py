"""Methods of other installed packages: found by entry point, loaded when asked for, traceable to package and code.

    [project.entry-points."ivcp_eval.methods"]
    last_tokens = "my_package.my_module"    # a module with a class `Method`, or "module:Class"

A package that is broken, or whose name is taken, is listed with the reason and spoils nothing else.

A method may also be a file by path (``--method ./mine.py``): `MethodFile`, known in the process that was told of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ivcp_eval.files import PACKAGE
from ivcp_eval.interface.failures import contained

if TYPE_CHECKING:
    from ivcp_eval.interface import AbstractMethod

GROUP = "ivcp_eval.methods"
NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"  # of a method; two underscores separate model, method and ratio elsewhere
_BUILT_IN = PACKAGE / "methods"


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        name: of the method. package: distribution and version. problem: why the name cannot be used; empty if it can.
    """

    name: str
    package: str
    entry: EntryPoint
    problem: str = ""

    @property
    def title(self) -> str:
        """For messages."""
        return f"method {self.name!r} of {self.package}"

    def load(self) -> type[AbstractMethod]:
        """Import the class.

        Raises:
            ValueError: the name cannot be used, the package cannot be imported, or what it names is no method.
        """
        if self.problem:
            raise ValueError(f"{self.title} cannot be used: {self.problem}")
        return _loaded(
            self.title,
            self.entry.load,
            "Mend or uninstall that package; the other methods work without it.",
            self.entry.value,
            "Its entry point must name a module with a class `Method`, or that class",
        )

    def source(self) -> str:
        """``PACKAGE VERSION (code HASH)``; the hash is of all Python files of the top-level module or package.

        So answers made with an editable package are not taken for those of its next state. Code that it imports from
        elsewhere does not show.
        """
        digest = hashlib.sha256()
        spec = find_spec(self.entry.module.partition(".")[0])
        folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
        files = [(path, folder) for folder in folders for path in sorted(folder.rglob("*.py"))]
        if spec and spec.origin and not folders:
            files = [(Path(spec.origin), Path(spec.origin).parent)]
        for path, folder in files:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
        return f"{self.package} (code {digest.hexdigest()[:12] if files else 'not found'})"


@dataclass(frozen=True)
class MethodFile:
    """A file with a class `Method`, as it was when it was read: one process never mixes two states of it.

    Attributes:
        path: absolute. content: its bytes.
    """

    path: Path
    content: bytes

    @property
    def name(self) -> str:
        """Of the method."""
        return self.path.stem

    def load(self) -> type[AbstractMethod]:
        """Run the file, once, and return its class. Raises ValueError: it cannot be run, or defines no method."""
        return self._class

    @cached_property
    def _class(self) -> type[AbstractMethod]:
        mend = "Mend the file; the other methods work without it."
        return _loaded(f"method file {self.path}", self._run, mend, "it", "The file must define a class `Method`")

    def _run(self) -> Any:
        module = ModuleType(f"_ivcp_eval_method_file_{self.name}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # where `dataclass` looks names of types up
        exec(compile(self.content, str(self.path), "exec"), module.__dict__)
        return module

    def source(self) -> str:
        """``FILE (code HASH)``. Code that it imports does not show."""
        return f"{self.path.name} (code {hashlib.sha256(self.content).hexdigest()[:12]})"


_files: dict[str, MethodFile] = {}


def add_file(path: Path) -> MethodFile:
    """Make a file's method known in this process under the file's name without ``.py``; nothing of it is run.

    Raises:
        ValueError: no such file, or a name that cannot be used.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{path} does not exist, or is no file; a Python file with a class `Method` is expected")
    problem = _problem(path.stem, 0)
    if not problem and any(plugin.name == path.stem for plugin in found()):
        problem = f"{path.stem!r} is a method of an installed package"
    known = _files.get(path.stem)
    if not problem and known and known.path != path:
        problem = f"{known.path} has the same name"
    if problem:
        raise ValueError(f"method file {path} cannot be used: {problem.partition('; rename')[0]}; rename the file")
    file = MethodFile(path, path.read_bytes())
    if known != file:
        _files[path.stem] = file
    return _files[path.stem]


def file_of(name: str) -> MethodFile | None:
    """What `add_file` made known under a name."""
    return _files.get(name)


def _loaded(title: str, load: Callable[[], Any], mend: str, what: str, needed: str) -> type[AbstractMethod]:
    try:
        with contained("its module"):
            target = load()
    except Exception as error:  # whatever a stranger's module does while it is imported
        raise ValueError(f"{title} cannot be imported ({type(error).__name__}: {error}). {mend}") from error
    cls = getattr(target, "Method", target)
    reason = wrong(cls)
    if reason:
        raise ValueError(
            f"{title} is no method: {what} {reason}. {needed}: a frozen dataclass derived from "
            "ivcp_eval.interface.AbstractMethod."
        )
    loaded: type[AbstractMethod] = cls
    return loaded


def wrong(cls: Any) -> str:
    """What keeps a class from being a method, or an empty text."""
    from ivcp_eval.interface.method import AbstractMethod

    if not isinstance(cls, type):
        return f"is a {type(cls).__name__}, not a class"
    if not issubclass(cls, AbstractMethod):
        return "does not derive from AbstractMethod"
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:
        return "is not a frozen dataclass, though its parameters are part of a run's identity"
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        return f"does not define {', '.join(missing)}"
    bare = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return f"has parameters without a default: {', '.join(bare)}" if bare else ""


@cache
def found() -> tuple[Plugin, ...]:
    """Every method that an installed package offers, by name; nothing is imported.

    Installed packages are scanned once per process: it takes milliseconds, and names are looked up for every answer.
    """
    entries = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, _package(entry)))
    times = Counter(entry.name for entry in entries)
    return tuple(Plugin(e.name, _package(e), e, _problem(e.name, times[e.name])) for e in entries)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


def _problem(name: str, times: int) -> str:
    if not re.fullmatch(NAME, name):
        return "a name is lower-case words joined by single underscores, such as 'my_method'; rename its entry point"
    if (_BUILT_IN / f"{name}.py").is_file() or (_BUILT_IN / name / "__init__.py").is_file():
        return f"{name!r} is a method of ivcp-eval itself; rename its entry point"
    if times > 1:
        return "several installed packages claim this name; uninstall all but one"
    return ""
