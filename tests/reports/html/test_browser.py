"""The page in a real browser that reaches no host: what it shows is what the CSV files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ivcp_eval.files import PACKAGE
from ivcp_eval.reports.html import render
from ivcp_eval.reports.html.model import Report
from ivcp_eval.reports.table import read_samples
from tests.reports.html.browser import NEEDED, asked, dumped

pytest.importorskip("altair", reason="the extra `report` is not installed")
pytestmark = [NEEDED, pytest.mark.slow]

AXE = PACKAGE.parent / ".venv-axe" / "package" / "axe.min.js"
_OVER = """[...document.querySelectorAll("main *")].filter((one) => !one.closest(".wide, svg")
  && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 99))"""
_SERIOUS = """axe.run().then((found) => found.violations.filter((one) => ["serious", "critical"].includes(one.impact))
  .map((one) => [one.id, one.nodes[0].html.slice(0, 200)]))"""


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    render.write(report, path)
    return path


def test_panels_cards_and_cells_are_those_of_the_results(
    page: Path, report: Report, results: Path, tmp_path: Path
) -> None:
    document, log = dumped(page, tmp_path)
    assert 'data-ready="yes"' in document
    assert document.count('data-drawn="done"') == 1 + len(report.panels) + 3 + 1
    assert 'data-drawn="failed"' not in document
    assert not re.search("error|refused|violates", log, re.IGNORECASE), "its policy lets all of it run, and no more"
    cards = re.findall(r'<article class="card picture" id="(picture-\d+)">(.*?)</article>', document, re.DOTALL)
    assert [name for name, _ in cards] == [one.name for one in report.pictures]
    for (_, card), picture in zip(cards, report.pictures, strict=True):
        method, ratio = picture.shown[1].variant.split()
        file = results.parent / f"{picture.benchmark}-{method}-{ratio}-0" / "predictions.csv"
        sample = next(row for row in read_samples(file) if row["index"] == picture.index)
        dropped, merged = (
            re.search(f'class="{name}" d="([^"]*)"', card)[1].count("M")  # type: ignore[index]
            for name in ("dropped", "merged")
        )
        assert dropped == sample["visual_tokens"] - sample["visual_kept"] - 1, "one of them lies in no cell"
        assert f"before layer 3: {sample['visual_kept']} of {sample['visual_tokens']} tokens kept" in card
        assert merged == (dropped if method == "visionzip" else 0)
        if sample["iou"] is not None:
            assert f'class="iou">{sample["iou"]:.3f}<' in card
            assert all(f'class="{kind}"' in card for kind in ("gold", "baseline", "pruned"))


_USE = """(async () => {
  const change = (one, value) => { one.value = value; one.dispatchEvent(new Event("change")); };
  const seen = {};
  const card = document.querySelector(".picture"), slider = card.querySelector("input");
  const cells = (name) => card.querySelector("path." + name).getAttribute("d").split("M").length - 1;
  const option = [...card.querySelectorAll("option")].find((one) => one.text.includes("visionzip"));
  change(card.querySelector("select"), option.value);
  seen.last = [cells("dropped"), cells("merged"), card.querySelector("output").textContent];
  slider.value = 1; slider.dispatchEvent(new Event("input"));
  seen.first = [cells("dropped"), cells("merged"), card.querySelector("output").textContent];
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  seen.none = [cells("dropped"), card.querySelector("output").textContent];
  change(document.querySelector("select[data-filter=kind]"), "gained");
  seen.gained = [...document.querySelectorAll("#flips .card")].filter((one) => !one.hidden).length;
  seen.told = document.getElementById("flips-shown").textContent;
  change(document.querySelector("select[data-shows]"), "flops");
  const flops = document.querySelector("[data-chart=pareto-0-flops]");
  while (flops.dataset.drawn !== "done") await new Promise((then) => setTimeout(then, 50));
  seen.flops = flops.querySelector("svg").textContent.includes("FLOPs of the prefill");
  const heads = [...document.querySelectorAll("#table th button")];
  const head = heads.find((one) => one.textContent === "difference [95 %]");
  const column = head.closest("th").cellIndex;
  const lines = () => [...document.querySelectorAll("#table tbody tr")];
  const rows = () => lines().map((row) => Number(row.cells[column].dataset.value));
  head.click(); seen.up = rows(); seen.sort = head.closest("th").getAttribute("aria-sort");
  head.click(); seen.down = rows();
  seen.focus = [...document.querySelectorAll(".wide")].every((one) => one.tabIndex === 0);
  return seen;
})()"""


def test_slider_filter_plots_and_sorting(page: Path, report: Report, tmp_path: Path) -> None:
    seen = asked(page, tmp_path, _USE)
    assert seen["last"] == [15, 15, "before layer 3: 5 of 21 tokens kept, 15 merged into others"]
    assert seen["first"] == [7, 0, "before layer 2: 13 of 21 tokens kept"]
    assert seen["none"] == [0, "21 tokens before the first cut"]
    gained = sum(one.kind == "gained" for one in report.flips)
    assert seen["gained"] == gained > 0
    assert seen["told"] == f"{gained} of {len(report.flips)} cards"
    assert seen["flops"]
    assert seen["up"] == sorted(seen["up"])
    assert len(seen["up"]) == len(report.comparison.rows)
    assert seen["sort"] == "ascending"
    assert seen["down"] == seen["up"][::-1] or seen["down"] == sorted(seen["up"], reverse=True)
    assert seen["focus"]


_KEYS = """(() => {
  const all = [...document.querySelectorAll("a[href], button, select, input, summary, [tabindex]")];
  const shown = all.filter((one) => one.checkVisibility());
  const reached = shown.filter((one) => { one.focus(); return document.activeElement === one; });
  const changing = [...document.querySelectorAll("[data-filter], [data-shows], .picture input, th button")];
  return {
    first: shown[0].className,
    missed: shown.filter((one) => !one.disabled && !reached.includes(one)).map((one) => one.outerHTML.slice(0, 99)),
    forced: all.filter((one) => one.tabIndex > 0).length,
    changing: changing.length,
    native: changing.every((one) => ["SELECT", "INPUT", "BUTTON"].includes(one.tagName)),
    mouse: [...document.querySelectorAll("[onclick], [role=button]")].filter((one) => one.tagName !== "BUTTON").length,
  };
})()"""


def test_everything_is_reached_with_the_keyboard(page: Path, report: Report, tmp_path: Path) -> None:
    """Browsers operate these elements with Enter, Space and arrows themselves, once they have the focus."""
    seen = asked(page, tmp_path, _KEYS)
    assert seen["first"] == "skip", "what skips to the report comes first"
    assert seen["missed"] == []
    assert seen["forced"] == seen["mouse"] == 0
    assert seen["native"]
    assert seen["changing"] > len(report.pictures)


def test_hostile_texts_run_nothing(hostile: Report, tmp_path: Path) -> None:
    """With its policy and without: the text itself is inert."""
    page = tmp_path / "hostile.html"
    render.write(hostile, page)
    document, _ = dumped(page, tmp_path)
    assert 'data-ready="yes"' in document
    assert "data-owned" not in document.partition(">")[0] + document[:2000]
    seen = asked(
        page, tmp_path, '[document.documentElement.dataset.owned ?? "no", document.images.length, document.title]'
    )
    assert seen[:2] == ["no", 0]


@pytest.mark.parametrize("width", [390, 1280])
def test_no_part_of_the_page_is_wider_than_the_window(page: Path, tmp_path: Path, width: int) -> None:
    assert asked(page, tmp_path, f"[innerWidth, {_OVER}]", width=width) == [width, []]


_SENTENCES = """[...document.querySelectorAll(".whys li")].filter((one) => !one.closest(".wide")
  && one.getBoundingClientRect().right <= innerWidth && one.scrollWidth <= one.clientWidth)
  .map((one) => one.textContent)"""


def test_verdicts_are_read_on_a_telephone_without_scrolling_sideways(
    page: Path, report: Report, tmp_path: Path
) -> None:
    seen = asked(page, tmp_path, _SENTENCES, width=390)
    assert report.decision is not None
    assert report.benched is not None
    said = [one.why for one in report.decision.verdicts]
    said += [one.words for one in (*report.costs, *report.benched.lines) if one.words]
    assert all(line.endswith(f": {why}") for line, why in zip(seen, said, strict=True))


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core here (.ci/run fetches it where npm is)")
def test_axe_finds_nothing_serious(page: Path, tmp_path: Path) -> None:
    assert asked(page, tmp_path, _SERIOUS, AXE.read_text(encoding="utf-8")) == []
