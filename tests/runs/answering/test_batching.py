"""How many samples go together, and that nothing but their number decides it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.interface import models
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.batching import MOST_CPU, SHARE, Fits, batch_size, out_of_memory, row_bytes
from ivcp_eval.runs.answering.samples import answer_samples
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from tests.answers import answer as answered
from tests.engine.contract.pretended import limited_memory
from tests.runs.conftest import Bench

SHAPE = DecoderShape(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944)


def session(device: str = "cpu") -> Any:
    return SimpleNamespace(
        placement=SimpleNamespace(device=device),
        prompt_tokens=len,
        model=torch.nn.Linear(2, 2),
        shape=SHAPE,
        limits=SimpleNamespace(max_new_tokens=100),
    )


def test_a_row_is_its_caches_and_what_is_in_flight() -> None:
    """Qwen2.5-VL-7B in bfloat16: 57,344 bytes of cache a token, as its documentation's formula gives."""
    cache = 57344 * (1000 + 2 * 1100)
    activations = 2 * 1000 * (8 * 3584 + 3 * 18944) * 2
    assert row_bytes(SHAPE, 1000, 100, variants=2, itemsize=2) == cache + activations


@pytest.mark.parametrize(("rows", "wanted"), [(0.2, 1), (2.5, 2), (1000.0, MOST_CPU)])
def test_as_many_as_fit_and_no_more_than_gain(rows: float, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt: Any = range(1000)
    total = rows * row_bytes(SHAPE, 1000, 100, 2, 4) / SHARE
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total))
    assert batch_size(session(), [prompt], variants=2) == wanted


def test_the_longest_sample_that_can_be_read_decides() -> None:
    asked: list[int] = []

    def prompt_tokens(parts: Any) -> int:
        asked.append(parts)
        if parts == 1:
            raise OSError("cannot be decoded")
        return 10

    found = session()
    found.prompt_tokens = prompt_tokens
    assert batch_size(found, iter([1, 2, 3]), 1) == MOST_CPU  # type: ignore[list-item]
    assert asked == [1, 2]
    found.prompt_tokens = lambda parts: (_ for _ in ()).throw(OSError("none of them"))
    assert batch_size(found, iter([1]), 1) == 1  # type: ignore[list-item]


class Memory:
    """A session that holds so many characters at a time."""

    def __init__(self, characters: int) -> None:
        self.characters = characters
        self.tried: list[tuple[int, int]] = []  # samples, and characters of the longest
        self.placement, self.model = SimpleNamespace(dtype="float32"), torch.nn.Module()

    def answer_batch(self, conversations: Any, variants: Any, grounding: bool) -> Any:
        longest = max(len(parts[0]["text"]) for parts in conversations)
        self.tried.append((len(conversations), longest))
        if len(conversations) * longest > self.characters:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[answered("together") for _ in variants] for _ in conversations]

    def answer_all(self, parts: Any, variants: Any, grounding: bool, exact: bool) -> Any:
        self.tried.append((1, len(parts[0]["text"])))
        if len(parts[0]["text"]) > self.characters:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [answered("alone") for _ in variants]


def _answered(memory: Memory, lengths: list[int], fits: Fits) -> list[str]:
    samples: Any = [(f"{number:02d}", [{"text": "x" * length}]) for number, length in enumerate(lengths)]
    cells: Any = [SimpleNamespace(identity=SimpleNamespace(variant=name)) for name in "ab"]
    keys = {key for key, _ in samples}
    made = dict(answer_samples(memory, samples, keys, cells, False, False, batch=8, fits=fits))  # type: ignore[arg-type]
    assert set(made) == keys
    return [key for key, answers in made.items() if any(answer is None or answer.error for answer in answers)]


def test_what_did_not_fit_is_not_tried_again(tmp_path: Path) -> None:
    memory, file = Memory(4 * 4000), tmp_path / "fits.json"
    assert not _answered(memory, [400] * 8 + [4000] * 24, Fits(file))
    assert memory.tried == [(8, 400), (8, 4000), *[(4, 4000)] * 6], "one failure, and short prompts go as before"
    memory.tried.clear()
    assert not _answered(memory, [400] * 8 + [3900] * 8 + [7000] * 8, Fits(file))
    assert memory.tried[:3] == [(8, 400), (4, 3900), (4, 3900)], "the next process begins with what fitted"
    assert (8, 7000) not in memory.tried, "what is longer fits no better"
    assert memory.tried[3:] == [(4, 7000), (2, 7000), (2, 7000), (2, 7000), (2, 7000)]


def test_a_sample_that_fits_nowhere_teaches_nothing() -> None:
    memory = Memory(8 * 4090)
    fits = Fits()
    assert _answered(memory, [4000] * 7 + [40000], fits) == ["07"]
    assert not fits.limits


def test_what_fitted_once_still_does(tmp_path: Path) -> None:
    fits = Fits()
    fits.fitted(1000, 4)
    fits.too_many(1000, 2)
    assert (fits.most(1000), fits.most(5000), fits.most(100)) == (4, 4, None)
    file = tmp_path / "fits.json"
    first, second = Fits(file), Fits(file)
    assert first.most(9) is second.most(9) is None
    first.too_many(9, 4)
    second.too_many(100, 2)
    assert (Fits(file).most(9), Fits(file).most(100)) == (4, 2), "processes do not forget what others learnt"
    file.write_text("[1")
    assert Fits(file).most(9) is None


def test_the_next_process_knows_how_many_variants_fitted(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fits" / "tiny.variants.json"

    def loaded() -> Session:
        limits = Limits(4 * 28 * 28, 64 * 28 * 28, max_new_tokens=2)
        return Session(models.locate("tiny", random_model), Placement("cpu").resolve(), limits, fits=file)

    parts: Any = [{"image": Image.new("RGB", (112, 112))}, {"text": "What is it?"}]
    variants = [Variant("", "ivc_prune", ratio, {"layer": 3}) for ratio in (0.75, 0.5, 0.35, 0.25)]
    with limited_memory(monkeypatch, 2) as tried:
        wanted = loaded().answer_all(parts, variants)
        assert tried == [4, 2, 2]
    with limited_memory(monkeypatch, 2) as tried:
        again = loaded()
        assert again.answer_all(parts, variants) == wanted
        assert tried == [2, 2], "the same halves, and no failure"
    with limited_memory(monkeypatch, 1):  # for the moment: others are at work, too
        assert again.answer_all(parts, variants) == wanted
    assert list(json.loads(file.read_text()).values()) == [2], "what fitted before still does"


def test_a_sweep_remembers_how_many_variants_fitted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with limited_memory(monkeypatch, 2) as tried:
        assert bench.call("run", "--quiet") == 0
        assert max(tried) > 2
    (file,) = bench.folder.rglob("fits/tiny.variants.json")
    assert set(json.loads(file.read_text()).values()) == {2}


def test_the_weights_leave_less_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows would fit into the whole memory, of which the weights take more than half."""
    found = session()
    row = row_bytes(SHAPE, 1000, 100, 2, 4)
    found.model = torch.nn.Linear(row // 4, 2, bias=False, device="meta")  # as large as two rows
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2.5 * row / SHARE))
    prompt: Any = range(1000)
    assert batch_size(found, [prompt], variants=2) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory")])
def test_memory_runs_out_in_several_ways(error: Exception) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes do not match"))


def test_batches_are_the_default_and_change_no_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.call("run", "--quiet") == 0
    batched = bench.elsewhere(bench.folder.parent / "batched")
    bench.spec.write_text(bench.spec.read_text().replace("batch: 1\n", "").replace("shard: 3", "shard: 5"))
    sizes: list[int] = []
    answer_batch = Session.answer_batch

    def counted(self: Session, conversations: Any, *more: Any) -> Any:
        sizes.append(len(conversations))
        return answer_batch(self, conversations, *more)

    monkeypatch.setattr(Session, "answer_batch", counted)
    assert batched.call("run", "--quiet") == 0
    assert sizes == [4, 4], "five samples a benchmark: four together, one alone"
    assert batched.results() == bench.results()
