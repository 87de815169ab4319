"""The acceptance of a trained model: ``ivcp lab accept tiny2 --model DIR [--split validation]``.

Settings are chosen on the validation split; the test split is run once. Everything goes through the stock model's
``generate`` inside ``ivcp_eval.prune``. A12 is not measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ivcp_eval.engine import prune
from ivcp_eval.engine.cost.predicted import ratio_for
from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, ImageSpan, ModelFacts, Selection, Signals
from ivcp_eval.interface import Image as TokenImage
from ivcp_eval.interface.ops import coordinate_set
from ivcp_eval.lab.tiny.evaluate import is_right, load
from ivcp_eval.lab.tiny2 import clips, tasks
from ivcp_eval.lab.tiny2.acceptance import table
from ivcp_eval.lab.tiny2.processor import MERGE_SIZE
from ivcp_eval.lab.tiny2.scenes import LEAST_COVER, Scene, cell_cover, render, sample_scene, scene_rng
from ivcp_eval.reports.stats.verdicts import Verdicts
from ivcp_eval.runs.analysis.coordinates import kept_tokens
from ivcp_eval.runs.planning.numbers import COUNT

#: Enough for the longest answer, a box of four three-digit numbers with its end token.
MAX_NEW_TOKENS = 20
BATCH = 32
#: Task -> its first scene in a split.
FIRST = {"grounding": 0, "short": 1_000_000, "two": 2_000_000, "order": 3_000_000}
TWO_PICTURES_SIZE = (192, 192)
#: Of the selections by hand, those that the table needs.
CONTROLLED = (
    *("all but IVC", "all but IVC outside the target", "all but as many outside the target"),
    *("target only", "target + IVC", "target + as many"),
)


@dataclass(frozen=True)
class Question:
    """A question with its pictures, or with those of a ``clip``.

    ``target``: (t,) raster indices of the asked object's tokens, empty if unknown.
    """

    images: tuple[Image.Image, ...]
    sample: tasks.Sample
    cluster: str
    target: np.ndarray[Any, Any] = field(default_factory=lambda: np.array([], dtype=int))
    clip: bool = False


@dataclass(frozen=True)
class Answer:
    """Whether an answer was right, and the raster indices of the visual tokens that survived."""

    right: bool
    kept: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Chosen(AbstractMethod):
    """Keeps given visual tokens of every row's picture, whatever the model thinks: for controlled comparisons.

    Attributes:
        keep: raster indices for each row of one batch, taken in the order in which the engine cuts rows.
        layer: the cut, and so every layer's cache.
    """

    faithfulness: ClassVar[Faithfulness] = "control"

    keep: Iterator[np.ndarray[Any, Any]] = field(default_factory=lambda: iter(()))
    layer: int = 1

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut; the ratio is not used."""
        return (Cut(self.layer, ratio),)

    def select(self, signals: Signals) -> Selection:
        """The next row's tokens."""
        return Selection(torch.as_tensor(next(self.keep), device=signals.visual.device), exact=False)


def questions(split: str, count: int, task: str) -> Iterator[Question]:
    """``count`` questions of ``task`` (a key of `FIRST`), at most two per picture."""
    asked, index = 0, FIRST[task]
    while asked < count:
        rng = scene_rng(split, index)
        for question in _of_scene(rng, task, f"{split}_{index}")[: count - asked]:
            yield question
            asked += 1
        index += 1


def _of_scene(rng: np.random.Generator, task: str, cluster: str) -> list[Question]:
    if task == "two":
        scenes = [sample_scene(rng, TWO_PICTURES_SIZE, (1, 3)) for _ in range(2)]
        number = int(rng.integers(2))
        samples = [_in_picture(s, number + 1) for s in tasks.pick(rng, scenes[number], ["box"])]
        return [Question(_drawn(*scenes), s, cluster) for s in samples]
    if task == "order":
        group, clip, pictures = clips.draw(rng, ["order"])
        return [Question(tuple(map(Image.fromarray, pictures)), clips.choice(rng, group, clip), cluster, clip=True)]
    scene = sample_scene(rng)
    kinds = ("box", "box") if task == "grounding" else rng.permutation(("colour", "shape", "count"))[:2]
    samples = tasks.pick(rng, scene, list(kinds))
    return [Question(_drawn(scene), s, cluster, _target(scene, s)) for s in samples]


def _in_picture(sample: tasks.Sample, picture: int) -> tasks.Sample:
    return tasks.Sample(**{**asdict(sample), "picture": picture})


def _drawn(*scenes: Scene) -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(render(scene)) for scene in scenes)


def _target(scene: Scene, sample: tasks.Sample) -> np.ndarray[Any, Any]:
    found = [i for i, o in enumerate(scene.objects) if o.box == sample.box]
    return np.flatnonzero(cell_cover(scene)[found[0]] >= LEAST_COVER) if found else np.array([], dtype=int)


def coordinates(model: Any, image: Image.Image) -> np.ndarray[Any, Any]:
    """Raster indices of IVC-Prune's coordinate tokens of ``image`` at ratio 0.5 (first picture of a prompt)."""
    cell = model.config.vision_config.patch_size * MERGE_SIZE
    columns, rows = image.width // cell, image.height // cell
    cells = torch.arange(rows * columns)
    # The text before the picture shifts all positions alike.
    start = 10
    positions = torch.stack((torch.zeros_like(cells), cells // columns, cells % columns)) + start
    angles = positions[..., None] * model.model.language_model.rotary_emb.inv_freq.float()
    cos, sin = angles.cos().mean(dim=(0, 2)), angles.sin().mean(dim=(0, 2))
    n = len(cells)
    span = TokenImage(cells, round(0.5 * n), n, ImageSpan(cells, grid=(rows, columns)))
    return torch.nonzero(coordinate_set(cos, sin, span, 0.1, 0.2)).flatten().numpy()


class Asker:
    """A model that answers batches of questions under a condition; the pictures of a batch are of one size."""

    def __init__(self, folder: Path) -> None:
        self.model, self.processor = load(folder)
        self.depth = len(self.model.model.language_model.layers)
        self.layer = round(self.depth * 4 / 7)

    def ask(
        self, batch: Sequence[Question], method: str | AbstractMethod, ratio: float, **options: Any
    ) -> list[Answer]:
        """The greedy answers to ``batch``."""
        texts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [
                            *([{"type": "video"}] if question.clip else [{"type": "image"}] * len(question.images)),
                            {"type": "text", "text": tasks.prompt_of(question.sample)},
                        ],
                    }
                ],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in batch
        ]
        images = [list(question.images) for question in batch]
        seen: dict[str, Any] = {"images": images}
        if batch[0].clip:
            steps = [np.stack([np.asarray(image) for image in pictures]) for pictures in images]
            frames = [np.repeat(pictures, clips.FRAMES_A_STEP, axis=0) for pictures in steps]
            about = {"fps": clips.FRAMES_A_STEP / clips.SECONDS_A_STEP, "total_num_frames": len(frames[0])}
            videos = [torch.from_numpy(each).permute(0, 3, 1, 2) for each in frames]
            seen = {"videos": videos, "video_metadata": [about] * len(videos), "do_sample_frames": False}
        inputs = self.processor(text=texts, **seen, padding=True, return_tensors="pt")
        with torch.inference_mode(), prune(self.model, method, ratio, **options) as run:
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        said = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers, shown = [], torch.tensor([self.model.config.image_token_id, self.model.config.video_token_id])
        for question, text, ids, kept in zip(batch, said, inputs["input_ids"], run.kept, strict=True):
            visual = torch.nonzero(torch.isin(ids, shown)).flatten()
            survivors = torch.nonzero(torch.isin(visual, kept.cpu())).flatten().numpy()
            answers.append(Answer(is_right(question.sample, text), survivors))
        return answers

    def keep(self, batch: Sequence[Question], tokens: Sequence[np.ndarray[Any, Any]]) -> list[Answer]:
        """`ask` with exactly ``tokens`` of each question's only picture, at least one."""
        chosen = [np.sort(t) if len(t) else np.array([0]) for t in tokens]
        answers = self.ask(batch, Chosen(iter(chosen), self.layer), 0.5)
        if not all(np.array_equal(a.kept, c) for a, c in zip(answers, chosen, strict=True)):
            raise RuntimeError("the engine did not cut the rows in their order; the controlled conditions are void")
        return answers

    def cells(self, question: Question) -> np.ndarray[Any, Any]:
        """Raster indices of all tokens of the question's first picture."""
        cell = self.model.config.vision_config.patch_size * MERGE_SIZE
        image = question.images[0]
        return np.arange((image.width // cell) * (image.height // cell))


def grounding_conditions(asker: Asker, batch: Sequence[Question], number: int) -> dict[str, list[Answer]]:
    """Every condition of a batch of grounding questions; ``number`` is the first one's and seeds what is drawn."""
    found = {name: asker.ask(batch, "none", 1.0) for name in ("none", "none again")}
    for ratio in (0.5, 0.25, 0.11):
        found[f"ivc_prune {ratio}"] = asker.ask(batch, "ivc_prune", ratio, layer=asker.layer)
        found[f"random {ratio}"] = asker.ask(batch, "random", ratio, layer=asker.layer)
    found["value 0.5"] = asker.ask(batch, "ivc_prune", 0.5, layer=asker.layer, ivc=0.0)
    # FastV at as many tokens, averaged over the layers, as IVC-Prune at 0.5 processes.
    share = (asker.layer + 0.5 * (asker.depth - asker.layer)) / asker.depth
    for name in ("fastv", "fastv+ivc"):
        found[name] = asker.ask(batch, name, ratio_for(asker.model, name, share, "layer_mean"))
    chosen = [controlled(asker, question, number + i) for i, question in enumerate(batch)]
    for name in chosen[0]:
        found[name] = asker.keep(batch, [tokens[name] for tokens in chosen])
    return found


def controlled(asker: Asker, question: Question, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """The tokens that each controlled condition keeps."""
    rng, target, everything = np.random.default_rng(seed), question.target, asker.cells(question)
    chosen = kept_tokens(len(everything), target, coordinates(asker.model, question.images[0]), rng)
    half = rng.permutation(target)[: len(target) // 2]
    return {"half of the target dropped": np.setdiff1d(everything, half), **{name: chosen[name] for name in CONTROLLED}}


def batches(split: str, count: int, task: str) -> Iterator[list[Question]]:
    """`questions` in batches, with a bar of progress."""
    stream = iter(tqdm(questions(split, count, task), total=count, desc=task))
    while batch := list(islice(stream, BATCH)):
        yield batch


def measure(asker: Asker, split: str, count: int, swept: int) -> tuple[Verdicts, ...]:
    """Verdicts of grounding, short answers, two pictures, clips, and of the first ``swept`` groundings over layers."""
    grounding, short, two, order, layers = (Verdicts() for _ in range(5))
    for number, batch in enumerate(batches(split, count, "grounding")):
        _note(grounding, batch, grounding_conditions(asker, batch, number * BATCH))
    for batch in batches(split, swept, "grounding"):
        cut = {layer: asker.ask(batch, "ivc_prune", 0.5, layer=layer) for layer in range(1, asker.depth)}
        _note(layers, batch, {f"L{layer}": answers for layer, answers in cut.items()})
    for batch in batches(split, count, "short"):
        rest = [np.setdiff1d(asker.cells(q), coordinates(asker.model, q.images[0])) for q in batch]
        _note(short, batch, {"none": asker.ask(batch, "none", 1.0), "all but IVC": asker.keep(batch, rest)})
    for batch in batches(split, count, "two"):
        _note(two, batch, {"none": asker.ask(batch, "none", 1.0)})
    for batch in batches(split, count, "order"):
        # A clip that shows one of its pictures all the time: whoever needs no other does as well on it.
        still = [replace(q, images=(q.images[number % clips.STEPS],) * clips.STEPS) for number, q in enumerate(batch)]
        _note(order, batch, {"none": asker.ask(batch, "none", 1.0), "one picture": asker.ask(still, "none", 1.0)})
    return grounding, short, two, order, layers


def _note(verdicts: Verdicts, batch: Sequence[Question], found: dict[str, list[Answer]]) -> None:
    verdicts.clusters += [question.cluster for question in batch]
    for name, answers in found.items():
        verdicts.scores.setdefault(name, []).extend(float(answer.right) for answer in answers)
        verdicts.recall.setdefault(name, []).extend(
            float(np.isin(q.target, a.kept).mean()) for q, a in zip(batch, answers, strict=True) if len(q.target)
        )


def main(arguments: list[str] | None = None) -> int:
    """Command line: print the table, and write it with all accuracies to ``--out`` if given."""
    parser = argparse.ArgumentParser(prog="ivcp lab accept tiny2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name("model"), help="folder of the model")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--questions", type=COUNT, default=1000, help="per task (default: %(default)s)")
    parser.add_argument("--swept", type=COUNT, default=300, help="questions for the cut layers (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} holds no model; name the folder that the training wrote (OUT/model)")
    verdicts = measure(Asker(args.model), args.split, args.questions, args.swept)
    grounding, figures = verdicts[0], table(*verdicts)
    for figure in figures:
        verdict = {True: "pass", False: "MISS", None: "-"}[figure.passed]
        sys.stdout.write(f"{figure.number:4} {verdict:5} {figure.what}: {figure.measured}\n")
    if args.out:
        accuracies = {name: grounding.percent(name) for name in grounding.scores}
        report = {"split": args.split, "questions": args.questions, "figures": [asdict(f) for f in figures]}
        args.out.write_text(json.dumps({**report, "grounding": accuracies}, indent=2) + "\n", encoding="utf-8")
    return 0
