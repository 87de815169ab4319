"""Every system has a row; every row that promises a method keeps the promise; docstrings have their fixed form."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from ivcp_eval.interface.method import Faithfulness
from ivcp_eval.interface.registry import make_method, method_class, method_names
from ivcp_eval.lab.scaffold import PLACEHOLDERS
from ivcp_eval.methods import _cards as cards
from ivcp_eval.methods._cards import LABELS, MethodCard, method_cards, method_summary, method_table

# The systems that were named when the catalogue was planned, and their papers (POINTS-Long has no arXiv number). The
# first 27 are those that this work started from.
NAMED = {
    "IVC-Prune": "2602.03060",
    "IWP": "2604.00757",
    "PyramidDrop": "2410.17247",
    "EventPrune": "2605.19506",
    "RotateK": "2605.19218",
    "LearnPruner": "2604.23950",
    "VisPCO": "2604.15188",
    "DSTP": "2604.12358",
    "DualComp": "2604.11122",
    "AdaSpark": "2604.08077",
    "SPpruner": "2605.20950",
    "LRCP": "2605.15621",
    "COAST": "2605.09429",
    "LLaVA-UHD v4": "2605.08985",
    "VideoRouter": "2605.05848",
    "Counterfactual prompting": "2605.01048",
    "Geo3DPruner": "2604.18260",
    "QUOTA": "2604.17320",
    "POINTS-Long": "2604.11627",
    "DeSAP": "2604.11240",
    "HAWK": "2604.07812",
    "CodecSight": "2604.06036",
    "ForestPrune": "2603.22911",
    "FastOCR": "2605.17447",
    "OmniRefine": "2605.12056",
    "EvoComp": "2604.17087",
    "AOT": "2603.01400",
    "FastV": "2403.06764",
    "SparseVLM": "2410.04417",
    "VisionZip": "2412.04467",
    "DivPrune": "2503.02175",
    "VisPruner": "2412.01818",
    "CDPruner": "2506.10967",
    "HoloV": "2510.02912",
    "DART": "2502.11494",
    "TopV": "2503.18278",
    "VScan": "2505.22654",
    "PruMerge": "2403.15388",
    "ToMe": "2210.09461",
}


def test_every_named_system_has_one_entry() -> None:
    for system, paper in NAMED.items():
        entries = [entry for entry in cards.systems() if entry["system"].split(" (")[0] == system]
        assert [entry["paper"] for entry in entries] == [paper], system
    papers = [entry["paper"] for entry in cards.systems() if "state" in entry and entry["paper"]]
    assert len(papers) == len(set(papers))


def test_each_of_the_27_has_a_whole_row_that_says_what_runs() -> None:
    rows = [line.strip("| ").split(" | ") for line in cards.started_from_table().splitlines()[2:]]
    assert all(len(row) == 5 and all(row) for row in rows)
    table = {re.sub(r"\[(.*)\]\(.*\)", r"\1", row[0]).split(" (")[0]: row for row in rows}
    assert list(table) == list(NAMED)[:27]
    forms = {card.name: card.faithfulness for card in method_cards()}
    for system, (_, here, form, _, _) in table.items():
        runs = here.strip("`") in forms
        assert form == forms[here.strip("`")] if runs else form in cards.STATES, system
        assert runs or here == "no" or form in ("tool", "model"), system


def test_a_system_that_the_catalogue_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "systems.yaml"
    file.write_text("Nowhere: nothing")
    monkeypatch.setattr(cards, "STARTED_FROM", file)
    with pytest.raises(ValueError, match=r"0 entries .* 'Nowhere'"):
        cards.started_from_table()
    file.write_text("FastV:")
    with pytest.raises(ValueError, match="'FastV' runs by now"):
        cards.started_from_table()


def test_promised_methods_exist_and_all_methods_are_listed() -> None:
    for entry in cards.systems():
        if "method" in entry:
            make_method(entry["method"])
    shown = {row["method or system"]: row for row in cards.rows()}
    for name in method_names():
        assert shown[name]["use"] == getattr(method_class(name), "faithfulness", "plug-in")
    assert shown["NAME+ivc"]["use"] == shown["NAME+dstp"]["use"] == "variant"
    assert all(row["use"] and row["note"] for row in shown.values())


def test_a_method_of_another_name_says_which_system_it_runs() -> None:
    notes = {row["method or system"]: row["note"] for row in cards.rows()}
    for name, system in (
        ("dart_tensorrt", "DART in TensorRT Edge-LLM"),
        ("NAME+dstp", "DSTP"),
    ):
        assert f"({system})" in notes[name]
    assert "(LOOK-M)" not in notes["lookm"]


def test_a_row_without_reason_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, message in (
        ("- {system: X, paper: '', state: gaps, why: y}", "expected"),
        ("- {system: X, paper: '', state: someday, why: y, needs: z}", "none of"),
    ):
        file = tmp_path / "catalogue.yaml"
        file.write_text(text)
        monkeypatch.setattr(cards, "FILE", file)
        cards.systems.cache_clear()
        with pytest.raises(ValueError, match=message):
            cards.systems()
    cards.systems.cache_clear()


def test_listing_stays_light() -> None:
    code = "import sys; from ivcp_eval.methods import _cards; _cards.rows(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("card", method_cards(), ids=lambda card: card.name)
def test_docstring_form(card: MethodCard) -> None:
    assert card.keeps.endswith(".")
    assert not any(placeholder in card.paper + card.reference for placeholder in PLACEHOLDERS), "fill the template in"
    assert card.faithfulness in LABELS
    if card.faithfulness != "control" and card.name != "deployed":  # what a server does has no paper here
        assert re.search(r"https://arxiv\.org/abs/\d{4}\.\d{5}", card.paper)
        known = re.search(r"https://github\.com/\S+ @ [0-9a-f]{7}", card.reference)
        assert known or (card.faithfulness != "faithful" and card.reference.startswith("none"))
    if card.faithfulness == "variant":
        assert card.differs, "a variant names its gaps"


def test_the_card_is_what_the_class_says() -> None:
    for card in method_cards():
        if not card.name.startswith("NAME"):
            assert card.faithfulness == method_class(card.name).faithfulness
            assert card.keeps.split()[0] in str(sys.modules[method_class(card.name).__module__].__doc__)


def test_table() -> None:
    lines = method_table().splitlines()
    assert lines[0].count("|") == 5
    assert len(lines) == 2 + len(method_cards())
    fastv = next(line for line in lines if line.startswith("| `fastv`"))
    assert "[2403.06764](https://arxiv.org/abs/2403.06764)" in fastv
    assert fastv.endswith("| faithful |")


def test_summary_names_every_method_once() -> None:
    named = re.findall(r"`([^`]+)`", method_summary())
    assert sorted(named) == sorted(card.name for card in method_cards())
    assert list(LABELS) == list(get_args(Faithfulness))


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_an_oracle(name: str) -> None:
    if method_class(name).__module__.startswith("ivcp_eval.") and name not in (
        "none",
        "again",
        "deployed",
        "ivc_prune",
    ):
        folder = Path(__file__).parent
        own = folder / f"test_{name}.py"
        mapped = (path for path in folder.glob("oracle/*.py") if f"ivcp_eval.methods.{name} import" in path.read_text())
        source = (own if own.exists() else next(mapped)).read_text()
        assert re.match(r'"""Oracle: ', source), "its docstring must say what the oracle is"
