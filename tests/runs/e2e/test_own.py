"""Pictures and methods of a user's own: from a JSONL and a Python file to rows, without anything installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivcp_eval.benchmarks import agreement
from ivcp_eval.interface import plugins, registry
from ivcp_eval.interface.records import Answer
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import Row, read_samples
from ivcp_eval.reports.wide import write_tables
from ivcp_eval.runs.records import scoring
from tests.runs.conftest import Lab

METHOD = """
from __future__ import annotations
from dataclasses import dataclass
from ivcp_eval.interface import AbstractScorer, Cut

@dataclass(frozen=True)
class Method(AbstractScorer):
    layer: int = 1
    sign: float = {sign}

    def cuts(self, model, ratio):
        return (Cut(max(self.layer, model.first_cut), ratio),)

    def score(self, signals):
        return self.sign * signals.hidden[signals.visual].float().norm(dim=-1)
"""


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., str]:
    """A JSONL of five pictures, with these keys besides."""

    def made(name: str, **more: Any) -> str:
        lines = []
        for i in range(5):
            Image.new("RGB", (140, 112), (50 * i, 200 - 40 * i, 30)).save(tmp_path / f"{i}.png")
            lines.append({"image": f"{i}.png", "question": f"colour {i}?", **more})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return str(path)

    return made


def row(lab: Lab, benchmark: str, method: str, metric: str) -> Row:
    (found,) = [r for r in lab.rows() if (r["benchmark"], r["method"], r["metric"]) == (benchmark, method, metric)]
    return found


def test_pictures_without_answers_are_scored_by_agreement(lab: Lab, photos: Callable[..., str]) -> None:
    words, choice = photos("words"), photos("choice", options=["red", "blue"], answer="red")
    assert lab.eval("--data", words, choice, "--method", "random", "--ratio", "0.1") == 0
    base, pruned = (row(lab, "words", method, "agreement") for method in ("none", "random"))
    before, after = (read_samples(lab.csv.parent / r["predictions"]) for r in (base, pruned))
    texts = [(a["prediction"].strip(), b["prediction"].strip()) for a, b in zip(before, after, strict=True)]
    assert base["score"] == 100
    assert pruned["score"] == 20 * sum(a == b for a, b in texts) < 100
    similarity = row(lab, "words", "random", "agreement_text_similarity")["score"]
    assert similarity == pytest.approx(20 * sum(SequenceMatcher(None, *pair).ratio() for pair in texts))
    assert [s["answer"] for s in after] == [s["prediction"] for s in before], "the baseline's stand for the true ones"
    assert base["reason"] == pruned["reason"] == "agreement with the unpruned model's answers, not accuracy"
    compared = {r.metric: r for r in compare(lab.csv).rows if r.benchmark == "words"}
    assert compared.keys() == {*agreement.TEXT_METRICS}
    assert {(r.paired, r.n_samples) for r in compared.values()} == {(True, 5)}
    (table,) = write_tables(lab.csv)
    assert "words: agreement with the unpruned model's answers, not accuracy." in table.to_markdown()
    assert row(lab, "choice", "none", "accuracy")["benchmark_sha256"]
    assert lab.eval("--data", words, choice, "--method", "random", "--ratio", "0.1") == 0


def test_a_method_by_its_file(lab: Lab, photos: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "longest_first.py"
    file.write_text(METHOD.format(sign=1.0))
    arguments = ("--data", photos("words"), "--ratio", "0.3", "--method")
    assert lab.eval(*arguments, str(file)) == 0
    first = row(lab, "words", "longest_first", "agreement")
    assert first["method_source"].startswith("longest_first.py (code ")
    assert registry.method_source("longest_first+ivc") == first["method_source"]
    assert lab.eval(*arguments, f"{file}+ivc", "--set", "layer=2") == 0
    assert row(lab, "words", "longest_first+ivc", "agreement")["method_parameters"]
    file.write_text(METHOD.format(sign=-1.0))
    assert lab.eval(*arguments, str(file)) == 0
    made = {r["method_source"] for r in lab.rows() if r["method"] == "longest_first"}
    assert len(made) == 2, "another code is another measurement"
    assert "longest_first" not in registry.method_names(), "`ivcp list` knows what is registered"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("fastv.py", METHOD, "'fastv' is a method of ivcp-eval itself; rename the file"),
        ("My-Method.py", METHOD, "a name is lower-case words joined by single underscores"),
        ("broken_file.py", "1/0", "cannot be imported (ZeroDivisionError: division by zero). Mend the file"),
        ("broken_syntax.py", "def", "cannot be imported (SyntaxError"),
        ("leaves.py", "raise SystemExit(3)", "cannot be imported"),
        ("no_class.py", "x = 1", "is no method: it is a module, not a class. The file must define a class `Method`"),
        ("other_class.py", "class Method: pass", "does not derive from AbstractMethod"),
        ("gone.py", None, "does not exist, or is no file"),
    ],
)
def test_files_that_are_no_method_are_refused_in_words(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text.replace("{sign}", "1.0"))
    assert lab.eval("--data", "tiny_mcq", "--limit", "1", "--method", str(tmp_path / name)) != 0
    captured = capsys.readouterr()
    assert said in " ".join((captured.out + captured.err).split())
    assert not lab.csv.exists()


def test_two_files_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_files", {})
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(METHOD.format(sign=1.0))
    assert registry.name_of(str(tmp_path / "a" / "same_name.py")) == "same_name"
    with pytest.raises(ValueError, match=r"a/same_name.py has the same name; rename the file"):
        registry.name_of(str(tmp_path / "b" / "same_name.py"))


def test_a_row_that_the_unpruned_model_failed_is_left_out_and_made_again(
    lab: Lab, photos: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--data", photos("words"), "--method", "random", "--ratio", "0.5")
    good = scoring.answers

    def without_one(cell: Any, *rest: Any, **named: Any) -> Any:
        found = good(cell, *rest, **named)
        if cell.identity.variant.method == "none":
            found[min(found)] = Answer.failed(RuntimeError("no luck"))
        return found

    monkeypatch.setattr(scoring, "answers", without_one)
    assert lab.eval(*arguments) == 1
    pruned = row(lab, "words", "random", "agreement")
    assert pruned["status"] == "incomplete"
    assert "1 rows are left out: the unpruned model's answers to them failed" in pruned["reason"]
    monkeypatch.setattr(scoring, "answers", good)
    assert lab.eval(*arguments) == 0
    assert row(lab, "words", "random", "agreement")["status"] == "ok"
    assert row(lab, "words", "none", "agreement")["score"] == 100
