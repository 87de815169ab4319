"""What systems that are not built yet will need of the seam, each used by a throw-away method on a tiny model.

The table in docs/design/engine.md says where the seam holds each of the six; this file holds the table to it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ivcp_eval
from ivcp_eval.interface import AbstractScorer, Cut, ModelFacts, Selection, Signal, Signals, Step
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import adapter, parameters_of
from tests.engine import tiny_models
from tests.engine.contract.cases import RAGGED, Case
from tests.engine.contract.checks import CHECKS, close, same_generation
from tests.engine.contract.toys import TOYS, Toy

FAMILIES = ("qwen2_5_vl", "llava")


class Throwaway(AbstractScorer):
    """One cut at layer 2, or what a method says."""

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(max(2, model.first_cut), ratio),)


def check(monkeypatch: pytest.MonkeyPatch, method: Toy | Throwaway, family: str, *names: str) -> None:
    """The named promises of the contract, on a method that has no file."""
    monkeypatch.setitem(TOYS, "throwaway", method)
    for name in names:
        CHECKS[name](Case(family, "throwaway"))


# -- merge weights, and a budget per stage ----------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeTheRest(Throwaway):
    """Every dropped token is added to its nearest survivor, 0.7 of each sum being the survivor's own."""

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        first = max(1, model.first_cut)
        return Cut(first, 0.8, cache="from_cut"), Cut(first + 2, ratio, cache="from_cut")

    def score(self, signals: Signals) -> Tensor:
        return torch.sin(torch.arange(signals.n_visual) * 12.9898)

    def select(self, signals: Signals) -> Selection:
        keep = super().select(signals).keep
        nearest = (torch.arange(signals.n_visual)[:, None] - keep).abs().argmin(dim=1)
        merge = 0.3 * nn.functional.one_hot(nearest, keep.numel()).float().T
        merge[torch.arange(keep.numel()), keep] = 0.7
        return Selection(keep, merge / merge.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_weights_and_a_budget_per_stage(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, MergeTheRest(), family, "prefill_equals_reference", "decode_equals_reference")
    case = Case(family, "throwaway")
    with case.prune() as recording:
        case.forward(case.inputs("t5 i0 t9"))
    (n,) = case.image_sizes("t5 i0 t9")
    first = recording.cuts[0].layer
    asked = [n] * first + [budget(0.8, n)] * 2 + [budget(0.5, n)] * (len(case.text_model.layers) - first - 2)
    assert [layer[0] for layer in recording.run.visual_per_layer] == asked
    assert [selection.merge is not None for _, selection in recording.calls] == [True, True]


# -- a frame index per token ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeastLikeTheFrameBefore(Throwaway):
    """Tokens that differ from the same place in the frame before; a frame is an image of the prompt."""

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(model.first_cut, ratio),)

    def score(self, signals: Signals) -> Tensor:
        frame = signals.image
        states = signals.hidden[signals.visual]
        change = torch.zeros(signals.n_visual)
        for t in range(1, int(frame.max()) + 1):
            before, now = (frame == t - 1).nonzero().flatten(), (frame == t).nonzero().flatten()
            n = min(before.numel(), now.numel())
            change[now[:n]] = (states[now[:n]] - states[before[:n]]).norm(dim=-1)
        return change


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_index_per_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, LeastLikeTheFrameBefore(), family, "prefill_equals_reference")
    case = Case(family, "throwaway")
    layout = "t3 i0 t2 i0 t2 i1 t6"
    with case.prune() as recording:
        case.forward(case.inputs(layout))
    ((signals, selection),) = recording.calls
    sizes = case.image_sizes(layout)
    assert signals.image.tolist() == [t for t, size in enumerate(sizes) for _ in range(size)]
    assert signals.image[selection.keep].bincount().tolist() == [budget(0.5, size) for size in sizes]


# -- a mask per decode step -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EveryThird(Throwaway):
    """Each layer attends to every third cached visual token, another third in every step; remembers what it was asked.

    Attributes:
        cut: also drop half of the tokens at layer 2, from there on.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"step"})

    cut: bool = False

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(max(2, model.first_cut), ratio, cache="from_cut"),) if self.cut else ()

    def score(self, signals: Signals) -> Tensor:
        signals.memory["from the prefill"] = True
        return torch.sin(torch.arange(signals.n_visual) * 12.9898)

    def attended(self, step: Step) -> Tensor | None:
        ASKED.append((step, dict(step.memory)))
        step.memory["calls"] = step.memory.get("calls", 0) + 1
        return None if step.layer == 0 else (step.token + step.number + step.layer) % 3 == 0


ASKED: list[tuple[Step, dict[str, Any]]] = []


@contextmanager
def every_third(text_model: Any, prompt: int, visual: list[list[int]], kept: list[set[int]]) -> Iterator[None]:
    """The same in a forward without a cache over prompt and answer: masked column by column, layer by layer."""

    def before_layer(layer: int, _module: Any, args: Any, kwargs: Any) -> Any:
        length = args[0].shape[1]
        mask = torch.ones(length, length).tril().bool().repeat(len(visual), 1, 1)
        for row, columns in enumerate(visual):
            for i, column in enumerate(columns):
                for query in range(length):
                    lost = layer >= 2 and column not in kept[row]
                    late = query >= prompt and layer > 0 and (i + query - prompt + layer) % 3 != 0
                    if (lost or late) and query != column:
                        mask[row, query, column] = False
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
        return args, {**kwargs, "attention_mask": additive}

    handles = [
        layer.register_forward_pre_hook(functools.partial(before_layer, index), with_kwargs=True)
        for index, layer in enumerate(text_model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_per_decode_step(family: str, cut: bool) -> None:
    ASKED.clear()
    case = Case(family, "none")
    inputs = case.inputs("t5 i0 t9")
    visual = [(row == case.image_token).nonzero().flatten().tolist() for row in inputs["input_ids"]]
    with ivcp_eval.prune(case.model, EveryThird(cut), ratio=0.5) as run:
        got = case.generate(inputs, 4)
    kept = [set(row.tolist()) if cut else set(range(inputs["input_ids"].shape[1])) for row in run.kept]
    with every_third(case.text_model, inputs["input_ids"].shape[1], visual, kept):
        wanted = case.generate(inputs, 4, use_cache=False)
    same_generation(got, wanted, "masked steps")
    plain = case.generate(inputs, 4)
    assert not torch.allclose(plain.logits[-1], got.logits[-1], atol=1e-3), "the mask did nothing"
    n_layers = len(case.text_model.layers)
    assert [(step.layer, step.number) for step, _ in ASKED] == [(i, t) for t in range(3) for i in range(n_layers)]
    assert [memory.get("calls", 0) for _, memory in ASKED] == list(range(3 * n_layers))
    assert all(memory.get("from the prefill", False) == cut for _, memory in ASKED)
    full, half = len(visual[0]), budget(0.5, len(visual[0]))
    assert [step.token.numel() for step, _ in ASKED[:n_layers]] == [
        half if cut and layer >= 2 else full for layer in range(n_layers)
    ]
    with pytest.raises(ValueError, match="num_beams=1"), ivcp_eval.prune(case.model, EveryThird(cut), ratio=0.5):
        case.generate(inputs, 4, num_beams=2)
    with pytest.raises(ValueError, match="use_cache=False"), ivcp_eval.prune(case.model, EveryThird(cut), ratio=0.5):
        case.generate(inputs, 4, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_masks_of_a_ragged_batch_are_those_of_its_rows(family: str) -> None:
    case = Case(family, "none")
    with ivcp_eval.prune(case.model, EveryThird(cut=True), ratio=0.5):
        batch = case.generate(case.inputs(*RAGGED), 3)
        for row, layout in enumerate(RAGGED):
            alone = case.generate(case.inputs(layout), 3)
            assert batch.sequences[row, -3:].tolist() == alone.sequences[0, -3:].tolist()
            for got, wanted in zip(batch.logits, alone.logits, strict=True):
                close(got[row], wanted[0], f"row {row}")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_step_sees_is_what_the_layer_before_computed(family: str) -> None:
    """Attention over the visual tokens by queries and keys of a `Step` is the model's own, renormalised over them."""
    ASKED.clear()
    case = Case(family, "none", attn="eager")
    inputs = case.inputs("t5 i0 t9")
    with ivcp_eval.prune(case.model, EveryThird(), ratio=0.5):
        out = case.generate(inputs, 2, output_attentions=True)
    (visual,) = [(row == case.image_token).nonzero().flatten() for row in inputs["input_ids"]]
    maps = out.attentions[1]  # of the first decode step, (1, H, 1, m) per layer
    for step, _ in ASKED:
        if step.layer == 0:
            assert step.query is step.key is None
            continue
        assert step.query is not None
        assert step.key is not None
        keys = step.key.repeat_interleave(step.query.shape[0] // step.key.shape[0], dim=0)
        logits = (step.query @ keys.transpose(1, 2))[:, 0] * case.text_model.layers[0].self_attn.scaling
        seen = maps[step.layer - 1][0, :, 0, visual]
        attended = (seen[0] > 0).nonzero().flatten()  # the layer before was masked too
        wanted = seen[:, attended] / seen[:, attended].sum(dim=1, keepdim=True)
        torch.testing.assert_close(logits[:, attended].softmax(dim=-1), wanted, atol=1e-5, rtol=1e-4)


def test_a_wrong_step_mask_is_named() -> None:
    @dataclass(frozen=True)
    class Wrong(EveryThird):
        def attended(self, step: Step) -> Tensor | None:
            return torch.ones(step.token.numel())

    case = Case("llava", "none")
    wrong = pytest.raises(ValueError, match=r"`attended` returned torch.float32 \(\d+,\), expected bool")
    with wrong, ivcp_eval.prune(case.model, Wrong(), ratio=0.5):
        case.generate(case.inputs("t5 i0 t9"), 3)


# -- weights read from a file -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained(Throwaway):
    """A linear importance predictor whose weights lie in a file."""

    weights: Path = Path("predictor.safetensors")

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", Path(self.weights))  # the command line gives text

    def score(self, signals: Signals) -> Tensor:
        if "predictor" not in signals.memory:
            signals.memory["predictor"] = load_file(self.weights)["weight"]
        return signals.hidden[signals.visual].float() @ signals.memory["predictor"]


def test_weights_are_read_from_a_file_and_identified_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width = Case("llava", "none").text_model.config.hidden_size
    file = tmp_path / "predictor.safetensors"
    save_file({"weight": torch.randn(width, generator=torch.Generator().manual_seed(1))}, file)
    method = Trained(weights=str(file))  # type: ignore[arg-type]
    check(monkeypatch, method, "llava", "prefill_equals_reference", "decode_equals_reference")
    case = Case("llava", "throwaway")
    with case.prune() as recording:
        case.forward(case.inputs("t5 i0 t9"))
    ((signals, selection),) = recording.calls
    scores = signals.hidden[signals.visual].float() @ load_file(file)["weight"]
    assert selection.keep.tolist() == scores.topk(signals.budget).indices.sort().values.tolist()

    before = parameters_of(method)["weights"]
    assert before.startswith("predictor.safetensors (sha256 ")
    (tmp_path / "elsewhere").mkdir()
    file.rename(tmp_path / "elsewhere" / file.name)
    assert parameters_of(Trained(tmp_path / "elsewhere" / file.name))["weights"] == before, "where it lies is no matter"
    save_file({"weight": torch.zeros(width)}, file)
    assert parameters_of(method)["weights"] != before, "other weights under the same name are another method"
    with pytest.raises(FileNotFoundError):
        parameters_of(Trained(tmp_path / "nowhere.safetensors"))


# -- a quantised model underneath -------------------------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """Weights as 8-bit integers with a scale per output, as weight-only quantisation keeps them; no float copy."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight * self.scale, self.bias)


def quantised(family: str) -> nn.Module:
    """A copy of the tiny model whose decoder computes with 8-bit weights."""
    model = copy.deepcopy(tiny_models.build(family)[0])
    for module in list(adapter(family).text_model(model).modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    return model


@dataclass(frozen=True)
class QuantisedCase(Case):
    """A case on the quantised copy."""

    @property
    def model(self) -> nn.Module:
        return _QUANTISED.setdefault(self.family, quantised(self.family))


_QUANTISED: dict[str, nn.Module] = {}


@pytest.mark.parametrize("method", ["ivc_prune", "fastv", "iwp", "quota", "toy_stages_mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_underneath(family: str, method: str) -> None:
    case = QuantisedCase(family, method)
    assert any(isinstance(module, Int8Linear) for module in case.text_model.modules())
    float_logits = Case(family, method).forward(case.inputs("t5 i0 t9")).logits
    assert not torch.equal(case.forward(case.inputs("t5 i0 t9")).logits, float_logits)
    for name in ("ratio_one_is_bit_equal", "prefill_equals_reference", "decode_equals_reference"):
        CHECKS[name](case)


def test_torch_dynamic_quantisation_underneath() -> None:
    """Activations are quantised per tensor there, so a shorter sequence rounds differently: only counts can hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(copy.deepcopy(tiny_models.build("llava")[0]), {nn.Linear}, dtype=torch.qint8)
    inputs = tiny_models.make_inputs("llava", "t5 i0 t9")
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with ivcp_eval.prune(model, "ivc_prune", ratio=1.0):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)
    with ivcp_eval.prune(model, "ivc_prune", ratio=0.5, layer=2) as run:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    (n,) = run.visual_prompt
    assert run.visual_kept == [budget(0.5, n)]
    assert set(run.kv_lengths) == {5 + 9 + budget(0.5, n) + 2}
