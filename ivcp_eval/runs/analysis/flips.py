"""Does pruning change more answers than a change that should not matter? Flips beside those of a control.

A share of flipped answers says little alone: a paraphrase of the question, or a picture that is one patch larger, flips
answers of an unpruned model too (arXiv 2605.01048). Here all of them are counted on the same samples, and the flips by
pruning are tested against those by each control: exact McNemar test where every picture has one question, else the
permutation test over pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.files import file_digest
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports.provenance import finished_headline, telling_parameters
from ivcp_eval.reports.provenance import settings as parameters
from ivcp_eval.reports.stats import mcnemar, paired_bootstrap
from ivcp_eval.reports.table import Row, read_results, read_samples
from ivcp_eval.runs.analysis import paraphrase
from ivcp_eval.runs.analysis.study import Question, Study, compared, label, named

UNPRUNED = "unpruned"
Count = Literal["verdict", "answer"]


@dataclass(frozen=True)
class Given:
    """What one condition answered to one sample: the text, and its score in 0..1."""

    text: str
    score: float


Answered = Mapping[str, Given]
"""Index of a sample -> what was answered."""


@dataclass(frozen=True)
class Stored:
    """The answers of a results CSV that are to be judged: one model on one benchmark.

    Attributes:
        baseline: row of the unpruned model. pruned: what a table calls them -> their answers.
    """

    baseline: Row
    unpruned: Answered
    pruned: Mapping[str, Answered]

    @classmethod
    def of(cls, results: Path) -> list[Stored]:
        """One for each model and benchmark of the file that has a finished unpruned row.

        Raises:
            ValueError: there is none, or per-sample files are missing.
        """
        rows = [row for row in read_results(results) if finished_headline(row)]
        pairs = []
        for base in (row for row in rows if row["method"] == BASELINE):
            same = ("model", "benchmark", "limit", "metric", "revision")
            own = [row for row in rows if row is not base and all(row[name] == base[name] for name in same)]
            if own:
                answers = {name: _answers(results, row) for name, row in zip(_labels(own), own, strict=True)}
                pairs.append(cls(base, _answers(results, base), answers))
        if not pairs:
            raise ValueError(
                f"{results} has no finished unpruned row with pruned ones beside it; name a file that `ivcp eval` or "
                "`ivcp sweep results` wrote"
            )
        return pairs

    def check(self, study: Study) -> None:
        """Raise ValueError unless the model that is to answer the controls is the one that gave these answers."""
        identity = study.baseline.identity
        now = {
            "revision": study.model.weights.revision,
            "dtype": identity.placement["dtype"],
            "torch_version": identity.versions["torch"],
            "transformers_version": identity.versions["transformers"],
        }
        other = [
            f"{name} {self.baseline[name]!r}, now {value!r}"
            for name, value in now.items()
            if self.baseline[name] != value
        ]
        if other:
            raise ValueError(
                f"the answers in the file were not made as the controls would be ({'; '.join(other)}), so flips could "
                "come from that; leave RESULTS out and name --model, --method and --ratio, and all are answered here"
            )


def _labels(rows: Sequence[Row]) -> list[str]:
    """Method, share and what tells it from the others."""
    telling = telling_parameters(rows)
    several = {row["method"] for row in rows if row["seed"] != rows[0]["seed"]}
    return [
        " ".join(
            part
            for part in (
                f"{row['method']} {row['ratio_asked']:g}",
                row["budget"] and f"of {row['budget']}",
                parameters(row, telling),
                f"seed {row['seed']}" if row["method"] in several else "",
            )
            if part
        )
        for row in rows
    ]


def _answers(results: Path, row: Row) -> dict[str, Given]:
    path = results.parent / row["predictions"] if row["predictions"] else None
    if path is None or not path.is_file():
        raise ValueError(f"{row['method']} on {row['benchmark']}: no per-sample answers ({path or 'totals only'})")
    return {
        one["index"]: Given(one["prediction"], one["score"])
        for one in read_samples(path)
        if one["score"] == one["score"]
    }


def measure(
    study: Study,
    stored: Stored | None = None,
    *,
    file: Path | None = None,
    pixels: int | None = None,
    count: Count = "verdict",
    bar: Callable[[Sequence[Any]], Any] = iter,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table of one benchmark, and the settings it was made with.

    Args:
        stored: answers of the unpruned and pruned model; without, they are made as the study's cells say.
        file: paraphrases in place of the templates. pixels: by which width and height of a picture grow; default: one
            patch (`patch_side`).
        count: what a flip is: another verdict, or another answer text.
        bar: shows the progress.
    """
    if stored is not None:
        stored.check(study)
    questions = study.questions()
    pixels = patch_side(study.session) if pixels is None else pixels
    others = reworded(study, questions, file)
    variants = {UNPRUNED: study.baseline.identity.variant}
    if stored is None:
        variants |= {label(cell.identity.variant): cell.identity.variant for cell in study.pruned}
    settings: dict[str, Any] = {"pixels": pixels, "paraphrases": str(file or "templates"), "count": count}
    resize = f"resized by {pixels:+d} pixels"
    by_condition: dict[str, dict[str, Answer]] = {}
    digest = study.digest([named(cell) for cell in study.pruned], file_digest(__file__))
    with study.kept(digest):
        for number, question in enumerate(bar(questions)):
            new = {} if stored else study.answers(question, variants)
            larger = replace(question, parts=[_resized(part, pixels) for part in question.parts])
            new |= study.answers(larger, {resize: variants[UNPRUNED]})
            for name, other in others.items():
                new[name] = study.answers(other[number], {UNPRUNED: variants[UNPRUNED]})[UNPRUNED]
            for name, answer in new.items():
                by_condition.setdefault(name, {})[question.index] = answer
    samples = {name: study.samples(answers) for name, answers in by_condition.items()}
    given: dict[str, Answered] = {
        name: {i: Given(by_condition[name][i].prediction, float(sample.score or 0)) for i, sample in of.items()}
        for name, of in samples.items()
    }
    if stored is not None:
        given = {UNPRUNED: stored.unpruned, **stored.pruned, **given}
    clusters = {i: sample.cluster for i, sample in samples[resize].items()}
    failed = {name: n for name, of in by_condition.items() if (n := sum(bool(answer.error) for answer in of.values()))}
    settings |= {"digest": digest, "benchmark": study.benchmark.name, "failed": failed}
    for name, n in failed.items():
        study.tell(f"{study.benchmark.name}, {name}: {n} answers failed and count as wrong")
    return table(given, clusters, [resize, *others], count), settings


def reworded(study: Study, questions: Sequence[Question], file: Path | None) -> dict[str, list[Question]]:
    """Name of a paraphrase -> the same questions in its words, in the same order."""
    data, indices = study.dataset.data, [question.index for question in questions]
    if file is not None:
        texts = {f"paraphrase {file.name}": paraphrase.from_file(file, indices)}
    else:
        originals = dict(zip(data["index"].astype(str), data["question"].astype(str), strict=True))
        texts = {
            f"paraphrase {name!r}": {i: paraphrase.fill(template, originals[i]) for i in indices}
            for name, template in paraphrase.templates(study.benchmark.kind).items()
        }
    by_wording = {}
    for name, words in texts.items():
        rows = data[data["index"].astype(str).isin(indices)].copy()
        rows["question"] = [words[str(index)] for index in rows["index"]]
        by_wording[name] = study.questions(rows)
    return by_wording


def patch_side(session: Any) -> int:
    """Pixels along the side of what becomes one visual token, or of one patch where pictures have a fixed size.

    Raises:
        ValueError: the model does not say.
    """
    images = getattr(session.processor, "image_processor", None)
    patch = getattr(images, "patch_size", None)
    if isinstance(patch, int):
        return patch * int(getattr(images, "merge_size", 1))
    patch = getattr(getattr(session.model.config, "vision_config", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if not isinstance(patch, int):
        raise ValueError("this model does not say how large a patch is; name the pixels with --pixels")
    return patch


def _resized(part: Mapping[str, Any], pixels: int) -> Mapping[str, Any]:
    if "image" not in part:
        return part
    from PIL import Image

    image = decoded(part["image"])
    size = max(1, image.width + pixels), max(1, image.height + pixels)
    return {"image": image.resize(size, Image.Resampling.BICUBIC)}


def table(
    given: Mapping[str, Answered], clusters: Mapping[str, str], controls: Sequence[str], count: Count
) -> list[dict[str, Any]]:
    """Controls first, then every other condition against each control; samples that all of them have."""
    common = set(clusters).intersection(*given.values())
    indices = [index for index in given[UNPRUNED] if index in common]
    pictures = [clusters[index] for index in indices]
    before = [given[UNPRUNED][index] for index in indices]
    after = {name: [answered[index] for index in indices] for name, answered in given.items()}
    flipped = {name: _flipped(before, of, count) for name, of in after.items()}
    rows = [{**_counted(name, before, after[name]), **compared(None, "")} for name in controls]
    independent = len(set(pictures)) == len(pictures)
    for name in (name for name in given if name not in (UNPRUNED, *controls)):
        for control in controls:
            result = paired_bootstrap(flipped[control], flipped[name], pictures, scale=100)
            row = {**_counted(name, before, after[name]), **compared(result, control)}
            if independent:
                row["p_value"] = mcnemar(flipped[control], flipped[name]).p_value
            rows.append(row)
    for row in rows:
        row["test"] = "" if not row["against"] else "McNemar" if independent else "permutation"
        row |= {"n": len(indices), "clusters": len(set(pictures))}
    return rows


def _flipped(before: Sequence[Given], after: Sequence[Given], count: Count) -> list[float]:
    """1.0 for every sample that flipped."""
    if count == "answer":
        return [float(a.text.strip() != b.text.strip()) for a, b in zip(before, after, strict=True)]
    return [float(a.score != b.score) for a, b in zip(before, after, strict=True)]


def _counted(name: str, before: Sequence[Given], after: Sequence[Given]) -> dict[str, Any]:
    return {
        "change": name,
        "score": 100 * float(np.mean([one.score for one in after])),
        "answers_changed": 100 * float(np.mean(_flipped(before, after, "answer"))),
        "verdicts_changed": 100 * float(np.mean(_flipped(before, after, "verdict"))),
        "right_to_wrong": sum(b.score < a.score for a, b in zip(before, after, strict=True)),
        "wrong_to_right": sum(b.score > a.score for a, b in zip(before, after, strict=True)),
    }
