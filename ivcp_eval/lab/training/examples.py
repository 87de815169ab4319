"""Examples to train on, by number: an embedded model's training scenes, or a file of pictures and questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivcp_eval.lab.training.frozen import Example, Frozen

HELD_OUT = 10  # of a file, every so many questions are for validation
CLIP_SCENES, CLIP_SIDE = 4, 128  # of a clip: scenes, and pixels of a picture, both ways
FIRST_SCENE = 100_000_000  # behind every scene that an embedded model was itself trained on


class Examples(ABC):
    """A stream of examples, each a pure function of its number, so that a resumed run sees the same.

    Attributes:
        about: what they are, for the card and the identity of a run.
    """

    about: Mapping[str, Any]

    @abstractmethod
    def training(self, number: int) -> Example:
        """The example of a number, counted from 0; there is always another."""

    @abstractmethod
    def validation(self, number: int) -> Example:
        """Likewise, of those that are not trained on."""


def examples_for(frozen: Frozen, data: Path | None, kinds: Sequence[str], seed: int) -> Examples:
    """From a file, or generated for an embedded model.

    Raises:
        ValueError: no file, and no generator belongs to the model; or as `FromFile`.
    """
    if data is not None:
        return FromFile(frozen, data, seed)
    name = frozen.weights.checkpoint.name
    if name not in GENERATORS:
        raise ValueError(
            f"model {name!r} comes with no generator of training scenes (only {', '.join(GENERATORS)} do); give "
            "--data FILE, a JSONL of pictures and questions of a training split"
        )
    return Generated(name, kinds)


@dataclass(frozen=True)
class Generated(Examples):
    """Scenes of an embedded model's training split, or of its validation split; never of its test split."""

    model: str
    kinds: tuple[str, ...]

    def __init__(self, model: str, kinds: Sequence[str]) -> None:
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "kinds", tuple(kinds))

    @property
    def about(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The generator and the kinds of questions."""
        return {"data": f"scenes of {self.model}, training split", "kinds": list(self.kinds)}

    def training(self, number: int) -> Example:
        """One question about one scene."""
        return GENERATORS[self.model]("train", number, self.kinds)

    def validation(self, number: int) -> Example:
        """One question about one scene."""
        return GENERATORS[self.model]("validation", number, self.kinds)


class FromFile(Examples):
    """Questions of a JSONL or TSV file, in another order in every pass; one in `HELD_OUT` is kept for validation.

    A question without an answer gets the untouched model's.

    Raises:
        ValueError, OSError: as `calibration.questions.from_file`; or fewer than two questions.
    """

    def __init__(self, frozen: Frozen, path: Path, seed: int) -> None:
        from ivcp_eval.lab.calibration.questions import from_file

        self.frozen, self.seed = frozen, seed
        found = from_file(path)
        if len(found.questions) < 2:
            raise ValueError(f"{path} holds one question; one is needed to train on and one to validate with")
        self.about = {"data": path.name, "sha256": found.digest, "questions": len(found.questions)}
        self._held = found.questions[::HELD_OUT]
        self._rest = [q for number, q in enumerate(found.questions) if number % HELD_OUT]

    def training(self, number: int) -> Example:
        """The question at a place of the pass that it falls into."""
        turn, place = divmod(number, len(self._rest))
        return self._example(self._rest[np.random.default_rng([self.seed, turn]).permutation(len(self._rest))[place]])

    def validation(self, number: int) -> Example:
        """One of those held out, round and round."""
        return self._example(self._held[number % len(self._held)])

    def _example(self, question: Any) -> Example:
        parts = ({"image": question.image}, {"text": question.text})
        return Example(parts, question.written or self.frozen.own_answer(parts))


def _of_tiny(split: str, number: int, kinds: Sequence[str]) -> Example:
    from PIL import Image

    from ivcp_eval.lab.tiny import tasks
    from ivcp_eval.lab.tiny.scenes import render, sample_scene, scene_rng

    known = ("box", "list", "sum", *tasks.SHORT_CATEGORIES)
    if strange := sorted({*kinds} - {*known}):
        raise ValueError(
            f"training scenes of tiny have no questions of the kind {', '.join(strange)}; give --config a file whose "
            f"`kinds` are of {', '.join(known)}"
        )
    rng = scene_rng(split, FIRST_SCENE + number)
    while True:
        scene, kind = sample_scene(rng), kinds[number % len(kinds)]
        if kind == "box":
            boxes = tasks.plain_references(scene)
            sample = boxes[rng.integers(len(boxes))] if boxes else None
        elif kind in ("list", "sum"):
            sample = tasks.list_question(scene) if kind == "list" else tasks.sum_question(scene)
        else:
            sample = tasks.short_question(rng, scene, kind)
        if sample:
            parts = ({"image": Image.fromarray(render(scene))}, {"text": tasks.build_prompt(sample)})
            return Example(parts, sample.answer)


def _of_tiny2(split: str, number: int, kinds: Sequence[str]) -> Example:
    from PIL import Image

    from ivcp_eval.lab.tiny2 import tasks
    from ivcp_eval.lab.tiny2.scenes import render, sample_scene, scene_rng

    rng = scene_rng(split, FIRST_SCENE + number)
    if of_clips := {"clip": _clip, "event": _event}.get(kinds[number % len(kinds)]):
        return of_clips(rng)
    while True:
        scene = sample_scene(rng)
        if samples := tasks.pick(rng, scene, [kinds[number % len(kinds)]]):
            parts = ({"image": Image.fromarray(render(scene))}, {"text": tasks.prompt_of(samples[0])})
            return Example(parts, samples[0].answer)


def _clip(rng: np.random.Generator) -> Example:
    """Four scenes of one object each, each a different shape and shown twice, and the colour of one of them."""
    from ivcp_eval.lab.tiny2.scenes import Scene, render, sample_scene

    scenes: list[Scene] = []
    while len(scenes) < CLIP_SCENES:
        scene = sample_scene(rng, (CLIP_SIDE, CLIP_SIDE), (1, 1))
        if scene.objects[0].shape not in [known.objects[0].shape for known in scenes]:
            scenes.append(scene)
    asked = scenes[rng.integers(len(scenes))].objects[0]
    frames = np.repeat(np.stack([render(scene) for scene in scenes]), 2, axis=0)
    video = {"video": frames, "seconds": [0.5 * step for step in range(len(frames))]}
    return Example((video, {"text": f"What colour is the {asked.shape}?"}), asked.colour)


def _event(rng: np.random.Generator) -> Example:
    """What happens in a clip of the embedded video benchmark's kinds, with options in a drawn order."""
    from ivcp_eval.lab.tiny2 import clips, tasks

    group, clip, pictures = clips.draw(rng, [*clips.TASKS])
    sample = clips.choice(rng, group, clip)
    frames = np.repeat(pictures, clips.FRAMES_A_STEP, axis=0)
    apart = clips.SECONDS_A_STEP / clips.FRAMES_A_STEP
    video = {"video": frames, "seconds": [apart * frame for frame in range(len(frames))]}
    return Example((video, {"text": tasks.prompt_of(sample)}), sample.answer)


#: Embedded model -> ``(split, number, kinds)`` gives an example.
GENERATORS: Mapping[str, Callable[[str, int, Sequence[str]], Example]] = {"tiny": _of_tiny, "tiny2": _of_tiny2}
