"""The page: blocks in their order, nothing from outside, no attack that comes with results, limits held."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.html import render
from ivcp_eval.reports.html.model import Panel, Report
from tests.reports.html.conftest import HOSTILE

altair = pytest.importorskip("altair", reason="the extra `report` is not installed")
pytest.importorskip("vl_convert", reason="the extra `report` is not installed")

from jsonschema import ValidationError  # noqa: E402

from ivcp_eval.reports.html import charts  # noqa: E402

BLOCKS = ["verdict", "floor", "pareto", "panels", "table", "flips", "pictures-block", "abilities", "cost", "provenance"]


class Parsed(HTMLParser):
    """Start tags with their attributes, and the text of scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.text: list[str] = []
        self.script: dict[str, str] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.script = self.tags[-1][1] if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self.script = None

    def handle_data(self, data: str) -> None:
        if self.script is None:
            self.text.append(data)
        else:
            self.scripts.append((self.script, data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render.page(report)


@pytest.fixture(scope="module")
def parsed(page: str) -> Parsed:
    return Parsed(page)


def test_ten_blocks_in_order(parsed: Parsed, report: Report) -> None:
    assert [section["id"] for section in parsed.all("section")] == BLOCKS
    assert [link["href"] for link in parsed.all("a")][1:11] == [f"#{name}" for name in BLOCKS]
    classes = [attributes.get("class", "") for attributes in parsed.all("article")]
    assert sum(name.startswith("card picture") for name in classes) == len(report.pictures)
    assert len(classes) == report.cards <= 200
    assert len([one for one in parsed.all("figure") if one.get("class") == "panel"]) == len(report.panels) == 2
    text = "".join(parsed.text)
    assert "GO if on every benchmark a loss of 5 % of the scale or more is refuted" in text
    assert "but no time saved: the prefill is slower" in text
    assert "fastv 0.1: skipped (no such layer)" in text
    assert "ivcp report r.csv" in text


def test_costs_of_a_bench_stand_below_those_of_the_results(parsed: Parsed, report: Report) -> None:
    """The file beside the results holds one pruned variant and the unpruned model, four requests at a time."""
    assert report.benched is not None
    assert [one.variant for one in report.benched.lines] == ["unpruned", "fastv 0.5"]
    shown = "".join(parsed.text).partition("Measured by a bench")[2].partition("10. Provenance")[0]
    words = "50 % of the tokens saved, 30 % of the time of the prefill saved"
    assert f"fastv 0.5, 4 at a time: {words}" in shown
    assert "0.80x [0.79, 0.81]" in shown
    assert "H100, bfloat16, sdpa; 64 visual and 10 text tokens in, 8 out" in shown
    assert "No cost of tiny visionzip 0.25: its method is visionzip, the bench has fastv" in shown
    assert {7200, 9000} <= {float(one["data-value"]) for one in parsed.all("td") if one.get("data-value")}
    without = "".join(Parsed(render.page(replace(report, benched=None))).text)
    assert "Measured by a bench" not in without


def test_nothing_comes_from_outside(parsed: Parsed, page: str) -> None:
    for _, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert not attributes.get(name) or attributes[name].startswith(("#", "data:image/jpeg;", "data:text/csv;"))
    policy = next(one["content"] for one in parsed.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    for attributes, script in parsed.scripts:
        if "type" not in attributes:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
    assert len(parsed.scripts) == 4


def test_table_and_csv_are_the_comparison(parsed: Parsed, report: Report) -> None:
    (link,) = [one for one in parsed.all("a") if "download" in one]
    assert link["download"] == "r.comparison.csv"
    text = base64.b64decode(link["href"].partition(",")[2]).decode()
    stream = io.StringIO()
    report.comparison.to_csv(stream)
    assert text == stream.getvalue()
    lines = list(csv.DictReader(io.StringIO(text)))
    shown = [float(one["data-value"]) for one in parsed.all("td") if one.get("data-value")]
    for line in lines:
        assert float(f"{float(line['difference']):.6g}") in shown


def test_specs_are_valid(report: Report) -> None:
    found = charts.charts(report)
    kinds = [name.split("-")[0] for name in found]
    assert {kind: kinds.count(kind) for kind in kinds} == {"pareto": 5, "panel": 2, "position": 3, "ability": 1}
    for name in ("pareto-0-layers", "panel-0", "position-0", "ability-0"):
        altair.Chart.from_dict(found[name].to_dict(validate=False), validate=True)
    with pytest.raises(ValidationError, match="3 is not of type 'array'"):
        altair.Chart.from_dict({**found["panel-0"].to_dict(validate=False), "layer": 3}, validate=True)


def layers(panel: Panel, report: Report) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(mark, values) of each layer of a panel's plot."""
    spec = charts.panel(panel, report.methods).to_dict(validate=False)
    return [(layer["mark"], spec["datasets"][layer["data"]["name"]]) for layer in spec["layer"]]


def test_plots_draw_intervals_the_floor_and_hollow_marks(report: Report) -> None:
    panel = max(report.panels, key=lambda panel: panel.floor)
    assert panel.floor > 0
    own = [mark for mark in panel.marks if not mark.random]
    solid, worse = (replace(mark, better=better) for mark, better in zip(own, (True, False), strict=True))
    panel = replace(panel, marks=(solid, worse, *(mark for mark in panel.marks if mark.random)))
    drawn = layers(panel, report)
    kinds = ["rect", "rule", "area", "line", "rule", "point", "line", "rule", "point", "point"]
    assert [mark["type"] for mark, _ in drawn] == kinds
    assert drawn[0][1] == [{"low": panel.baseline - panel.floor, "high": panel.baseline + panel.floor}]
    for (_, (value,)), mark in zip(drawn[-2:], (solid, worse), strict=True):
        assert value["variant"] == mark.variant
        assert (value["score"], value["low"], value["high"]) == (mark.score, mark.low, mark.high)
        assert value["cost"] == mark.costs["layers"]
    assert [mark.get("fill") for mark, _ in drawn[-2:]] == [None, "white"]
    unknown = layers(replace(panel, floor=float("nan"), marks=(replace(solid, better=None),)), report)
    assert [mark["type"] for mark, _ in unknown] == ["rule", "line", "rule", "point"], (
        "no stripe, no random, one hollow"
    )
    assert unknown[-1][0]["fill"] == "white"


def test_a_floor_of_no_width_is_said_in_words(report: Report, page: str) -> None:
    """Where no benchmark changed its score, a stripe would have no width."""
    moved = [panel for panel in report.panels if panel.floor > 0]
    assert moved
    assert "Grey stripe: the noise floor." in page
    assert page.count("No grey stripe: no benchmark changed its score") == len(report.panels) - len(moved)
    still = replace(moved[0], floor=0.0)
    assert "rect" not in [mark["type"] for mark, _ in layers(still, report)]
    again = replace(report, panels=(still,), paretos=tuple(replace(one, floor=0.0) for one in report.paretos))
    text = render.page(again)
    assert "The noise floor is 0: no benchmark changed its score when the baseline answered again" in text
    assert text.count("No grey stripe: no benchmark changed its score") == 1 + len(report.paretos)
    assert "Grey stripe: the noise floor." not in text
    assert "No noise floor was measured." in render.page(replace(report, again=()))


def test_hostile_texts_are_inert(hostile: Report) -> None:
    page = render.page(hostile)
    parsed = Parsed(page)
    assert HOSTILE[:30] not in page, "no text stands as it is"
    assert not parsed.all("img")
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert len(parsed.all("script")) == 4
    specs, drawn = [json.loads(script) for attributes, script in parsed.scripts if attributes.get("id")]
    assert HOSTILE in json.dumps(specs, ensure_ascii=False).replace('\\"', '"'), "a method's settings are in a legend"
    assert any(one["answer"].endswith(HOSTILE) for card in drawn.values() for one in card["shown"])
    text = "".join(parsed.text)
    for start in ("tiny", "cpu", "no such layer", "plain"):
        assert f"{start}{HOSTILE}" in text, start
    assert {one.benchmark for one in hostile.flips} >= {"tiny_grounding", "tiny_short", "asked"}
    assert any(HOSTILE in one.question for one in hostile.flips)
    assert any("asked" in one.benchmark and one.missing for one in hostile.pictures)


def test_a_long_video_says_how_much_of_it_is_drawn(report: Report) -> None:
    first, *others = report.pictures
    longer = replace(report, pictures=(replace(first, frames=64, drawn=16), *others))
    page = render.page(longer)
    assert page.count("frames are drawn.") == 1
    assert "16 of 64 frames are drawn." in page
    assert "frames are drawn." not in render.page(replace(report, pictures=(replace(first, frames=8, drawn=8),)))


def test_a_page_that_would_be_too_large_has_fewer_cards(report: Report, page: str) -> None:
    full = len(page.encode())
    assert full < render.MOST_BYTES
    pictures = sum(len(one.jpeg) * 4 / 3 for one in report.pictures)
    smaller = Parsed(render.page(report, most_bytes=int(full - pictures - 20_000)))
    cards = smaller.all("article")
    assert 0 < len(cards) < report.cards
    names = {card["id"] for card in cards if "id" in card}
    assert {link["href"][1:] for link in smaller.all("a") if link["href"].startswith("#picture-")} <= {
        *names, "pictures-block"}  # fmt: skip
    with pytest.raises(ValueError, match="without a single card, 1000 are allowed"):
        render.page(report, most_bytes=1000)


def test_without_the_extra_it_is_said_what_to_install(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    assert main(["report", str(results), "--out", str(tmp_path / "r.html")]) == 2
    assert "pip install 'ivcp-eval[report]'" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_the_verb_writes_the_page_and_the_figures(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, chosen = charts.charts, ("panel-0", "pareto-0-layers")  # two of eleven, which are made alike
    monkeypatch.setattr(charts, "charts", lambda report: {name: made(report)[name] for name in chosen})
    out, figures = tmp_path / "r.html", tmp_path / "figures"
    words = ["report", str(results), "--out", str(out), "--cards", "6", "--resamples", "50", "--figures", str(figures)]
    assert main([*words, "--critical", "tiny_short"]) == 2
    assert "--critical without a rule" in capsys.readouterr().err
    assert main([*words, "--margin", "3"]) == 0
    text = out.read_text(encoding="utf-8")
    assert f"ivcp report {results.as_posix()} --margin 3.0 --cards 6 --resamples 50" in text
    assert "a loss of 3 % of the scale" in text
    files = sorted(path.name for path in figures.iterdir())
    stems = ("panel-0-tiny_grounding", "pareto-0-layers-tiny")
    assert files == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    assert (figures / files[0]).read_bytes().startswith(b"\x89PNG")
    assert re.match(r"<svg[^>]*>", (figures / files[1]).read_text())
    assert main([*words[:3], str(tmp_path / "r.txt")]) == 2
    assert "the name of a report ends in .html" in capsys.readouterr().err
