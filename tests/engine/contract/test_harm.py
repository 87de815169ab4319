"""What would give wrong numbers without a word: videos, threads, chunks, caches continued outside, careless methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ivcp_eval
from ivcp_eval.engine.fork import fork
from ivcp_eval.interface import AbstractScorer, Cut, Selection, Signals, ops, registry
from ivcp_eval.interface.variants import Variant
from ivcp_eval.methods._greedy import farthest_points
from ivcp_eval.runs.records.record import cell_record
from ivcp_eval.runs.records.scores import Made, Sample, Scores
from tests.answers import answer
from tests.engine import tiny_models
from tests.engine.contract.cases import RAGGED, SINGLE, Case
from tests.engine.contract.toys import TOYS

FAMILIES = tiny_models.names()
PLAIN = Case("llava", "toy_all_layers")


@pytest.mark.parametrize("family", [name for name in FAMILIES if registry.adapter(name).no_videos])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_a_video_is_refused_where_it_would_count_as_text(family: str, ratio: float) -> None:
    case = Case(family, "toy_all_layers", ratio=ratio)
    for extra in ({"pixel_values_videos": torch.zeros(1, 2)}, {"mm_encoder_outputs": {"video": object()}}):
        with pytest.raises(ValueError, match=r"got a video, .* picture.* Pass its frames as images"), case.prune():
            case.forward({**case.inputs(*SINGLE), **extra})


@pytest.mark.parametrize(
    ("family", "method"),
    [("llava", "toy_all_layers"), ("qwen2_5_vl", "visionzip"), ("llava_next", "visionzip"), ("qwen2_5_vl", "rotatek")],
)
def test_eight_threads_share_one_block(family: str, method: str) -> None:
    case = Case(family, method)
    # Same lengths and other contents: a mix-up would raise no error.
    prompts = [case.inputs(f"t5 i0 t{9 + i % 2}", seed=i) for i in range(8)]
    alone = []
    for prompt in prompts:
        with case.prune():
            alone.append(case.generate(prompt, 4))
    with case.prune(), ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: case.generate(prompt, 4), prompts * 2))
    for wanted, got in zip(alone * 2, together, strict=True):
        assert torch.equal(got.sequences, wanted.sequences)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.logits, wanted.logits, strict=True))


def test_an_error_in_one_thread_does_not_stop_the_others() -> None:
    with PLAIN.prune(), ThreadPoolExecutor(2) as pool:
        broken = pool.submit(PLAIN.forward, {**PLAIN.inputs(*SINGLE), "labels": PLAIN.inputs(*SINGLE)["input_ids"]})
        with pytest.raises(ValueError, match="got labels"):
            broken.result(timeout=30)
        assert pool.submit(PLAIN.generate, PLAIN.inputs(*SINGLE)).result(timeout=30).sequences.numel()


@pytest.mark.parametrize("how", ["argument", "config", "position", "model", "model, beside a config"])
def test_chunked_prefill_is_refused_before_it_begins(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the image lies in one chunk: the method would rank without the rest of the question."""
    case = Case("qwen2_5_vl", "toy_all_layers")
    options: dict[str, Any] = {}
    if how == "argument":
        options["prefill_chunk_size"] = 34
    elif how == "config":
        options["generation_config"] = type(case.model.generation_config)(prefill_chunk_size=34)
    elif how == "position":
        inputs = case.inputs(*SINGLE)
        config = type(case.model.generation_config)(prefill_chunk_size=34)
        with pytest.raises(ValueError, match="Chunked prefill"), case.prune():
            case.model.generate(inputs.pop("input_ids"), config, **inputs)
        return
    else:
        monkeypatch.setattr(case.model.generation_config, "prefill_chunk_size", 34)
        if how != "model":
            options["generation_config"] = type(case.model.generation_config)(max_new_tokens=2)
    with pytest.raises(ValueError, match=r"Chunked prefill \(prefill_chunk_size=34\)"), case.prune():
        case.generate(case.inputs(*SINGLE), 2, **options)
    assert "generate" not in vars(case.model)


@pytest.mark.parametrize("method", ["toy_all_layers", "toy_from_cut", "toy_renumber_once"])
def test_a_pruned_cache_outside_the_block_is_right_or_refused(method: str) -> None:
    for layouts in (SINGLE, RAGGED):
        case = Case("qwen2_5_vl" if method == "toy_all_layers" else "llava", method)
        inputs = case.inputs(*layouts)
        with case.prune():
            inside = case.generate(inputs, 4)
        with case.prune():
            cache = case.generate(inputs, 2).past_key_values
        turn = tiny_models.second_turn(case.family, inputs, inside.sequences[:, :-1])
        if method == "toy_all_layers" and layouts == SINGLE:
            got = case.generate(turn, 1, past_key_values=cache)
            assert torch.allclose(got.logits[0], inside.logits[3], atol=1e-4)
            continue
        with pytest.raises(ValueError, match="only a prune block can mask: continue inside one"):
            case.generate(turn, 1, past_key_values=cache)


# -- methods ----------------------------------------------------------------------------------------------------------


class Careless(AbstractScorer):
    """Does what a test asks of it."""

    name = "careless"
    needs = frozenset({"query", "key", "value"})

    def __init__(self, score: Callable[[Signals], Any], layer: int = 2) -> None:
        self.do, self.layer = score, layer

    def cuts(self, _model: Any, ratio: float) -> tuple[Cut, ...]:
        return (Cut(self.layer, ratio),)

    def score(self, signals: Signals) -> Any:
        return self.do(signals)


def scored(signals: Signals) -> torch.Tensor:
    return signals.hidden[signals.visual].float().norm(dim=-1)


def writing(field: str) -> Callable[[Signals], torch.Tensor]:
    def score(signals: Signals) -> torch.Tensor:
        wanted = scored(signals)
        image = signals.images[0]
        tensor = image.span.columns if field == "images[0].span.columns" else getattr(signals, field)
        tensor.add_(1)
        return wanted

    return score


@pytest.mark.parametrize("field", ["hidden", "query", "key", "value", "visual", "images[0].span.columns"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_method_that_writes_into_signals_is_named(field: str, mode: Any) -> None:
    inputs, columns = PLAIN.inputs(*SINGLE), field.replace("[", r"\[").replace("]", r"\]")
    with (
        mode(),
        pytest.raises(ValueError, match=rf"method 'careless' wrote into signals\.{columns}.*Nothing of this pass"),
        ivcp_eval.prune(PLAIN.model, Careless(writing(field)), 0.5),
    ):
        PLAIN.model(**inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fork_with_a_method_that_writes_gives_no_answer(mode: Any) -> None:
    variants = [Variant("", "uniform", 0.5), Variant("", "fastv", 0.5)]
    inputs = PLAIN.inputs(*SINGLE)
    with mode():
        before = fork(PLAIN.model, variants, inputs, max_new_tokens=2)
        object.__setattr__(variants[0], "method", Careless(writing("hidden"), layer=1))
        with pytest.raises(ValueError, match=r"'careless' wrote into signals\.hidden"):
            fork(PLAIN.model, variants, inputs, max_new_tokens=2)
        object.__setattr__(variants[0], "method", "uniform")
        after = fork(PLAIN.model, variants, inputs, max_new_tokens=2)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.tokens[0], new.tokens[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_counted_and_said(value: float) -> None:
    def score(signals: Signals) -> torch.Tensor:
        made = scored(signals)
        made[:3] = value
        return made

    with ivcp_eval.prune(PLAIN.model, Careless(score), 0.5) as run:
        with pytest.warns(UserWarning, match="'careless' gave 3 scores that are not finite"):
            PLAIN.generate(PLAIN.inputs(*RAGGED), 2)
        assert run.nonfinite_scores == [3, 3, 0]
        assert run.row(1).nonfinite_scores == [3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ivcp_eval.prune(PLAIN.model, Careless(scored), 0.5) as run:
            PLAIN.generate(PLAIN.inputs(*RAGGED), 2)
        assert run.nonfinite_scores == [0, 0, 0]


RANKED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ranking": lambda score: ops.top(score, 8),
    "topk": lambda score: score.topk(8).indices.sort().values,
    "topk, least": lambda score: torch.topk(-score, 8, 0, False).indices.sort().values,
    "sort": lambda score: torch.sort(score, descending=True).indices[:8].sort().values,
    "argsort": lambda score: score.argsort(descending=True)[:8].sort().values,
    "best of rest": lambda score: ops.best_of_rest(score, torch.zeros_like(score, dtype=torch.bool), 8).sort().values,
    "features": lambda score: farthest_points(torch.stack((score, score.detach() ** 2), dim=1), 8),
}


class OwnSelect(Careless):
    """Ranks without `score`."""

    def select(self, signals: Signals) -> Selection:
        return Selection(self.do(signals))


@pytest.mark.parametrize("way", RANKED)
def test_scores_of_a_method_that_selects_by_itself_are_counted(way: str) -> None:
    def broken(signals: Signals) -> torch.Tensor:
        return RANKED[way](scored(signals).index_fill(0, torch.arange(3), torch.nan))

    with ivcp_eval.prune(PLAIN.model, OwnSelect(broken), 0.5) as run:
        with pytest.warns(UserWarning, match="'careless' gave 3 scores that are not finite"):
            PLAIN.generate(PLAIN.inputs(*SINGLE), 2)
        assert run.nonfinite_scores == [3]
    with ivcp_eval.prune(PLAIN.model, OwnSelect(lambda signals: RANKED[way](scored(signals))), 0.5) as run:
        PLAIN.generate(PLAIN.inputs(*SINGLE), 2)
        assert run.nonfinite_scores == [0]


def test_a_run_says_how_many_samples_had_broken_scores() -> None:
    answers = {"a": answer(), "b": answer(nonfinite_scores=3)}
    scores = Scores(Made(), {"score": (1.0, 1.0)}, (Sample("0", "a"), Sample("1", "b")))
    record = cell_record({"placement": {"device": "cpu"}}, answers, scores)
    assert record.reason == "1 of 2 samples had scores that are not finite"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros(16), "`score` gave a numpy.ndarray, expected a torch tensor"),
        (None, "`score` gave None, expected a torch tensor"),
        ([0.0] * 16, "`score` gave a list, expected a torch tensor"),
        ("best", "`score` gave a str, expected a torch tensor"),
    ],
)
def test_scores_of_another_type(value: Any, said: str) -> None:
    method = Careless(lambda _: value)
    with pytest.raises(TypeError, match=f"method 'careless': {said}"), ivcp_eval.prune(PLAIN.model, method, 0.5):
        PLAIN.forward(PLAIN.inputs(*SINGLE))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "`select` gave None, expected a Selection"),
        ([1, 2], "`select` gave a list, expected a Selection"),
        (torch.arange(8), "`select` gave a torch.Tensor, expected a Selection"),
        (Selection(np.arange(8)), "`Selection.keep` gave a numpy.ndarray, expected an int64 tensor"),  # type: ignore[arg-type]
        (Selection(torch.ones(16, dtype=torch.bool)), "Selection.keep is a torch.bool tensor"),
        (Selection(torch.arange(8), merge=[[1]]), "`Selection.merge` gave a list"),  # type: ignore[arg-type]
    ],
)
def test_selections_of_another_type(value: Any, said: str) -> None:
    method = PLAIN.make()
    object.__setattr__(method, "select", lambda _signals: value)
    with pytest.raises(TypeError, match=said), ivcp_eval.prune(PLAIN.model, method, 0.5):
        PLAIN.forward(PLAIN.inputs(*SINGLE))


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (None, TypeError, "`edit_keys` gave None, expected a torch tensor"),
        (np.zeros(3), TypeError, "`edit_keys` gave a numpy.ndarray, expected a torch tensor"),
        (torch.zeros(1), ValueError, r"`edit_keys` returned shape \(1,\), expected"),
    ],
)
def test_edited_keys_of_another_kind(value: Any, error: type[Exception], said: str) -> None:
    case = Case("llava", "rotatek")
    method = case.make()
    object.__setattr__(method, "edit_keys", lambda _cached: value)
    with pytest.raises(error, match=f"method 'rotatek': {said}"), ivcp_eval.prune(case.model, method, 0.5):
        case.generate(case.inputs(*SINGLE), 2)


@pytest.mark.parametrize("value", [[True], np.ones(8, dtype=bool), "all"])
def test_attended_tokens_of_another_kind(value: Any) -> None:
    method = Careless(scored)
    method.needs = frozenset({"step"})
    method.attended = lambda _step: value
    said = "`attended` gave a .*expected a bool tensor"
    with pytest.raises(TypeError, match=said), ivcp_eval.prune(PLAIN.model, method, 0.5):
        PLAIN.generate(PLAIN.inputs(*SINGLE), 2)


# -- what is handed to prune ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ivc_prune", "toy"])
def test_a_ratio_must_be_named(method: str) -> None:
    given = TOYS["toy_all_layers"] if method == "toy" else method
    with pytest.raises(ValueError, match=r"got no ratio: .* an unpruned run is prune\(model, 'none'\)"):
        ivcp_eval.prune(PLAIN.model, given).__enter__()
    with ivcp_eval.prune(PLAIN.model, "none") as run:
        assert run.ratio == 1


class Wrapper(nn.Module):
    """As PEFT's: the model inside, with adapters in its layers."""

    def __init__(self, model: nn.Module, virtual: bool = False) -> None:
        super().__init__()
        self.inner = model
        self.active_peft_config = type("Config", (), {"is_prompt_learning": virtual})()

    def get_base_model(self) -> nn.Module:
        return self.inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner.forward(**inputs)  # PEFT passes by the hooks of the model itself


def test_a_peft_wrapper_is_looked_through() -> None:
    inputs, wrapper = PLAIN.inputs(*SINGLE), Wrapper(PLAIN.model)
    with PLAIN.prune():
        wanted = PLAIN.forward(inputs).logits
    with ivcp_eval.prune(wrapper, PLAIN.make(), 0.5), torch.no_grad():
        assert torch.equal(wrapper(**inputs).logits, wanted)
        with pytest.raises(ValueError, match="got labels"):
            wrapper(**inputs, labels=inputs["input_ids"])
    assert not wrapper._forward_pre_hooks
    with pytest.raises(ValueError, match="virtual tokens before the prompt"):
        ivcp_eval.prune(Wrapper(PLAIN.model, virtual=True), "fastv", 0.5).__enter__()


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inside DataParallel.*pass model.module"):
        ivcp_eval.prune(nn.DataParallel(PLAIN.model), "fastv", 0.5).__enter__()


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="transformers cannot make this cache with a CUDA build of torch and no driver",
)
def test_an_offloaded_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not static, quantised, offloaded"), PLAIN.prune():
        PLAIN.generate(PLAIN.inputs(*SINGLE), 2, cache_implementation="offloaded")
