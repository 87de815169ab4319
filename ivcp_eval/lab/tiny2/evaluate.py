"""The acceptance of a trained model: ``python -m ivcp_eval.lab.tiny2.evaluate --model DIR [--split validation]``.

Settings are chosen on the validation split; the test split is run once. Everything goes through the stock model's
``generate`` inside ``ivcp_eval.prune``. Clips (the other part of A11), A9 and A12 are not measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ivcp_eval.engine import prune
from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, ImageSpan, ModelFacts, Selection, Signals
from ivcp_eval.interface import Image as TokenImage
from ivcp_eval.interface.ops import coordinate_set
from ivcp_eval.lab.tiny.evaluate import is_right, load
from ivcp_eval.lab.tiny2 import tasks
from ivcp_eval.lab.tiny2.acceptance import Verdicts, table
from ivcp_eval.lab.tiny2.processor import MERGE_SIZE
from ivcp_eval.lab.tiny2.scenes import LEAST_COVER, Scene, cell_cover, render, sample_scene, scene_rng

#: Enough for the longest answer, a box of four three-digit numbers with its end token.
MAX_NEW_TOKENS = 20
TWO_PICTURES_SIZE = (192, 192)


@dataclass(frozen=True)
class Question:
    """A question with its pictures; ``target``: (t,) raster indices of the asked object's tokens, empty if unknown."""

    images: tuple[Image.Image, ...]
    sample: tasks.Sample
    cluster: str
    target: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Chosen(AbstractMethod):
    """Keeps given visual tokens of one picture, whatever the model thinks: for controlled comparisons."""

    faithfulness: ClassVar[Faithfulness] = "control"

    keep: tuple[int, ...] = ()
    layer: int = 1

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache."""
        return (Cut(self.layer, ratio),)

    def select(self, signals: Signals) -> Selection:
        """The given tokens."""
        return Selection(torch.tensor(self.keep, device=signals.visual.device))


def questions(split: str, count: int, task: str) -> Iterator[Question]:
    """``count`` questions of ``task`` (``grounding``, ``short`` or ``two``), at most two per picture."""
    asked, index = 0, {"grounding": 0, "short": 1_000_000, "two": 2_000_000}[task]
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
        return [Question(_drawn(*scenes), s, cluster, np.array([], dtype=int)) for s in samples]
    scene = sample_scene(rng)
    kinds = ("box", "box") if task == "grounding" else rng.permutation(("colour", "shape", "count", "number"))[:2]
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
    """A model that answers questions under a condition."""

    def __init__(self, folder: Path) -> None:
        self.model, self.processor = load(folder)
        self.depth = len(self.model.model.language_model.layers)
        self.layer = round(self.depth * 4 / 7)

    def ask(self, question: Question, method: str | AbstractMethod, ratio: float, **options: Any) -> tuple[bool, Any]:
        """(whether the greedy answer is right, (kept,) surviving visual tokens' raster indices)."""
        content = [
            *({"type": "image"} for _ in question.images),
            {"type": "text", "text": tasks.prompt_of(question.sample)},
        ]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(text=[text], images=list(question.images), return_tensors="pt")
        with torch.inference_mode(), prune(self.model, method, ratio, **options) as run:
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        said = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        visual = torch.nonzero(inputs["input_ids"][0] == self.model.config.image_token_id).flatten()
        kept = torch.nonzero(torch.isin(visual, run.kept[0].cpu())).flatten()
        return is_right(question.sample, said), kept.numpy()

    def keep(self, question: Question, tokens: np.ndarray[Any, Any]) -> tuple[bool, Any]:
        """`ask` with exactly ``tokens`` of the only picture."""
        cell = self.model.config.vision_config.patch_size * MERGE_SIZE
        image = question.images[0]
        n = (image.width // cell) * (image.height // cell)
        kept = tuple(sorted(int(t) for t in tokens)) or (0,)
        return self.ask(question, Chosen(kept, self.layer), len(kept) / n)


def grounding_conditions(asker: Asker, question: Question, number: int) -> dict[str, tuple[bool, Any]]:
    """Every condition of one grounding question; ``number`` seeds what is drawn."""
    cell = asker.model.config.vision_config.patch_size * MERGE_SIZE
    image = question.images[0]
    everything = np.arange((image.width // cell) * (image.height // cell))
    rng, target = np.random.default_rng(number), question.target
    ivc = coordinates(asker.model, image)
    background = np.setdiff1d(everything, target)
    ivc_outside = np.setdiff1d(ivc, target)
    as_many = rng.permutation(background)[: len(ivc_outside)]
    half = rng.permutation(target)[: len(target) // 2]
    found = {name: asker.ask(question, "none", 1.0) for name in ("none", "none again")}
    for ratio in (0.5, 0.25, 0.11):
        found[f"ivc_prune {ratio}"] = asker.ask(question, "ivc_prune", ratio, layer=asker.layer)
        found[f"random {ratio}"] = asker.ask(question, "random", ratio, layer=asker.layer, seed=number)
    found["value 0.5"] = asker.ask(question, "ivc_prune", 0.5, layer=asker.layer, ivc=0.0)
    for name, tokens in (
        ("half of the target dropped", np.setdiff1d(everything, half)),
        ("all but IVC", np.setdiff1d(everything, ivc)),
        ("all but IVC outside the target", np.setdiff1d(everything, ivc_outside)),
        ("all but as many outside the target", np.setdiff1d(everything, as_many)),
        ("target only", target),
        ("target + IVC", np.union1d(target, ivc)),
        ("target + as many", np.union1d(target, as_many)),
    ):
        found[name] = asker.keep(question, tokens)
    return found


def measure(asker: Asker, split: str, count: int) -> tuple[Verdicts, Verdicts, Verdicts, list[int]]:
    """Verdicts of grounding, short answers and two pictures, and the cut layers that were tried."""
    layers = list(range(1, asker.depth))
    grounding, short, two = Verdicts(), Verdicts(), Verdicts()
    for number, question in enumerate(tqdm(questions(split, count, "grounding"), total=count, desc="grounding")):
        found = grounding_conditions(asker, question, number)
        for layer in layers:
            found[f"ivc_prune 0.5 at {layer}"] = asker.ask(question, "ivc_prune", 0.5, layer=layer)
        _note(grounding, question, found)
    for question in tqdm(questions(split, count, "short"), total=count, desc="short"):
        image = question.images[0]
        cell = asker.model.config.vision_config.patch_size * MERGE_SIZE
        everything = np.arange((image.width // cell) * (image.height // cell))
        rest = np.setdiff1d(everything, coordinates(asker.model, image))
        _note(short, question, {"none": asker.ask(question, "none", 1.0), "all but IVC": asker.keep(question, rest)})
    for question in tqdm(questions(split, count, "two"), total=count, desc="two pictures"):
        _note(two, question, {"none": asker.ask(question, "none", 1.0)})
    return grounding, short, two, layers


def _note(verdicts: Verdicts, question: Question, found: dict[str, tuple[bool, Any]]) -> None:
    verdicts.clusters.append(question.cluster)
    for name, (right, kept) in found.items():
        verdicts.scores.setdefault(name, []).append(float(right))
        if len(question.target):
            verdicts.recall.setdefault(name, []).append(float(np.isin(question.target, kept).mean()))


def main(arguments: list[str] | None = None) -> int:
    """Command line: print the table, and write it with all accuracies to ``--out`` if given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name("model"), help="folder of the model")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--questions", type=int, default=1000, help="per task (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} holds no model; name the folder that the training wrote (OUT/model)")
    grounding, short, two, layers = measure(Asker(args.model), args.split, args.questions)
    figures = table(grounding, short, two, layers)
    for figure in figures:
        verdict = {True: "pass", False: "MISS", None: "-"}[figure.passed]
        sys.stdout.write(f"{figure.number:4} {verdict:5} {figure.what}: {figure.measured}\n")
    if args.out:
        accuracies = {name: grounding.percent(name) for name in grounding.scores}
        report = {"split": args.split, "questions": args.questions, "figures": [asdict(f) for f in figures]}
        args.out.write_text(json.dumps({**report, "grounding": accuracies}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
