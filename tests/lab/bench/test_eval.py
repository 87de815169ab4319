"""The bench of the runner: what it asserts, counts and targets, with worker processes replaced by a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.lab.bench import eval as bench
from ivcp_eval.lab.bench.eval import Arm
from ivcp_eval.runs.answering.cpu import PROCESS_BYTES, cpu_workers

ARMS = bench.arms(2)


class Table:
    """Answers at once, in the seconds that it is told; `wrong` gives one in a hundred otherwise, and `more` besides."""

    def __init__(self, seconds: list[float], wrong: Arm | None = None, more: int = 0) -> None:
        self.seconds, self.wrong, self.order = dict(zip(ARMS, seconds, strict=True)), wrong, list[str]()
        self.count = 1 + more

    def first(self, function: Any, *arguments: Any) -> Any:
        return 100 if function is bench._rows else (0.25, 1.5)

    def run(self, arm: Arm, name: str, rows: int, folder: Path) -> tuple[float, Any]:
        if rows == 100:
            self.order.append(arm.name)
        right = dict.fromkeys(range(100), "yes")
        wrong = dict.fromkeys(range(self.count), "no") if arm == self.wrong else {}
        answers = [right, right | wrong]
        return bench.Spent(self.seconds[arm], 2 * self.seconds[arm]), answers[: arm.variants]


def test_ratios_are_over_the_faster_loop(tmp_path: Path) -> None:
    table: Any = Table([9.0, 6.0, 5.0, 1.5, 1.0])
    first, second, whole = bench.measure(table, ARMS, ["tiny_mcq", "tiny_short"], tmp_path)
    assert [row["arm"] for row in first][:5] == [arm.name for arm in ARMS]
    assert table.order == [arm.name for arm in (*ARMS, *reversed(ARMS))], "every second benchmark in reverse"
    assert [row.get("ratio") for row in whole][:5] == [pytest.approx(r) for r in (6 / 9, 1, 6 / 5, 4, 6)]
    met = {row["arm"]: (row["target"], row["met"]) for row in whole if "target" in row}
    assert met == {
        "runner, 2 processes x 1 thread": (">= 3.0", True),
        "runner, baseline alone, 2 processes x 1 thread": ("<= 1.35", False),
        "scoring stored answers": ("<= 0.4 ms", True),
    }
    assert second[3]["ms_per_sample"] == 15


def test_other_answers_are_counted(tmp_path: Path) -> None:
    table: Any = Table([1.0] * 5, wrong=ARMS[3], more=1)
    *_, whole = bench.measure(table, ARMS, ["tiny_mcq", "tiny_short"], tmp_path)
    assert [row.get("other_answers") for row in whole] == [0, 0, 0, 4, 0, None]


def test_many_other_answers_are_an_error(tmp_path: Path) -> None:
    table: Any = Table([1.0] * 5, wrong=ARMS[3], more=2)
    with pytest.raises(AssertionError, match="2 processes x 1 thread answers 3 of tiny_mcq otherwise"):
        list(bench.measure(table, ARMS, ["tiny_mcq"], tmp_path))


@pytest.mark.slow
def test_on_the_embedded_model(tmp_path: Path) -> None:
    """Real processes and answers; times are not looked at."""
    arguments = ["--samples", "4", "--data", "tiny_mcq", "--cores", "1", "--out", str(tmp_path / "bench")]
    assert bench.main(arguments) == 0
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert lines[0].split(",")[:3] == ["benchmark", "samples", "arm"]
    assert (tmp_path / "bench.json").is_file()


@pytest.mark.parametrize(
    ("answers", "cores", "memory", "wanted"),
    [
        (2360, 2, 64e9, (2, 1)),
        (30, 2, 64e9, (1, 2)),
        (2360, 2, 1.6 * PROCESS_BYTES, (1, 2)),
        (600, 16, 64e9, (3, 5)),
    ],
)
def test_cores_are_shared(answers: int, cores: int, memory: float, wanted: tuple[int, int]) -> None:
    assert cpu_workers(16_000_000, answers, cores, int(memory)) == wanted
