"""``pytest --outcomes FILE --family NAME``: a run that may be stopped at any time and goes on behind what passed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

#: What need not run again.
SETTLED = ("passed", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family", help="only tests of this model family")
    parser.addoption("--outcomes", type=Path, help="append what became of each test; what passed there is left out")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("outcomes"):
        config.pluginmanager.register(Outcomes(path, writes=not hasattr(config, "workerinput")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if family := config.getoption("family"):
        deselect(config, items, [item for item in items if _family(item) == family])


class Outcomes:
    """Appends a line of JSON for every test that has ended, and leaves out those that a line says are settled."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        last = dict(self._lines())
        deselect(config, items, [item for item in items if last.get(item.nodeid) not in SETTLED])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.writes or not (report.when == "call" or report.failed or report.skipped):
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            line["why"] = report.longreprtext[-4000:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))  # begins the line: the one before may have been cut short

    def _lines(self) -> Iterator[tuple[str, str]]:
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            with suppress(json.JSONDecodeError):
                line = json.loads(text)
                yield line["test"], line["outcome"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # With pytest-xdist this process has not collected, and so left out, anything itself.
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and any(self._lines()):
            session.exitstatus = pytest.ExitCode.OK


def _family(item: pytest.Item) -> str | None:
    """Of the test's case, or its parameter."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return getattr(parameters.get("case"), "family", parameters.get("family"))


def deselect(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    """Reduce ``items`` to ``kept``."""
    staying = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in staying])
    items[:] = kept
