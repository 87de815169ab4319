"""What cannot work says what was got, what is allowed and what to do, and leaves the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

import ivcp_eval
from ivcp_eval.interface import Cut, Selection, Signal
from tests.engine import tiny_models
from tests.engine.contract.cases import RAGGED, SINGLE, Case
from tests.engine.contract.checks import hooks_of
from tests.engine.contract.toys import Toy

FAMILIES = tiny_models.names()


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = Case(request.param, "toy_all_layers")
    plain, before = case.forward(case.inputs(*SINGLE)).logits, hooks_of(case.model)
    yield case
    case.model.eval()
    assert hooks_of(case.model) == before
    assert torch.equal(case.forward(case.inputs(*SINGLE)).logits, plain)


@contextlib.contextmanager
def refused(case: Case, message: str) -> Iterator[dict[str, Any]]:
    with pytest.raises(ValueError, match=message), case.prune():
        yield case.inputs(*SINGLE)


@pytest.mark.parametrize("ratio", [0, 0.0, 1.5, -0.5, float("nan"), float("inf"), "0.5", True, None])
def test_ratio_outside_range(ratio: Any) -> None:
    case = Case("qwen2_5_vl", "none")
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"), ivcp_eval.prune(case.model, "none", ratio):
        pass


def test_unknown_names_suggest_the_nearest() -> None:
    model = Case("qwen2_5_vl", "none").model
    with pytest.raises(ValueError, match=r"unknown method 'ivcprune'; did you mean 'ivc_prune'\?"):
        ivcp_eval.prune(model, "ivcprune", 0.5).__enter__()
    with pytest.raises(ValueError, match=r"no parameter 'layers'; did you mean 'layer'\? Parameters: .*seeds"):
        ivcp_eval.prune(model, "ivc_prune", 0.5, layers=3).__enter__()
    with pytest.raises(ValueError, match=r"unknown model family 'qwen2_5_v'; did you mean 'qwen2_5_vl'\?"):
        ivcp_eval.prune(model, "none", 0.5, family="qwen2_5_v").__enter__()
    with pytest.raises(ValueError, match=r"unknown model type 'Linear'"):
        ivcp_eval.prune(torch.nn.Linear(1, 1), "none", 0.5).__enter__()
    with pytest.raises(ValueError, match=r"\['layer'\] were given beside a ready method"):
        ivcp_eval.prune(model, Toy(), 0.5, layer=3).__enter__()


@pytest.mark.parametrize("layer", [-1, 0, 6, 99])
def test_layer_outside_model(layer: int) -> None:
    model = Case("qwen2_5_vl", "none").model
    with pytest.raises(ValueError, match=f"layer {layer} .*"):
        ivcp_eval.prune(model, "ivc_prune", 0.5, layer=layer).__enter__()


def test_layer_is_a_whole_number() -> None:
    method = Case("qwen2_5_vl", "toy_all_layers").make()
    object.__setattr__(method, "cuts", lambda _model, ratio: (Cut(2.5, ratio),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cuts at layers \[2\.5\]; a layer is a whole number"):
        ivcp_eval.prune(Case("qwen2_5_vl", "none").model, method, 0.5).__enter__()


@pytest.mark.parametrize(("layer", "needs"), [(2, {"query"}), (0, {"query", "key"})])
def test_attention_that_was_not_captured(layer: int, needs: set[Signal]) -> None:
    case = Case("qwen2_5_vl", "toy_all_layers")
    method = case.make()
    cut = Cut(layer, 0.5, needs=frozenset(needs))
    object.__setattr__(method, "cuts", lambda _model, _ratio: (cut,))
    object.__setattr__(method, "select", lambda signals: signals.attention(signals.question))
    message = rf"before the cut at layer {layer} was asked for, but .* name both in `needs`"
    with pytest.raises(ValueError, match=message), ivcp_eval.prune(case.model, method, 0.5):
        case.forward(case.inputs(*SINGLE))


def test_method_that_breaks_its_word() -> None:
    case = Case("qwen2_5_vl", "toy_all_layers")
    wrong = {
        "strictly increasing": lambda s: Selection(torch.tensor([3, 1])),
        "outside 0..23": lambda s: Selection(torch.arange(12) + 13),
        "its budget is 12": lambda s: Selection(torch.arange(11)),
        "merge weights": lambda s: Selection(torch.arange(12), merge=torch.zeros(12, 3)),
    }
    for message, select in wrong.items():
        method = case.make()
        object.__setattr__(method, "select", select)
        with pytest.raises(ValueError, match=message), ivcp_eval.prune(case.model, method, 0.5):
            case.forward(case.inputs(*SINGLE))
    assert hooks_of(case.model) == []


def test_cuts_must_increase() -> None:
    model = Case("qwen2_5_vl", "none").model
    with pytest.raises(ValueError, match="must increase strictly"):
        ivcp_eval.prune(model, Toy(depths=(0.5, 0.2)), 0.5).__enter__()


def test_only_evictions_are_late() -> None:
    model, method = Case("qwen2_5_vl", "none").model, Toy(depths=(0.5,))
    object.__setattr__(method, "cuts", lambda facts, ratio: (Cut(2, ratio, late=True),))
    with pytest.raises(ValueError, match="late, which only an eviction"), ivcp_eval.prune(model, method, 0.5):
        pass


def test_static_cache(case: Case) -> None:
    with refused(case, "StaticLayer|StaticCache") as inputs:
        case.generate(inputs, 2, cache_implementation="static", disable_compile=True)


def test_cache_of_unknown_layers(case: Case) -> None:
    class QuantizedLike(DynamicLayer):
        """Looks dynamic, stores something else."""

    with refused(case, "QuantizedLike") as inputs:
        case.forward(inputs, past_key_values=DynamicCacheOf(QuantizedLike))


class DynamicCacheOf(DynamicCache):
    """A cache whose layers are of a given class."""

    def __init__(self, layer_class: type) -> None:
        super().__init__()
        self.layer_class_to_replicate = layer_class


def test_labels(case: Case) -> None:
    with refused(case, "got labels") as inputs:
        case.forward(inputs, labels=inputs["input_ids"])


def test_training_mode(case: Case) -> None:
    with refused(case, r"model.eval\(\)") as inputs:
        case.model.train()
        case.forward(inputs)


def test_four_dimensional_mask(case: Case) -> None:
    with refused(case, "4-dimensional attention_mask") as inputs:
        length = inputs["input_ids"].shape[1]
        position_ids = torch.arange(length)[None]
        inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool)
        case.forward({key: value for key, value in inputs.items() if "type_ids" not in key}, position_ids=position_ids)


def test_new_image_on_a_filled_cache(case: Case) -> None:
    with refused(case, "image on a cache that already holds a prompt") as inputs:
        cache = case.forward(inputs).past_key_values
        case.forward(inputs, past_key_values=cache)


def test_chunked_prefill_through_an_image(case: Case) -> None:
    inputs = case.inputs(*SINGLE)
    try:
        plain = case.generate(inputs, 2, prefill_chunk_size=12)
    except RuntimeError as reason:
        pytest.skip(f"this transformers release cannot either: {reason}")
    except ValueError:
        plain = None  # refused by transformers itself, as it must be by us
    if plain is not None and not torch.allclose(plain.logits[0], case.generate(inputs, 1).logits[0], atol=1e-3):
        pytest.skip("this transformers release drops the image in a chunked prefill")
    with pytest.raises(ValueError, match=r"image on a cache|ends with a visual token|hunked prefill"), case.prune():
        case.generate(inputs, 2, prefill_chunk_size=12)


def test_nested_blocks(case: Case) -> None:
    with case.prune():
        with pytest.raises(ValueError, match="already inside a prune block"), ivcp_eval.prune(case.model, "none"):
            pass
        pruned = case.forward(case.inputs(*SINGLE)).logits  # the outer block goes on
    assert pruned.shape[1] < case.inputs(*SINGLE)["input_ids"].shape[1]


def test_prompt_that_ends_with_an_image(case: Case) -> None:
    inputs = case.inputs("t4 i0")
    if int(inputs["input_ids"][0, -1]) != case.image_token:
        with case.prune():
            case.forward(inputs)
        return
    with pytest.raises(ValueError, match="ends with a visual token"), case.prune():
        case.forward(inputs)


def test_unsupported_attention(case: Case) -> None:
    config = case.text_model.config
    kept = config._attn_implementation
    try:
        config._attn_implementation = "flex_attention"
        with refused(case, "attention implementation 'flex_attention'") as inputs:
            case.forward(inputs)
    finally:
        config._attn_implementation = kept


def test_compiled_model(case: Case) -> None:
    """Compiled code ignores hooks that come later: it would silently run unpruned."""
    with pytest.raises(ValueError, match=r"without torch.compile"):
        ivcp_eval.prune(torch.compile(case.model, backend="eager"), case.make(), 0.5).__enter__()
    layer = case.text_model.layers[0]
    layer.compile(backend="eager")
    try:
        with pytest.raises(ValueError, match=r"without torch.compile"), case.prune():
            pass
    finally:
        layer._compiled_call_impl = None


def test_pruned_cache_cannot_be_reset_or_cut_into_the_prompt(case: Case) -> None:
    with case.prune():
        cache = case.generate(case.inputs(*RAGGED), 3).past_key_values
    with pytest.raises(ValueError, match="only 2 follow the pruned prompt"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="cannot be reset"):
        cache.reset()
    cache.crop(-2)
    assert cache.get_seq_length() == case.inputs(*RAGGED)["input_ids"].shape[1]


def test_embeddings_with_pixels_need_an_image_mask(case: Case) -> None:
    inputs = case.inputs(*SINGLE)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = case.model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"image_mask|input_ids"), case.prune():
        case.forward(inputs)
