"""Who may import whom, read from the source; and what importing the package must not pull in."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivcp_eval.interface import registry

ROOT = Path(__file__).parent.parent
PACKAGES = ("ivcp_eval", "model_adapters")


def sources(*parts: str) -> list[Path]:
    """Python files under a path of the repository."""
    path = ROOT.joinpath(*parts)
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


# They import what is named at run time: modules of the package that are loaded late, verbs, methods and families.
FINDERS = (
    "ivcp_eval/__init__.py",
    "ivcp_eval/cli/__init__.py",
    "ivcp_eval/interface/registry.py",
    "ivcp_eval/lab/training/part.py",
)
UNKNOWN = "a name that is not written there"


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, type-checking blocks excluded; an attribute is named as its module is."""
    finds = str(path.relative_to(ROOT)) in FINDERS
    tree = ast.parse(path.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if is_module(name) else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            yield from () if finds else called(node.args[0])


def called(argument: ast.expr) -> Iterator[str]:
    """What `import_module` imports: a name as it stands, or of ``f"package.{name}"`` the package."""
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    yield str(argument.value).rstrip(".") if isinstance(argument, ast.Constant) else UNKNOWN


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_of(path: Path) -> str:
    """``ivcp_eval/engine/__init__.py`` -> ``ivcp_eval.engine``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def packages_of(module: str) -> set[str]:
    """The packages that a module lies in, whose own files run when it is imported."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def offenders(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    """``file: module`` for every forbidden import."""
    return [
        f"{path.relative_to(ROOT)}: {module}"
        for path in files
        for module in imported(path)
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


# Who may import whom: a room may import rooms of lower rank, and itself. Equal ranks do not know each other.
RANK = {
    **{"files": 0, "interface": 1, "benchmarks": 2},
    **{"methods": 3, "model_adapters": 3, "engine": 3},
    **{"vlmeval_bridge": 4, "reports": 4, "runs": 5, "lab": 6, "cli": 7},
}


def edges(package: str) -> dict[str, set[str]]:
    """Module -> the modules that run when it is imported, or calls a function that imports."""
    graph = {}
    for path in sources(package):
        own, found = module_of(path), {*imported(path)}
        assert UNKNOWN not in found, f"{path.relative_to(ROOT)} imports {UNKNOWN}"
        graph[own] = {*found, *(name for module in found for name in packages_of(module) - packages_of(own))} - {own}
    return graph


def test_no_file_imports_one_that_imports_it() -> None:
    """Not by way of others either, nor inside a function; `graphlib` raises CycleError, which names the circle."""
    list(graphlib.TopologicalSorter({**edges("ivcp_eval"), **edges("model_adapters")}).static_order())


@pytest.mark.parametrize(
    "files",
    [
        {"__init__": "from pkg import a", "a": "from pkg import value"},
        {"__init__": "", "a": "def f():\n    import_module('pkg.b')", "b": "import pkg.a"},
        {"__init__": "", "a": "importlib.import_module(f'pkg.sub.{name}')", "sub/__init__": "from pkg.a import f"},
        {"__init__": "", "a": "from pkg.sub.b import f", "sub/__init__": "import pkg.a", "sub/b": ""},
    ],
    ids=["a package's own file", "by its name", "by a part of its name", "the file of the package that it lies in"],
)
def test_every_kind_of_circle_is_seen(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, text in files.items():
        path = tmp_path / "pkg" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(edges("pkg")).static_order())


def entries_imported(package: str, graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Entry of a package (a file or a folder) -> the other entries that anything in it imports."""
    found: dict[str, set[str]] = {}
    start = f"{package}."
    for own, modules in graph.items():
        if own.startswith(start):
            entries = [name.removeprefix(start).partition(".")[0] for name in (own, *modules) if name.startswith(start)]
            found.setdefault(entries[0], set()).update({*entries[1:]} - {entries[0]})
    return found


def test_no_folder_imports_one_that_imports_it() -> None:
    """Below the rooms too: of any two entries of a folder, only one can know the other."""
    graph = {**edges("ivcp_eval"), **edges("model_adapters")}
    for package in sorted({name for own in graph for name in packages_of(own)}):
        list(graphlib.TopologicalSorter(entries_imported(package, graph)).static_order())


def room(module: str) -> str:
    """``ivcp_eval.engine.cache`` -> ``engine``; empty for what is in no room."""
    first, _, rest = module.partition(".")
    name = rest.partition(".")[0] if first == "ivcp_eval" else first
    return name if name in RANK else ""


def test_imports_run_one_way() -> None:
    backwards = []
    for own, modules in {**edges("ivcp_eval"), **edges("model_adapters")}.items():
        for module in modules:
            mine, other = room(own), room(module)
            if mine and other and other != mine and RANK[other] >= RANK[mine]:
                backwards.append(f"{own}: {module}")
    assert not backwards


# One file a method, a family, a trained part: they may be as many as there are.
PLUGIN_FOLDERS = ("ivcp_eval/methods", "model_adapters", "ivcp_eval/lab/training/parts")


def test_every_room_is_ranked_and_small() -> None:
    assert {path.stem for path in (ROOT / "ivcp_eval").iterdir() if path.stem[0] != "_"} - {"shipped"} <= set(RANK)
    for folder in [folder for package in PACKAGES for folder in ((ROOT / package), *(ROOT / package).rglob("*"))]:
        name = str(folder.relative_to(ROOT))
        if folder.is_dir() and folder.name != "__pycache__" and name not in PLUGIN_FOLDERS:
            entries = [path for path in folder.iterdir() if path.name != "__pycache__"]
            assert len(entries) <= 12, f"{name}: {len(entries)} entries"


# Folders of tests that follow no package, and why.
OWN_TESTS = {
    "engine/contract": "what the engine promises of every method on every family",
    "engine/oracle": "answers of independent code, recorded",
    "methods/oracle": "answers of the authors' own code, recorded",
    "model_adapters/families": "the smallest random model of each family",
    "runs/e2e": "whole evaluations, from the command to the table",
    "runs/sweep": "whole sweeps, killed and continued",
}


def test_tests_mirror_the_package() -> None:
    """A folder of tests is named after the package that it tests, and is small enough to look through."""
    folders = [path for path in (ROOT / "tests").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    for folder in folders:
        name = str(folder.relative_to(ROOT / "tests"))
        if any(name == own or name.startswith(f"{own}/") for own in OWN_TESTS):
            continue
        assert (ROOT / "ivcp_eval" / name).is_dir() or (ROOT / name).is_dir(), f"tests/{name} tests no package"
        entries = [path for path in folder.iterdir() if path.name not in ("__pycache__", "__init__.py")]
        assert len(entries) <= 12 or name == "methods", f"tests/{name}: {len(entries)} entries"


def test_only_the_bridge_imports_vlmeval() -> None:
    bridge = {*sources("ivcp_eval", "vlmeval_bridge")}
    files = [path for package in PACKAGES for path in sources(package) if path not in bridge]
    assert not offenders(files, ("vlmeval",))


@pytest.mark.parametrize("place", ["engine", "runs", "interface", "vlmeval_bridge"])
def test_shared_code_names_no_method_and_no_family(place: str) -> None:
    """A new method or family needs no edit there, so none can be special-cased."""
    names = ({*registry.method_names()} - {"none", "random"}) | {*registry.family_names()}
    found = []
    for path in sources("ivcp_eval", place):
        tree = ast.parse(path.read_text())
        docstrings = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        found += [
            f"{path.name}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node not in docstrings and node.value in names
        ]
    assert not found


def test_datasets_is_data_only() -> None:
    """A package of that name would hide the `datasets` library."""
    assert not list((ROOT / "datasets").rglob("*.py"))


def test_importing_the_package_stays_light() -> None:
    heavy = ("torch", "transformers", "vlmeval", "pandas", "numpy", "torchvision")
    code = (
        "import sys, ivcp_eval, ivcp_eval.interface, ivcp_eval.interface.registry as r;"
        "r.method_names(); r.family_names();"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], []),
        (["published"], []),
        (["compare", "results/tiny.csv", "--resamples", "10"], ["numpy"]),
        (["list", "--all"], ["torch", "numpy"]),
        (["sweep", "plan", "sweeps/smoke.yaml"], ["torch", "numpy"]),
        (["sweep", "status", "sweeps/smoke.yaml"], ["torch", "numpy"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_only_looks_loads_little(arguments: list[str], allowed: list[str]) -> None:
    """Adapters and methods are torch code, so what asks them needs torch; no model and no data set is looked into."""
    heavy = ("torch", "transformers", "vlmeval", "pandas", "numpy", "torchvision", "scipy.stats", "PIL")
    code = (
        "import sys; from ivcp_eval.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == str(allowed)


def test_unknown_attribute_says_what_there_is() -> None:
    import ivcp_eval

    with pytest.raises(AttributeError, match=r"it offers .*prune"):
        ivcp_eval.prun  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_has_a_docstring(package: str) -> None:
    missing = []
    for path in sources(package):
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(f"{path.relative_to(ROOT)}")
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not missing


def test_names_are_the_words_of_the_field() -> None:
    """Words that a reader would have to be told the meaning of; what they stood for has a usual name."""
    odd = {"asked", "company", "dear", "elsewhere", "lacks", "look", "makings", "noted", "told", "wanted"}
    found = []
    for path in [path for package in PACKAGES for path in sources(package) if "lab" not in path.parts]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [getattr(node, name, None) for name in ("id", "attr", "arg", "name")]
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names if str(name).strip("_").lower() in odd]
    assert not found
