"""Small results with everything that a report shows: times, a second baseline, seeds, masks, boxes, real pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcp_eval.benchmarks import load
from ivcp_eval.benchmarks.boxes import FORMATS, format_answer, iou
from ivcp_eval.benchmarks.grounding import ground_truth
from ivcp_eval.files import DATASETS, file_digest, long_cells
from ivcp_eval.interface.method import View
from ivcp_eval.interface.records.masks import CutMask, ImageCells, Masks
from ivcp_eval.reports.html.collect import collect
from ivcp_eval.reports.html.model import Report
from ivcp_eval.reports.table import make_row, write_results, write_samples
from ivcp_eval.reports.views.decision import Policy
from tests.reports.bench_lines import bench_line, write_bench

N = 30
ROWS, COLUMNS = 4, 5
VISUAL = ROWS * COLUMNS + 1  # one token lies in no cell
#: Variant -> answers lost of N, and the share of its prefill's time.
VARIANTS = {
    ("none", 1.0, 0): (0, 1.0),
    ("again", 1.0, 0): (1, 1.0),
    ("fastv", 0.5, 0): (3, 0.7),
    ("visionzip", 0.25, 0): (9, 1.2),
    ("random", 0.5, 1): (14, 0.5),
    ("random", 0.5, 2): (15, 0.5),
    ("random", 0.25, 1): (20, 0.4),
    ("random", 0.25, 2): (21, 0.4),
}
HOSTILE = "</script><img src=x onerror=\"document.documentElement.dataset.owned='yes'\">'\"&<b>{{7*7}}\u2028"


def masks(kept: int, merging: bool) -> Masks:
    """Two cuts of a picture of `ROWS` x `COLUMNS` cells; where asked for, dropped tokens merge into the first."""
    view = View("picture", np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS), (0.0, 0.0, 1.0, 1.0))
    cuts = []
    for layer, n in ((2, (VISUAL + kept) // 2), (3, kept)):
        alive = np.arange(VISUAL) < n
        targets = np.where(alive, -1, 0) if merging and layer == 3 else None
        cuts.append(CutMask(layer, alive, targets))
    return Masks((ImageCells(VISUAL, (view,)),), tuple(cuts))


def questions(benchmark: str) -> list[dict[str, str]]:
    """The first `N` rows of a shipped benchmark."""
    with (DATASETS / f"{benchmark}.tsv").open(newline="") as stream, long_cells():
        rows = csv.DictReader(stream, delimiter="\t")
        return [row for _, row in zip(range(N), rows, strict=False)]


def write(folder: Path, word: Callable[[str], str] = str) -> Path:
    """A results CSV with two shipped benchmarks; ``word`` changes every text that a model or a user may have chosen."""
    rows = []
    for benchmark, metric in (("tiny_grounding", "Acc@0.5"), ("tiny_short", "accuracy")):
        asked = questions(benchmark)
        for (method, ratio, seed), (lost, factor) in VARIANTS.items():
            place = f"{benchmark}-{method}-{ratio}-{seed}"
            kept = round(ratio * VISUAL)
            samples = [
                _sample(row, number, lost, kept, method, word) if benchmark == "tiny_grounding"
                else _short(row, number, lost, kept, method, word)
                for number, row in enumerate(asked)
            ]  # fmt: skip
            (folder / place).mkdir(parents=True)
            write_samples(folder / place / "predictions.csv", samples)
            timed = [
                {"index": s["index"], "prefill_ms": 10 * factor, "end_to_end_ms": 50 + 10 * factor} for s in samples
            ]
            (folder / place / "timing.json").write_text(json.dumps({"session": "s", "samples": timed}))
            sizes = {"layers": 10, "kv_heads": 2, "head_dim": 32, "value_dim": None}
            (folder / place / "cell.json").write_text(json.dumps({"identity": {}, "decoder": sizes}))
            rows.append(
                make_row(
                    model=word("tiny"), method=method, method_parameters={"note": word("plain")}, seed=seed,
                    benchmark=benchmark, metric=metric, status="ok", score_scale=100, n_samples=N,
                    score=100 * float(np.mean([sample["score"] for sample in samples])), ratio_asked=ratio,
                    ratio_layer_mean=ratio, ratio_kv_cache=ratio, ratio_flops=ratio, ratio_kept_final=ratio,
                    benchmark_sha256=load(benchmark).sha256, visual_tokens_prompt_mean=float(VISUAL), dtype="bfloat16",
                    run_id=place, predictions=f"{place}/predictions.csv", trained_weights=True, device=word("cpu"),
                )
            )  # fmt: skip
    skipped = {"method": "fastv", "ratio_asked": 0.1, "status": "skipped", "score": None, "run_id": "skipped"}
    rows.append({**rows[-1], **skipped, "seed": 0, "reason": word("no such layer")})
    write_results(folder / "r.csv", rows)
    own = {"method_parameters": {"note": word("plain")}, "device": word("H100"), "batch": 4}
    pruned = bench_line("fastv", 0.5, end_to_end=0.8, prefill=0.7, **own)
    write_bench(folder / "r.cost.csv", [bench_line("none", 1.0, **own), pruned])
    return folder / "r.csv"


def _common(row: dict[str, str], number: int, kept: int, method: str, word: Callable[[str], str]) -> dict[str, Any]:
    text = masks(kept, method == "visionzip").to_text() if method not in ("none", "again") else ""
    return {"index": row["index"], "cluster": row["image_id"], "category": word(row["category"]), "masks": text,
            "answer": word(row["answer"]), "visual_tokens": VISUAL, "visual_kept": kept}  # fmt: skip


def _sample(
    row: dict[str, str], number: int, lost: int, kept: int, method: str, word: Callable[[str], str]
) -> dict[str, Any]:
    truth = ground_truth({"answer_width": row["width"], "answer_height": row["height"], **row}).box
    x0, y0, x1, y1 = truth
    box = truth if number >= lost else (x0 + 0.8 * (x1 - x0), y0, x1 + 0.8 * (x1 - x0), y1)
    overlap = iou(box, truth)
    text = format_answer(box, FORMATS["unit"])
    common = _common(row, number, kept, method, word)
    return {**common, "prediction": word(text), "box": text, "iou": overlap, "score": float(overlap >= 0.5)}


def _short(
    row: dict[str, str], number: int, lost: int, kept: int, method: str, word: Callable[[str], str]
) -> dict[str, Any]:
    wrong = number < lost or number == N - 1  # the last one nobody knows, and nobody says the same
    said = f"not {row['answer']} by {method}" if wrong else row["answer"]
    right = not wrong and not (method == "none" and number == N - 2)  # which pruning gains
    common = _common(row, number, kept, method, word)
    return {**common, "prediction": word(said if right else f"{said}?"), "score": float(right)}


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def report(results: Path) -> Report:
    return collect(results, Policy(5), resamples=500, command="ivcp report r.csv")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Every text is an attack; so are the question and the name of a benchmark of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "data"
    data.mkdir()
    path = write(folder, lambda text: f"{text}{HOSTILE}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMUData", str(data))
        row = f"1\t{HOSTILE}\tno picture"
        (data / "asked.tsv").write_text(f"index\tquestion\timage\n{row}\n", encoding="utf-8")
        _add(path, "asked", file_digest(data / "asked.tsv"))
        _add(path, f"b{HOSTILE}".replace("/", "|"), "0" * 64)
        return collect(path, Policy(5), resamples=100, command=HOSTILE)


def _add(path: Path, benchmark: str, sha256: str) -> None:
    """Rows of one sample that is lost, on a benchmark that nobody declares."""
    from ivcp_eval.reports.table import read_results

    rows = read_results(path)
    for method, score in (("none", 1.0), ("fastv", 0.0)):
        place = f"{sha256[:6]}-{method}"
        (path.parent / place).mkdir()
        sample = {"index": "1", "category": HOSTILE, "prediction": HOSTILE + method, "answer": HOSTILE, "score": score}
        sample |= {"masks": masks(10, True).to_text(), "visual_tokens": VISUAL, "visual_kept": 10}
        write_samples(path.parent / place / "predictions.csv", [sample])
        like = next(row for row in rows if row["method"] == method)
        more = {"benchmark": benchmark, "metric": f"m{HOSTILE}", "score": 100 * score, "benchmark_sha256": sha256}
        more |= {"run_id": place, "predictions": f"{place}/predictions.csv", "n_samples": 1}
        rows.append({**like, **more})
    write_results(path, rows)
