"""Which files a cell's code hash covers, on the package itself and on a copy in which files are changed."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ivcp_eval.interface import registry
from ivcp_eval.runs.planning import closure
from ivcp_eval.runs.planning.closure import OUTSIDE, ROOT, code_of, syntax_digest

PACKAGE = ROOT / "ivcp_eval"


def covered(method: str = "fastv", family: str = "llava") -> set[str]:
    return set(code_of(method, family).files)


def test_the_core_is_what_answers_and_verdicts_are_made_with() -> None:
    here = {path for path in covered("none") if not path.startswith(("model_adapters/", "ivcp_eval/methods/"))}
    folders = ("engine", "interface", "benchmarks", "vlmeval_bridge", "runs/answering")
    there = {p.relative_to(ROOT).as_posix() for folder in folders for p in (PACKAGE / folder).rglob("*.py")}
    assert here - there == {"ivcp_eval/runs/__init__.py"}, "no reports, commands, records or plans"
    left_out = {path.removeprefix("ivcp_eval/").removesuffix(".py") for path in there - here}
    assert {path for path in left_out if not path.startswith(("engine/cost/", "benchmarks/refcoco/"))} == {
        *("interface/failures", "interface/marked", "interface/models", "interface/plugins", "interface/registry"),
        *("interface/records/drawing", "interface/records/sheets", "vlmeval_bridge/reading/own"),
        *("interface/variants", "benchmarks/__init__", "benchmarks/published", "vlmeval_bridge/cpu_torchvision"),
        *("runs/answering/cpu", "runs/answering/live", "runs/answering/timing"),
        *(f"runs/answering/served/{name}" for name in ("__init__", "endpoint", "samples", "times")),
        *("vlmeval_bridge/judge/cache", "vlmeval_bridge/judge/config", "vlmeval_bridge/judge/estimate"),
    }


def test_everything_that_is_left_out_is_there() -> None:
    """A module that was moved would otherwise be hashed again, or its new name be left out without a reason."""
    assert [name for name in OUTSIDE if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
            and not (ROOT / name.replace(".", "/") / "__init__.py").is_file()] == []  # fmt: skip


def test_a_method_and_a_family_bring_what_they_import() -> None:
    assert covered("fastv") - covered("none") == {"ivcp_eval/methods/fastv.py"}
    wrapped = covered("fastv+ivc") - covered("fastv")
    assert wrapped == {"ivcp_eval/methods/_plus_ivc.py", "ivcp_eval/methods/_wrapping.py"}
    own = covered("ivc_prune") - covered("none")
    assert {"ivcp_eval/methods/ivc_prune/__init__.py", "ivcp_eval/methods/ivc_prune/official.py"} <= own
    parts = covered("none", "deepseek_vl2") - covered("none", "llava")
    assert "model_adapters/deepseek_vl2/modeling.py" in parts, "through relative and function-level imports"
    assert not any("internvl" in path for path in covered("none", "deepseek_vl2"))


def test_a_plug_ins_method_has_the_core_and_the_family() -> None:
    assert covered("none") - covered("of_another_package") == {
        "ivcp_eval/methods/none.py",
        "ivcp_eval/methods/_uncut.py",
    }
    assert covered("of_another_package") < covered("none")


def test_what_a_server_answers_does_not_depend_on_the_engine() -> None:
    served = set(code_of("deployed", "llava", served=True).files)
    assert {"ivcp_eval/runs/answering/served/endpoint.py", "ivcp_eval/vlmeval_bridge/judge/transport.py"} <= served
    assert not any(path.startswith("ivcp_eval/engine/") or path.endswith("/session.py") for path in served)
    assert "ivcp_eval/runs/answering/served/endpoint.py" not in covered("none")


def test_all_of_it_takes_little_time() -> None:
    code_of.cache_clear()
    closure._tree.cache_clear()
    start = time.process_time()
    for method in registry.module_names("ivcp_eval.methods"):
        for family in registry.family_names():
            code_of(method, family)
    first = time.process_time() - start
    assert first < 2, "0.17 s on an idle machine"
    start = time.process_time()
    code_of("fastv", "llava")
    assert time.process_time() - start < first / 10, "once per process"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Callable[[str, str], str]]:
    """A copy of the packages with files changed; (method, family) -> code hash there."""

    def changed(path: str = "", change: Callable[[str], str] = lambda text: text) -> Callable[[str, str], str]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for package in ("ivcp_eval", "model_adapters"):
            for source in (ROOT / package).rglob("*.py"):
                target = root / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        if path:
            file = root / path
            file.write_text(change(file.read_text(encoding="utf-8") if file.is_file() else ""), encoding="utf-8")
        return lambda method, family: code_of(method, family, root).hash

    return changed


CELLS = [("fastv", "llava"), ("divprune", "llava"), ("fastv", "qwen2_vl"), ("fastv+ivc", "llava"), ("none", "internvl")]
STATEMENT = "\nADDED = 1\n"


@pytest.mark.parametrize(
    ("path", "text", "hit"),
    [
        ("ivcp_eval/methods/mine.py", STATEMENT, set()),  # a new method
        ("model_adapters/mine.py", STATEMENT, set()),
        ("ivcp_eval/methods/iwp.py", STATEMENT, set()),
        ("ivcp_eval/reports/compare.py", STATEMENT, set()),
        ("ivcp_eval/cli/__init__.py", STATEMENT, set()),
        ("ivcp_eval/engine/cost/flops.py", STATEMENT, set()),
        ("ivcp_eval/runs/records/record.py", STATEMENT, set()),
        ("ivcp_eval/engine/hooks/__init__.py", "\n# A comment.\n", set()),
        ("ivcp_eval/methods/fastv.py", "\n# A comment.\n", set()),
        ("ivcp_eval/methods/fastv.py", STATEMENT, {0, 2, 3}),
        ("ivcp_eval/methods/_plus_ivc.py", STATEMENT, {3}),
        ("model_adapters/llava.py", STATEMENT, {0, 1, 3}),
        ("model_adapters/_internvl_checkpoint.py", STATEMENT, {4}),
        ("ivcp_eval/engine/hooks/__init__.py", STATEMENT, {0, 1, 2, 3, 4}),
        ("ivcp_eval/vlmeval_bridge/judge/questions.py", STATEMENT, {0, 1, 2, 3, 4}),
        ("ivcp_eval/benchmarks/boxes.py", STATEMENT, {0, 1, 2, 3, 4}),
    ],
)
def test_what_a_change_costs(
    copied: Callable[..., Callable[[str, str], str]], path: str, text: str, hit: set[int]
) -> None:
    changed = copied(path, lambda before: before + text)
    assert {i for i, cell in enumerate(CELLS) if changed(*cell) != code_of(*cell).hash} == hit


def test_imports_for_type_checkers_do_not_count_and_those_beside_them_do() -> None:
    text = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\nif typing.TYPE_CHECKING:\n    import c\nimport d"
    assert set(closure._imports(ast.parse(text), "package")) == {"b", "d"}


def test_versions_of_what_changes_pixels_or_tokens_belong_to_a_cell() -> None:
    from ivcp_eval.runs.planning.cells import versions

    known = {"torch", "transformers", "vlmeval", "tokenizers", "pillow", "torchvision", "numpy"}
    assert known <= versions().keys()
    assert "missing" not in versions().values()


def test_docstrings_cost_nothing_and_other_texts_do(copied: Callable[..., Callable[[str, str], str]]) -> None:
    path = "ivcp_eval/methods/fastv.py"
    title = (ROOT / path).read_text(encoding="utf-8").split("\n", 1)[0]
    documented = copied(path, lambda text: text.replace(title, '"""Said otherwise.'))
    assert documented("fastv", "llava") == code_of("fastv", "llava").hash
    digest = lambda text: syntax_digest(ast.parse(text))  # noqa: E731
    assert digest('def f():\n    """a"""\n    return 1') == digest("def f():\n\n    return 1  # b")
    assert digest("x = f'{a} b'") != digest("x = f'{a} c'")
    assert digest("x = f'{a!r}'") != digest("x = f'{a}'")
    assert digest("x = f'{a:.2f}'") != digest("x = f'{a:.3f}'")
    assert digest("x = 'a'") != digest("x = b'a'")
    assert digest("x = 1") != digest("x = 1.0") != digest("x = True")
    assert digest("x: int = 1") != digest("x: float = 1")
    assert digest("f(*a)") != digest("f(**a)")
    assert digest("x = [a, b]") != digest("x = (a, b)")
    assert digest("global_ = lambda: None") != digest("global_ = lambda a: None")


SAMPLE = '''
"""A docstring."""
from __future__ import annotations
import a.b as c
from . import d
@e(1, *f, g=h)
class I(J, metaclass=K):
    """Another."""
    l: int | None = field(default=3.5e-7)
    async def m(self, n, /, o: str = u"\\u00e4\\U0001f600", *p, q=b"\\xff", **r) -> None:
        async with s as t, u(): await v
        match w:
            case {"x": [1, *_], **rest} if y: pass
            case K(z=1) | None: return
            case _: raise E from None
        try: x = f"{a!r:>{b}} {c=} " "d" f"{{}}{e:%H:%M}" f""
        except* (F, G) as h: del x[1:2, ...]
        else: global y
        finally: assert (z := 3) < -4 <= 5j, "no"
        return [i for i in j if i for k in l], {**m}, {1: 2}, lambda *, a=1: ~a
'''
RECORDED = "7053d8df922a1863"


def test_the_digest_is_the_same_in_every_version_of_python() -> None:
    """Recorded once; equal in 3.11, 3.12 and 3.13, of which those that are on the machine are asked."""
    assert syntax_digest(ast.parse(SAMPLE)) == RECORDED
    program = "import ast, json, sys; from ivcp_eval.runs.planning.closure import syntax_digest as d, code_of\n"
    program += "text = json.load(sys.stdin); print(d(ast.parse(text)), code_of('ivc_prune+ivc', 'deepseek_vl2').hash)"
    expected = f"{RECORDED} {code_of('ivc_prune+ivc', 'deepseek_vl2').hash}"
    for name in ("python3.11", "python3.12", "python3.13"):
        command = shutil.which(name)
        if command is None or subprocess.run([command, "-c", ""], capture_output=True, check=False).returncode:
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [command, "-c", program],
            input=json.dumps(SAMPLE),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected, name
