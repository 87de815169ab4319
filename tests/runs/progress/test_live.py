"""Every cell of a sweep, on a page that its workers keep up to date and on a terminal: the counts of the watch."""

from __future__ import annotations

import io
import os
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.files import hold_lock, write_json
from ivcp_eval.runs.planning.plan import RunPlan, make
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.runs.progress import display, grid, page
from ivcp_eval.runs.progress.display import Progress
from ivcp_eval.runs.progress.watch import Watch
from ivcp_eval.runs.progress.words import summary
from ivcp_eval.runs.records.state import lease
from ivcp_eval.runs.store.lease import claim, holders
from tests.runs.conftest import Bench
from tests.runs.progress.test_progress import answer, finish, score

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"&$now\x1b[31m"


class Page(HTMLParser):
    """Tags, classes of the cells, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.cells: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "td":
            self.cells.append(str(dict(attrs)["class"]))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def plan(bench: Bench) -> RunPlan:
    bench.spec.write_text(bench.spec.read_text() + 'name: "<b>bold & $now"\n')
    return make(load(bench.spec), bench.folder / "runs")


def test_states_of_cells_and_one_source_of_all_counts(plan: RunPlan) -> None:
    first, second = [unit for unit in plan.units() if unit.benchmark.name == "tiny_mcq"]
    other = next(unit for unit in plan.units() if unit.benchmark.name == "tiny_yes_no")

    def states() -> list[tuple[str, int, str]]:
        watch.refresh()
        return [(cell.state, cell.answered, cell.reason) for cell in watch.cells() if cell.benchmark == "tiny_mcq"]

    watch = Watch(plan)
    assert states() == [("waiting", 0, "")] * 5
    assert [cell.variant for cell in watch.cells()][:3] == ["none", "ivc_prune__r0.75", "ivc_prune__r0.5"]
    with claim(lease(plan, first.name)):
        answer(first, "a", cells=2)
        assert states() == [("running", 1, "")] * 2 + [("running", 0, "")] * 3
        answer(first, "b", error=f"ValueError: {HOSTILE}\nTraceback")
        assert states()[0] == ("running", 1, f"ValueError: {HOSTILE}")
    finish(plan, first, answered=3, failed=1)
    assert [state[:2] for state in states()] == [("waiting", 3)] * 5
    finish(plan, second, answered=2)
    assert [state[:2] for state in states()] == [("answered", 5)] * 5
    for cell, status in zip(first.cells, ("ok", "ok", "incomplete", "failed", "skipped"), strict=True):
        score(cell, status)
        write_json(cell.record, {"status": status, "reason": "" if status == "ok" else HOSTILE[:80]})
    plan.problems.append(HOSTILE)
    with claim(lease(plan, other.name)):
        assert [state for state, *_ in states()] == ["scored", "scored", "failed", "failed", "skipped"]
        text = page.render(watch)
        lines = grid.lines(watch, 60)
    seen, total = Page(text), watch.total
    expected = ["scored", "scored", "failed", "failed", "skipped"] + ["running"] * 5
    assert sorted(seen.cells) == sorted(expected) == sorted(cell.state for cell in watch.cells())
    assert f"{total.answered} of {total.samples} samples, {summary(watch)}" in seen.text
    assert (total.scored, total.broken) == (5, 2)
    assert "5/10 cells scored, 2 of them not whole, 1 at work" in seen.text
    assert f"process {os.getpid()} on " in seen.text
    assert "last sign of life 0 s ago" in seen.text

    assert seen.text.count("<script>alert(1)</script>") == 4, "three cells and a problem, as text"
    assert "<b>bold & $now" in seen.text
    assert not {"script", "img", "link", "a", "iframe", "form"} & seen.tags.keys()
    assert not {name for name in seen.attributes if name.startswith("on")} | ({"src", "href"} & seen.attributes)
    assert "//" not in re.sub(r"</?\w+>", "", text), "no address of any host"
    assert "default-src 'none'" in text
    assert '<meta http-equiv="refresh" content="10">' in text

    assert max(map(len, lines)) <= 60
    assert all(line.isprintable() for line in lines), "no escape sequence"
    assert "tiny on tiny_mcq: 5/5  ##XX-" in lines
    assert "tiny on tiny_yes_no: 0/5  >>>>>" in lines
    assert lines[0].startswith("<b>bold & $now: 5/10 samples")


def test_a_page_is_written_now_and_then_and_by_one(plan: RunPlan, tmp_path: Path) -> None:
    watch, path = Watch(plan), tmp_path / "status.html"
    plan.problems.append("half a character: \ud800")  # as file names may have it
    assert page.refresh(watch, path)
    first = path.read_bytes()
    assert not page.refresh(watch, path), "it is new"
    assert path.read_bytes() == first
    for age in (20, -20):  # of a clock that was set back
        os.utime(path, (time.time() - age,) * 2)
        assert page.refresh(watch, path)
    with (plan.state / "page.lock").open("a") as lock:
        hold_lock(lock, path)
        assert not page.refresh(watch, path, every=0), "another process writes it"
    assert page.refresh(watch, path, every=0)
    assert [found.name for found in tmp_path.glob("*status*")] == ["status.html"], "nothing beside it"


def test_workers_keep_the_page_up_to_date(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(display, "REFRESH_S", 0.05)
    monkeypatch.setattr(page, "EVERY_S", 0.1)
    pages, render = [], page.render
    monkeypatch.setattr(page, "render", lambda watch: pages.append(render(watch)) or pages[-1])
    path = tmp_path / "status.html"
    assert bench.call("work", "--quiet", "--html", str(path)) == 0
    states = [Page(text).cells for text in pages]
    assert any("running" in cells for cells in states), "while it works"
    assert states[-1] == Page(path.read_text()).cells == ["scored"] * 10
    assert 'http-equiv="refresh"' in pages[0]
    assert 'http-equiv="refresh"' not in path.read_text(), "complete: there is nothing to wait for"
    plan = make(load(bench.spec), bench.folder / "runs")
    with claim(lease(plan, "time.tiny.tiny_mcq")):
        assert 'http-equiv="refresh"' in render(Watch(plan)), "scored, and being timed"
    path.unlink()
    capsys.readouterr()
    assert bench.call("status", "--html", str(path)) == 0
    assert "0 samples left" in capsys.readouterr().out
    assert Page(path.read_text()).cells == states[-1]


def test_a_page_that_cannot_be_written_costs_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(display, "REFRESH_S", 0.05)

    def full(*_: Any, **__: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "refresh", full)
    path = tmp_path / "status.html"
    assert bench.call("run", "--html", str(path)) == 0
    said = capsys.readouterr().out
    assert said.count(f"{path} is not kept up to date, the work goes on: [Errno 28] No space left on device") == 1
    assert "10/10 samples" in said
    for wrong in (tmp_path, tmp_path / "none" / "status.html"):
        with pytest.raises(SystemExit):
            bench.call("status", "--html", str(wrong))
        assert "name a file, e.g. status.html" in " ".join(capsys.readouterr().err.split())


class Terminal(io.StringIO):
    """Takes what a terminal would."""

    def isatty(self) -> bool:
        return True


def test_the_grid_is_redrawn_in_place_and_silent_in_files(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "REFRESH_S", 0.01)
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("LINES", "6")
    out = Terminal()
    with Progress(plan, stream=out, cells=True) as progress:
        answer(plan.units()[0], "a")
        end = time.monotonic() + 20
        while ": 1/5" not in out.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        assert not progress.complete
    drawings = out.getvalue().split("\x1b[H")[1:]
    assert len(drawings) >= 2
    for drawing in drawings:
        assert drawing.endswith("\x1b[J")
        lines = drawing.removesuffix("\x1b[J").split("\x1b[K\n")
        assert lines.pop() == ""
        assert len(lines) < 6
        assert max(map(len, lines)) <= 50
    assert "more lines: make the window higher" in drawings[-1]
    log = io.StringIO()
    with Progress(plan, stream=log, every=0.01, cells=True):
        time.sleep(0.1)
    assert log.getvalue() == ""


def test_who_is_at_work_and_since_when(plan: RunPlan) -> None:
    path = lease(plan, "some.unit")
    with claim(path):
        started = path.stat().st_mtime
        os.utime(path, (started - 30,) * 2)
        path.with_name("dead.lease").write_text('{"host": "node-7", "pid": 7, "token": "x"}')
        os.utime(path.with_name("dead.lease"), (started - 3600,) * 2)
        (holder,) = holders(path.parent)
    assert holder.claim == "some.unit"
    assert holder.silent_s == pytest.approx(30, abs=5)
    assert holder.held_s == pytest.approx(0, abs=5)
    path.with_name("old.lease").write_text('{"host": "node-7", "pid": 7, "token": "x"}')  # of an earlier version
    (holder,) = holders(path.parent)
    assert grid.worker(holder) == "process 7 on node-7 at old, last sign of life 0 s ago"


def test_cells_of_one_loading_are_scored_before_those_of_another(bench: Bench) -> None:
    text = bench.spec.read_text()
    bench.spec.write_text(text.replace("controls: []", "controls: [{method: again, parameters: {attention: eager}}]"))
    plan = make(load(bench.spec), bench.folder / "runs")
    watch = Watch(plan)
    assert watch.total.samples == 2 * 2 * 5, "both benchmarks for each of two loadings"
    mine = [unit for unit in plan.units() if unit.placement == plan.models["tiny"].placement]
    assert len(mine) == len(plan.units()) / 2
    for unit in mine:
        finish(plan, unit, answered=unit.stop - unit.start)
        for cell in unit.cells:
            cell.folder.mkdir(parents=True, exist_ok=True)
            score(cell)
    watch.refresh()
    assert Counter(cell.state for cell in watch.cells()) == {"scored": 10, "waiting": 2}
    assert (watch.total.scored, watch.total.answered) == (10, 10)
