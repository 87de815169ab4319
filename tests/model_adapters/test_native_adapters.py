"""Spans, views, prompts and entries of the native families, against transformers' own processors where they count."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaNextConfig, LlavaNextProcessor, LlavaOnevisionConfig, LlavaOnevisionProcessor

import ivcp_eval
from ivcp_eval.interface import Selection, Signals
from ivcp_eval.interface.models import checkpoints
from ivcp_eval.interface.registry import adapter, family_names
from ivcp_eval.methods.ivc_prune import Method as IVCPrune
from model_adapters._transformers import images_by_length
from tests.engine import tiny_models
from tests.engine.contract.cases import image_columns

NATIVE = sorted(set(family_names()) - {"deepseek_vl2"})
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def recorded(family: str, *layouts: str, ratio: float = 0.5, **parameters: Any) -> list[tuple[Signals, Selection]]:
    """What ``ivc_prune`` saw and chose in each row that has images."""
    model, make_inputs = tiny_models.build(family)
    calls: list[tuple[Signals, Selection]] = []

    class Spy(IVCPrune):
        def select(self, signals: Signals) -> Selection:
            calls.append((signals, super().select(signals)))
            return calls[-1][1]

    options = getattr(tiny_models.family(family), "PRUNE", {})
    with torch.no_grad(), ivcp_eval.prune(model, Spy(**parameters), ratio, **options):
        model(**make_inputs(*layouts))
    return calls


@pytest.mark.parametrize("family", NATIVE)
def test_images_and_budgets(family: str) -> None:
    """Every image has its own tokens in order and ``round(ratio N)`` of them survive, side by side or apart."""
    sizes = tiny_models.family(family).N_TOKENS
    calls = recorded(family, "t5 i0 t9", "t4 i1 i0 t3 i1 t6", "t12", ratio=0.3)
    expected = [[0], [1, 0, 1]]
    assert len(calls) == 2
    for (signals, selection), kinds in zip(calls, expected, strict=True):
        wanted = [sizes[kind % len(sizes)] for kind in kinds]
        assert [image.n_prompt for image in signals.images] == wanted
        ids = torch.full((sum(wanted),), tiny_models.family(family).IMAGE)
        columns = image_columns(ids, [int(ids[0])], wanted)
        assert [image.tokens.tolist() for image in signals.images] == columns
        kept = set(selection.keep.tolist())
        assert [len(kept & set(c)) for c in columns] == [max(1, round(0.3 * n)) for n in wanted]


@pytest.mark.parametrize("family", ["internvl", "llava_next", "llava_onevision"])
def test_every_view_keeps_its_coordinates(family: str) -> None:
    """IVC-Prune keeps the best cos and sin tokens of each tile or overview, not of the image as a whole."""
    ((signals, selection),) = recorded(family, "t5 i0 t9", ivc=0.2, ivc_share=0.4)
    (image,) = signals.images
    assert len(image.span.views) > 1
    assert sum(image.span.views) == image.n_prompt
    cos, sin = (part.mean(dim=(0, 2))[signals.visual] for part in signals.rope())
    start = 0
    for number, n in enumerate(image.span.views):
        assert image.view is not None
        assert image.view[start : start + n].tolist() == [number] * n
        best = round(0.2 * n)
        for score in (cos, sin):
            top = score[start : start + n].sort(descending=True, stable=True).indices[:best] + start
            assert set(top.tolist()) <= set(selection.keep.tolist())
        start += n


def test_llava_next_views_add_up_to_the_processors_count() -> None:
    wired, rng = adapter("llava_next"), random.Random(0)
    config = LlavaNextConfig(image_grid_pinpoints=NEXT_PINPOINTS)
    counter: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=NEXT_PINPOINTS),
        patch_size=14,
        num_additional_image_tokens=1,
    )
    counter._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(counter)
    sizes = [[rng.randint(40, 1500), rng.randint(40, 1500)] for _ in range(60)]
    views = wired.views(config, {"image_sizes": torch.tensor(sizes)})  # type: ignore[attr-defined]
    for (height, width), view in zip(sizes, views, strict=True):
        count = LlavaNextProcessor._get_number_of_features(counter, height, width, 336, 336)
        assert sum(view) == count - 1, f"{height} x {width}"  # the processor counts the class token too
        assert view[0] == 576


def test_llava_onevision_views_add_up_to_the_processors_count() -> None:
    wired, rng = adapter("llava_onevision"), random.Random(1)
    config = LlavaOnevisionConfig()
    counter: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    counter._get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features.__get__(counter)
    sizes = [[rng.randint(40, 3000), rng.randint(40, 3000)] for _ in range(60)]
    inputs = {"image_sizes": torch.tensor(sizes), "batch_num_images": torch.tensor([1] * 58 + [2])}
    views = wired.views(config, inputs)  # type: ignore[attr-defined]
    for (height, width), view in list(zip(sizes, views, strict=True))[:58]:
        count = LlavaOnevisionProcessor._get_number_of_features(counter, height, width, 384, 384)
        assert sum(view) == count, f"{height} x {width}"
    assert views[58:] == [(729, 1), (729, 1)]  # several images in one sample: an overview and a newline each


def test_llava_onevision_several_images_as_the_processor_encodes_them() -> None:
    """One overview each (``batch_num_images``); the spans follow."""
    model, _ = tiny_models.build("llava_onevision")
    ids = torch.tensor([[20, *[503] * 10, *[503] * 10, 21, 22, 23]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 3, 42, 42, generator=torch.Generator().manual_seed(0)),
        "image_sizes": torch.tensor([[84, 84], [42, 84]]),
        "batch_num_images": torch.tensor([2]),
    }
    with torch.no_grad(), ivcp_eval.prune(model, "ivc_prune", 0.4) as run:
        model(**inputs)
    assert (run.visual_prompt, run.visual_kept) == ([20], [8])


def test_images_by_length_undoes_what_beam_search_repeats() -> None:
    def mask(*totals: int) -> torch.Tensor:
        return torch.stack([torch.arange(8) < total for total in totals])

    assert images_by_length(mask(3, 5, 0), [3, 2, 3]) == [[0], [1, 2], []]
    assert images_by_length(mask(3, 3, 5, 5), [3, 2, 3]) == [[0], [0], [1, 2], [1, 2]]  # images not repeated
    assert images_by_length(mask(3, 3, 5, 5), [3, 3, 2, 2, 3, 3]) == [[0], [0], [2, 4], [2, 4]]  # each in place
    assert images_by_length(mask(4), [3]) is None
    assert images_by_length(mask(3), [3, 2]) is None


def test_a_mask_of_ones_own_is_one_image_per_run() -> None:
    model, make_inputs = tiny_models.build("llava")
    inputs = make_inputs("t5 i0 t9")
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, 2:9] = True
    with torch.no_grad(), ivcp_eval.prune(model, "ivc_prune", 0.5, image_mask=mask) as run:
        model(**inputs)
    assert (run.visual_prompt, run.visual_kept) == ([7], [4])


def test_the_official_preset_refuses_what_the_released_code_has_not() -> None:
    model, _ = tiny_models.build("llava")
    with pytest.raises(ValueError, match="fixed numbers"), ivcp_eval.prune(model, "ivc_prune", 0.3, preset="official"):
        pass
    model, _ = tiny_models.build("qwen3_vl")
    with pytest.raises(ValueError, match="no released"), ivcp_eval.prune(model, "ivc_prune", 0.5, preset="official"):
        pass


def test_the_official_preset_of_internvl_asks_for_the_tiles() -> None:
    model, make_inputs = tiny_models.build("internvl")
    for tiles in (None, (3, 1)):
        with (
            pytest.raises(ValueError, match="Pass `tiles"),
            ivcp_eval.prune(model, "ivc_prune", 0.5, preset="official", tiles=tiles),
        ):
            model(**make_inputs("t5 i0 t9"))


def test_qwen3_vl_is_not_cut_before_its_visual_features_are_in() -> None:
    model, _ = tiny_models.build("qwen3_vl")
    assert adapter("qwen3_vl").facts(model.config, "qwen3_vl").first_cut == 2
    with pytest.raises(ValueError, match="layer 1"), ivcp_eval.prune(model, "ivc_prune", 0.5, layer=1):
        pass


def test_entries() -> None:
    known = checkpoints()
    qwen = {"qwen25", "qwen25_3b", "qwen25_32b", "qwen25_72b", "qwen2", "qwen3"}
    llava = {"llava15", "llava15_13b", "llava_next", "llava_ov"}
    internvl = {"internvl25", "internvl25_1b", "internvl25_78b", "internvl3", "internvl3_2b"}
    assert qwen | llava | internvl <= set(known)
    assert known["internvl25"][1].hub == "OpenGVLab/InternVL2_5-8B"
    hubs = [entry.hub for _, entry in known.values() if entry.hub]
    assert len(hubs) == len(set(hubs))
    assert all(hub.count("/") == 1 for hub in hubs)


def test_prompts_as_published() -> None:
    options = {"A": "cat", "B": "dog"}
    llava, internvl = adapter("llava"), adapter("internvl")
    letters = "H\nWhat?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert llava.prompt("mcq", "What?", options, "H") == internvl.prompt("mcq", "What?", options, "H") == letters
    assert llava.prompt("short_answer", "What?", {}) is None
    words = "Answer the question using a single word or phrase."
    assert internvl.prompt("short_answer", "What?", {}) == f"What?\n{words}"
    assert internvl.prompt("yes_no", "Is it?", {}) == f"Is it? Please answer yes or no. {words}"
    assert (
        internvl.prompt("yes_no", "Is it? Please answer yes or no.", {}) == f"Is it? Please answer yes or no. {words}"
    )
    assert (
        internvl.prompt("grounding", "the cat", {})
        == "Please provide the bounding box coordinate of the region this sentence describes: <ref>the cat</ref>"
    )
    assert "<|object_ref_start|>the cat<|object_ref_end|>" in str(
        adapter("qwen2_vl").prompt("grounding", "the cat", {})
    )


def test_llava_conversation_has_vicunas_system_sentence() -> None:
    seen: dict[str, Any] = {}

    def processor(**kwargs: Any) -> dict[str, Any]:
        seen.update(kwargs)
        return {}

    adapter("llava").encode(processor, [[{"image": "picture"}, {"text": "What?"}]])
    assert seen["text"] == [
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER:  <image> What? ASSISTANT: "
    ]
    assert (seen["images"], seen["padding_side"]) == (["picture"], "left")
