"""`ivcp method new NAME` and `ivcp method check NAME`: a first file with its test, and the contract in words."""

from __future__ import annotations

import keyword
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from ivcp_eval import files
from ivcp_eval.files import atomic_write
from ivcp_eval.interface import plugins
from ivcp_eval.interface.plugins import NAME
from ivcp_eval.interface.registry import make_method, method_names, module_names, unwrapped_name

NO_CHECKOUT = (
    "{what} in a checkout of ivcp-eval, and neither this installed package nor the current folder is one: clone the "
    "repository and run the command in it. (A method needs no checkout to be used: see CONTRIBUTING.md, 'A method in a "
    "package of your own'.)"
)
PLACEHOLDERS = ("0000.00000", "OWNER/REPOSITORY")

METHOD = '''\
"""Keeps the visual tokens whose hidden states are longest.

Paper: https://arxiv.org/abs/0000.00000 (eq. 1)
Reference: https://github.com/OWNER/REPOSITORY @ 0000000

Differs: the sentence above is the method's line in every table; name here whatever your code does unlike the paper or
its code, or say that nothing differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ivcp_eval.interface import AbstractScorer, Cut, Faithfulness, ModelFacts, Signal, Signals


@dataclass(frozen=True)
class Method(AbstractScorer):
    """{title}.

    Attributes:
        layer: decoder layer whose input is cut.
    """

    # "query", "key", "value": projections of the layer before the cut; "vision": signals of the vision tower.
    needs: ClassVar[frozenset[Signal]] = frozenset()
    faithfulness: ClassVar[Faithfulness] = "variant"  # "faithful" once checked against the authors' code

    layer: int = 2

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Where to cut, and whose caches lose the tokens."""
        return (Cut(max(self.layer, model.first_cut), ratio, cache="from_cut"),)

    def score(self, signals: Signals) -> Tensor:
        """(V,) one number per visual token; the best of each image stay. `AbstractMethod.select` chooses sets."""
        return signals.hidden[signals.visual].float().norm(dim=-1)
'''

TEST = '''\
"""Oracle: the formula with Python loops. It shares no code with the method."""

from __future__ import annotations

from ivcp_eval.interface.registry import make_method
from tests.methods.material import best, random_signals


def test_formula() -> None:
    signals = random_signals((3, 5), (2, 4), ratio=0.4)
    scores = [float(signals.hidden[v].double().norm()) for v in signals.visual.tolist()]
    wanted = best(scores[:15], 6) + [15 + i for i in best(scores[15:], 3)]  # 40 % of each image
    assert make_method("{name}").select(signals).keep.tolist() == wanted
'''


def checkout(what: str) -> Path:
    """Root of the checkout: the one that this package is imported from, else the current folder.

    Args:
        what: begins the sentence of the error, such as "the contract is".

    Raises:
        FileNotFoundError: neither is a checkout.
    """
    for folder in (files.CHECKOUT, Path.cwd()):
        if folder is not None and (folder / "tests" / "engine" / "contract").is_dir():
            return folder
    raise FileNotFoundError(NO_CHECKOUT.format(what=what))


def new_method(name: str, folder: str | Path | None = None) -> tuple[Path, Path]:
    """Write a method that runs, and its test, into a checkout.

    Args:
        name: what users will type. folder: root of the checkout (default: see `checkout`).

    Returns:
        Paths of the method and of its test.

    Raises:
        ValueError: the name cannot be a file of Python, or is taken; nothing is written.
        FileNotFoundError: there is no checkout to write into.
    """
    if not re.fullmatch(NAME, name) or keyword.iskeyword(name):
        raise ValueError(
            f"method name {name!r} must be lower-case words of letters and digits, joined by single underscores, such "
            "as 'fastv' or 'my_method'"
        )
    root = checkout("a new method is a file") if folder is None else Path(folder)
    method, test = root / "ivcp_eval" / "methods" / f"{name}.py", root / "tests" / "methods" / f"test_{name}.py"
    if name in method_names() or method.exists() or test.exists():
        raise ValueError(f"method {name!r} exists already; choose another name")
    for path, text in ((method, METHOD.replace("{title}", name)), (test, TEST.replace("{name}", name))):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            stream.write(text)
    return method, test


@dataclass
class CheckReport:
    """What the contract said of one method.

    Attributes:
        passed: checks that held. failures: one sentence each. unsupported: families it cannot run on, with reasons.
        todo: what the file lacks before it can be merged; no failure of the method.
    """

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """For the terminal."""
        lines = [f"not run: {reason}" for reason in self.unsupported]
        lines += [f"FAILED: {failure}" for failure in self.failures]
        lines += [f"to do before merging: {what}" for what in self.todo]
        lines.append(f"{self.passed} checks passed, {len(self.failures)} failed")
        return "\n".join(lines)


def check_method(
    name: str, families: Sequence[str] | None = None, progress: Callable[[str], None] | None = None
) -> CheckReport:
    """Run the correctness contract for one method (wrapped too) on tiny models of every family, or of ``families``.

    Args:
        progress: called with each family's name before it is checked.

    Raises:
        ValueError: unknown method or family.
        FileNotFoundError: not in a checkout; the contract is not part of the installed package.
    """
    from ivcp_eval.interface.registry import unknown

    root = checkout("the contract is")
    _import_tests(root)
    known = import_module("tests.engine.tiny_models").names()
    for family in families or ():
        if family not in known:
            raise unknown("family with a tiny model", family, known)
    report = CheckReport()
    problem = _cannot_be_made(name)
    if problem:
        report.failures.append(problem)
        return report
    if name in module_names("ivcp_eval.methods"):  # not a plug-in's or a wrapper's
        _check_docstring(root, name, report)
    for family in families or known:
        if progress is not None:
            progress(family)
        _check_on(name, family, report)
    if not report.passed and not report.failures:
        report.failures.append("it runs on none of these families, so nothing was checked")
    return report


def _import_tests(root: Path) -> None:
    """Import ``tests`` from the checkout, and nothing else from there: what is checked is what is installed."""
    folder = root / "tests"
    loaded = sys.modules.get("tests")
    if loaded is None or Path(str(loaded.__file__)).parent != folder:
        spec = spec_from_file_location("tests", folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules["tests"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tests"])
    import_module("tests.conftest")


def _check_docstring(root: Path, name: str, report: CheckReport) -> None:
    from ivcp_eval.methods._cards import MethodCard

    folder = files.PACKAGE / "methods"
    package = folder / name / "__init__.py"
    try:
        card = MethodCard.read(package if package.exists() else folder / f"{name}.py", name)
    except ValueError as error:
        report.failures.append(str(error))
        return
    for placeholder in PLACEHOLDERS:
        if placeholder in card.paper + card.reference:
            report.todo.append(f"the docstring still holds the template's {placeholder!r}")
    if card.faithfulness != "control" and not card.paper:
        report.todo.append("the docstring has no 'Paper:' line with a URL and an equation")
    if not (root / "tests" / "methods" / f"test_{name}.py").exists():
        report.todo.append(f"there is no oracle: tests/methods/test_{name}.py")


def _cannot_be_made(name: str) -> str:
    """Why there is no instance at all; raises ValueError for an unknown name."""
    base, _ = unwrapped_name(name)
    if base not in module_names("ivcp_eval.methods"):
        make_method(name)  # a plug-in's loader finds its own words
        return ""
    try:
        wrong = plugins.wrong(import_module(f"ivcp_eval.methods.{base}").Method)
        if not wrong:
            make_method(name)
    except Exception as error:  # whatever is wrong with the file is what the user asked to see
        return f"ivcp_eval/methods/{base}.py cannot be used: {_words(error)}"
    return f"ivcp_eval/methods/{base}.py: `Method` {wrong}" if wrong else ""


def _check_on(name: str, family: str, report: CheckReport) -> None:
    from ivcp_eval.interface import Unsupported

    case = import_module("tests.engine.contract.cases").Case(family, name)
    try:
        problem = _check_basics(case)
    except Unsupported as reason:
        report.unsupported.append(f"{family}: {reason}")
        return
    except Exception as error:  # whatever the method does wrong is what the user asked to see
        problem = _words(error) + _hint(case, error)
    if problem:  # said once; most of the contract would fail for the same reason
        report.failures.append(f"{family}: {problem}")
        return
    skipped = import_module("pytest").skip.Exception
    for check, function in import_module("tests.engine.contract.checks").CHECKS.items():
        promise = " ".join((function.__doc__ or check).split())
        try:
            function(case)
            report.passed += 1
        except skipped:
            continue
        except Exception as error:  # as above
            report.failures.append(f"{family}, {check} ({promise}): {_words(error)}")


def _check_basics(case: Any) -> str:
    """One prompt twice: what is wrong with the choice itself, in words; empty if nothing is."""
    inputs = case.inputs("t5 i0 t9")
    keeps = []
    for _ in range(2):
        with case.prune() as recording:
            # The engine has its own reference to the instance, so the recorder is wrapped once more, in place.
            inner = recording.method.select
            changed: list[str] = []

            def watched(signals: Any, inner: Any = inner, changed: list[str] = changed) -> Any:
                before = {name: value.clone() for name, value in vars(signals).items() if hasattr(value, "clone")}
                answer = inner(signals)
                changed += [name for name, value in before.items() if not value.equal(getattr(signals, name))]
                return answer

            object.__setattr__(recording.method, "select", watched)
            case.forward(inputs)
        if changed:
            return f"`select` changed signals.{changed[0]} in place; work on a copy"
        if broken := sum(recording.run.nonfinite_scores):
            return f"{broken} scores are not finite (NaN or infinite); they rank lowest, so position decides"
        keeps.append([selection.keep.tolist() for _, selection in recording.calls])
    if keeps[0] != keeps[1]:
        return "the same prompt was answered differently the second time; draw from signals.generator and nothing else"
    return ""


def _hint(case: Any, error: Exception) -> str:
    if "NoneType" not in str(error):
        return ""
    needs = ", ".join(sorted(case.make().needs)) or "nothing"
    return f" (a signal that is not declared is None; `needs` declares {needs})"


def _words(error: BaseException) -> str:
    """The error in one line, with the line of code that raised it unless it speaks for itself."""
    first = (str(error).strip() or "no message").split("\n", 1)[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    at = ""
    if frames and (not str(error).strip() or "methods" in Path(frames[-1].filename).parts):
        at = f", at {Path(frames[-1].filename).name}:{frames[-1].lineno} `{frames[-1].line}`"
    return f"{type(error).__name__}: {first}{at}"
