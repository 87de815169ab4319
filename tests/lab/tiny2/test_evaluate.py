"""The acceptance script: targets, controlled selections, and a table that can pass and can fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ivcp_eval.interface.ops import coordinate_set
from ivcp_eval.lab.tiny2 import evaluate
from ivcp_eval.lab.tiny2.acceptance import table
from ivcp_eval.lab.tiny2.processor import build_config, save_processor
from ivcp_eval.methods.ivc_prune import Method as IvcPrune
from ivcp_eval.reports.stats.verdicts import Verdicts
from tests.lab.tiny2.test_forward import SMALL


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> evaluate.Asker:
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(build_config(**SMALL)).save_pretrained(folder)
    save_processor(folder)
    return evaluate.Asker(folder)


def test_targets_are_the_asked_objects_cells() -> None:
    sizes = []
    for question in evaluate.questions("validation", 60, "grounding"):
        columns = question.images[0].width // 16
        x1, y1, x2, y2 = question.sample.box or (0, 0, 0, 0)
        rows, cols = question.target // columns, question.target % columns
        assert (cols * 16 < x2).all()
        assert ((cols + 1) * 16 > x1).all()
        assert (rows * 16 < y2).all()
        assert ((rows + 1) * 16 > y1).all()
        sizes.append(len(question.target))
    assert np.median(sizes) >= 25  # what the specification demands of a target


def test_controlled_conditions_keep_what_they_say(asker: evaluate.Asker) -> None:
    """Of every row of a batch: the engine cuts rows of unequal length side by side."""
    batch = list(evaluate.questions("validation", 3, "grounding"))
    found = evaluate.grounding_conditions(asker, batch, 0)
    assert all(len(answers) == len(batch) for answers in found.values())
    for row, question in enumerate(batch):
        kept = {name: set(answers[row].kept.tolist()) for name, answers in found.items()}
        target, everything = set(question.target.tolist()), kept["none"]
        assert kept["target only"] == target
        assert len(kept["half of the target dropped"] & target) == len(target) - len(target) // 2
        removed = [everything - kept[f"all but {name} outside the target"] for name in ("IVC", "as many")]
        assert len(removed[0]) == len(removed[1]) > 0
        assert not removed[0] & target
        assert len(kept["ivc_prune 0.25"]) == round(0.25 * len(everything))


def test_answers_of_a_batch_are_those_of_its_questions_alone(asker: evaluate.Asker) -> None:
    batch = list(evaluate.questions("validation", 3, "short"))
    together = asker.ask(batch, "ivc_prune", 0.5, layer=1)
    for question, answer in zip(batch, together, strict=True):
        (alone,) = asker.ask([question], "ivc_prune", 0.5, layer=1)
        assert answer.right == alone.right
        assert answer.kept.tolist() == alone.kept.tolist()


def test_coordinates_are_those_that_ivc_prune_keeps(asker: evaluate.Asker) -> None:
    question = next(evaluate.questions("validation", 1, "grounding"))
    seen = []

    class Spy(IvcPrune):
        def _select_image(self, signals, image, cos, sin):  # type: ignore[no-untyped-def]
            at = signals.visual[image.tokens]
            seen.append(coordinate_set(cos[at], sin[at], image, self.ivc, self.ivc_share))
            return super()._select_image(signals, image, cos, sin)

    asker.ask([question], Spy(layer=1), 0.5)
    assert torch.nonzero(seen[0]).flatten().tolist() == evaluate.coordinates(asker.model, question.images[0]).tolist()


def _verdicts(values: dict[str, float], n: int = 200) -> Verdicts:
    scores = {name: [float(i < share * n) for i in range(n)] for name, share in values.items()}
    return Verdicts([str(i // 2) for i in range(n)], scores, {})


def test_table_passes_and_misses() -> None:
    good = {
        **{"none": 0.95, "none again": 0.95, "ivc_prune 0.5": 0.945, "ivc_prune 0.25": 0.9, "ivc_prune 0.11": 0.8},
        **{"random 0.25": 0.8, "random 0.11": 0.6, "half of the target dropped": 0.94, "all but IVC": 0.85},
        **{"all but IVC outside the target": 0.86, "all but as many outside the target": 0.94},
        **{"target only": 0.5, "target + IVC": 0.94, "target + as many": 0.85},
        **{"fastv": 0.8, "fastv+ivc": 0.9},
    }
    grounding = _verdicts(good)
    grounding.recall = {"value 0.5": [0.8] * 200, "random 0.5": [0.5] * 200}
    layers = _verdicts({f"L{k}": 0.94 if 3 <= k <= 6 else 0.7 for k in range(1, 9)})
    order = _verdicts({"none": 0.9, "one picture": 0.33})
    short, two = _verdicts({"none": 0.95, "all but IVC": 0.945}), _verdicts({"none": 0.9})
    assert not [f.what for f in table(grounding, short, two, order, layers) if not f.passed]
    bad = _verdicts({**good, "none again": 0.9, "target only": 0.9, "half of the target dropped": 0.7})
    bad.recall = {"value 0.5": [0.5] * 200, "random 0.5": [0.5] * 200}
    order = _verdicts({"none": 0.9, "one picture": 0.5})
    missed = {f.what for f in table(bad, short, two, order, layers) if not f.passed}
    assert missed == {
        "order question on clips",  # right without seeing more than one picture
        "flips in a second unpruned run",
        "target tokens kept by the value stage at 0.5",
        "half of the target's tokens dropped",
        "retained by the target alone",
    }


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(tmp_path)])
    assert "holds no model" in capsys.readouterr().err


def test_nothing_outside_the_training_folder_imports_it() -> None:
    package = Path(evaluate.__file__).parents[2]
    training = Path(evaluate.__file__).parent / "training"
    found = [p for p in package.rglob("*.py") if training not in p.parents and "import" in p.read_text()]
    assert len(found) > 50
    assert not [p.name for p in found if "lab.tiny2.training" in p.read_text()]


def test_batches_hold_every_question_once() -> None:
    asked = [q.sample for batch in evaluate.batches("validation", 75, "short") for q in batch]
    assert asked == [q.sample for q in evaluate.questions("validation", 75, "short")]
    assert len(asked) == 75
