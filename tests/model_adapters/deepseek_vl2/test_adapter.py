"""DeepSeek-VL2 through its adapter: loading, encoding, generating, and what pruning is told about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import ivcp_eval
from ivcp_eval.interface import AbstractMethod, Cut, ModelFacts, Selection, Signals, Unsupported
from ivcp_eval.interface.registry import adapter, family_of
from model_adapters.deepseek_vl2.configuration import DeepseekVL2Config
from model_adapters.deepseek_vl2.layout import n_tokens, padding_cells
from model_adapters.deepseek_vl2.modeling import DeepseekVL2ForConditionalGeneration
from tests.engine import tiny_models
from tests.engine.contract import reference as contract
from tests.model_adapters.deepseek_vl2 import checkpoint as published
from tests.model_adapters.deepseek_vl2 import reference
from tests.model_adapters.deepseek_vl2 import tokenizer as deepseek_vl2_tokenizer

WIRED = adapter("deepseek_vl2")


def write(folder: Path, variant: str, weights: dict[str, torch.Tensor] | None = None) -> str:
    """A whole checkpoint folder; config.json names no image token, as published."""
    published.write(folder, variant, published.tensors(variant) if weights is None else weights)
    config = published.config(variant)
    del config["image_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    deepseek_vl2_tokenizer.write(folder, published.RESOLUTIONS)
    return str(folder)


def load(source: str, attention: str = "sdpa", **options: Any) -> tuple[Any, Any]:
    return WIRED.load(source, revision=None, dtype=torch.float32, device="cpu", attention=attention, **options)


@pytest.fixture(scope="module", params=published.VARIANTS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return request.param, *load(write(tmp_path_factory.mktemp("checkpoint"), request.param))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ASKED = [
    [{"image": picture(130, 60)}, {"text": "What colour is the car?"}],
    [{"text": "Describe the dog."}],
    [{"text": "Is "}, {"image": picture(60, 130, 1)}, {"image": picture(50, 50, 2)}, {"text": "the same?"}],
]


# -- loading and generating -------------------------------------------------------------------------------------


def test_batch_generates_what_each_row_generates_alone(loaded: Any) -> None:
    _, model, processor = loaded
    inputs = WIRED.encode(processor, ASKED)
    batch = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, parts in enumerate(ASKED):
        alone = WIRED.encode(processor, [parts])
        single = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert batch[row, : len(single)].tolist() == single.tolist()
    assert len(processor.batch_decode(batch, skip_special_tokens=True)) == 3


def test_encoded_picture_gives_the_logits_of_the_literal_reimplementation(loaded: Any) -> None:
    variant, model, processor = loaded
    weights, inputs = published.tensors(variant), WIRED.encode(processor, ASKED[:1])
    with torch.no_grad():
        got = model(**inputs).logits[0]
    ids = inputs["input_ids"][0]
    embeds = weights["language.model.embed_tokens.weight"][ids].clone()
    image = reference.image_tokens(weights, inputs["pixel_values"][0], (2, 1), published.HEADS, True)
    embeds[ids == processor.image_token_id] = image
    expected = reference.language(weights, published.config(variant)["language_config"], embeds)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_generation_knows_its_end_and_padding(loaded: Any) -> None:
    _, model, processor = loaded
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, 1, 2)
    assert model.config.image_token_id == processor.image_token_id == 500


def test_cached_decoding_equals_full_forwards(loaded: Any) -> None:
    _, model, processor = loaded
    inputs = WIRED.encode(processor, ASKED)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**inputs, **options, suppress_tokens=[500])
    whole = model.generate(**inputs, **options, suppress_tokens=[500], use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-4, rtol=1e-4)


def test_embeddings_instead_of_ids(loaded: Any) -> None:
    _, model, processor = loaded
    inputs = dict(WIRED.encode(processor, ASKED))
    with torch.no_grad():
        expected = model(**inputs).logits
        ids = inputs.pop("input_ids")
        got = model(**inputs, inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="exactly one"):
        model(**inputs)


def test_placeholders_and_images_must_match(loaded: Any) -> None:
    _, model, processor = loaded
    inputs = dict(WIRED.encode(processor, ASKED[:1]))
    inputs["images_spatial_crop"] = torch.tensor([[[1, 1]]])
    with pytest.raises(ValueError, match=r"\[34\] image placeholders, their images make \[25\] tokens"):
        model(**inputs)
    inputs["images_spatial_crop"] = torch.tensor([[[2, 2]]])
    with pytest.raises(ValueError, match="5"):
        model(**inputs)


@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    weights = published.tensors("small")
    if change == "missing":
        del weights["vision.blocks.1.attn.qkv.bias"]
    elif change == "left over":
        weights["language.model.layers.1.self_attn.q_norm.weight"] = torch.ones(8)
    else:
        weights["projector.layers.0.weight"] = torch.ones(published.HIDDEN, 8)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"not a checkpoint|mismatch|does not hold the whole checkpoint"
    ):
        load(write(tmp_path, "small", weights))


def test_pixel_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="candidate_resolutions"):
        load(write(tmp_path, "small"), max_pixels=1000)


def test_processor_and_model_must_agree_on_views(tmp_path: Path) -> None:
    source = write(tmp_path, "small")
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["candidate_resolutions"] = [[84, 84]]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="84"):
        load(source)


# -- what pruning is told ---------------------------------------------------------------------------------------


def test_families_are_found_by_model_type() -> None:
    assert family_of("deepseek_vl_v2") == family_of("deepseek_v2") == "deepseek_vl2"


@pytest.mark.parametrize("head", [True, False])
def test_spans_are_images_not_runs(head: bool) -> None:
    model, make_inputs = tiny_models.build("deepseek_vl2")
    inputs = make_inputs("t3 i1 i0 t4", "t5", "t2 i2 t2")
    mask = WIRED.image_mask(model, inputs)
    model.config.global_view_pos = "head" if head else "tail"
    try:
        spans = WIRED.image_spans(model, mask, inputs)
    finally:
        model.config.global_view_pos = "head"
    assert [[span.tiles for span in row] for row in spans] == [[(2, 1), (1, 2)], [], [(1, 1)]]
    start = int(mask[0].nonzero()[0])
    assert spans[0][0].columns.tolist() == list(range(start, start + 17))
    assert spans[0][1].columns.tolist() == list(range(start + 17, start + 36))
    assert [span.views for span in spans[0]] == ([(7, 10), (7, 12)] if head else [(11, 6), (13, 6)])
    shift = 0 if head else 11
    assert spans[0][0].padding == tuple(i + shift for i in padding_cells((60, 40), 2, 42, 28))


def test_language_model_alone_has_runs_and_no_mask_of_its_own() -> None:
    model, _ = tiny_models.build("deepseek_vl2")

    class Alone:
        model: ClassVar[Any] = tiny_models.build("deepseek_vl2")[0].model.language_model

    assert WIRED.text_model(Alone) is Alone.model
    assert WIRED.image_mask(Alone, {"input_ids": torch.tensor([[503]])}) is None
    mask = torch.tensor([[False, True, True, False, True]])
    assert [s.columns.tolist() for s in WIRED.image_spans(Alone, mask, {})[0]] == [[1, 2], [4]]
    assert WIRED.text_model(model) is Alone.model


@dataclass(frozen=True)
class Watching(AbstractMethod):
    """Keeps every second token of each image, and the signals."""

    needs: ClassVar[frozenset[Any]] = frozenset({"value", "key", "query"})
    seen: list[Signals] = field(default_factory=list)
    calls: list[tuple[int, Selection]] = field(default_factory=list)

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(2, ratio),)

    def select(self, signals: Signals) -> Selection:
        chosen = Selection(torch.cat([image.tokens[::2] for image in signals.images]), exact=False)
        self.seen.append(signals)
        self.calls.append((signals.stage, chosen))
        return chosen


def test_captured_attention_is_that_of_the_model(loaded: Any, tmp_path: Path) -> None:
    """Keys, queries, values and RoPE of latent and of multi-head attention, with and without halves sorted."""
    variant, _, processor = loaded
    model, _ = load(write(tmp_path, variant), attention="eager")
    inputs = WIRED.encode(processor, ASKED[:1])
    method = Watching()
    with torch.no_grad(), ivcp_eval.prune(model, method, 0.5):
        model(**inputs)
    got = method.seen[0]
    n = inputs["input_ids"].shape[1]
    with torch.no_grad():
        layers = model(**inputs, output_attentions=True).attentions
    for entering, layer in ((False, 1), (True, 2)):
        rows = torch.tensor([3, n // 2, n - 1])
        with torch.no_grad():
            attended = got.attention(rows, entering=entering)
        torch.testing.assert_close(attended, layers[layer][0, :, rows], atol=1e-5, rtol=1e-4)
    mixed = layers[1][0] @ got.value
    output = []
    handle = model.model.language_model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _module, args: output.append(args[0][0])
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    torch.testing.assert_close(mixed.transpose(0, 1).flatten(1), output[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pruned_generation_equals_the_masked_reference(loaded: Any, tmp_path: Path, attention: str) -> None:
    variant, _, processor = loaded
    model, _ = load(write(tmp_path, variant), attention=attention)
    inputs, method = WIRED.encode(processor, ASKED), Watching()
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [processor.image_token_id, 1],
    }
    with ivcp_eval.prune(model, method, 0.5) as run:
        got = model.generate(**inputs, **options)
    cuts = method.cuts(WIRED.facts(model.config, "deepseek_vl2"), 0.5)
    plan = contract.make_plan(inputs, {processor.image_token_id}, cuts, method.calls)
    with contract.reference(WIRED.text_model(model), plan):
        wanted = model.generate(**inputs, **options, use_cache=False)
    assert run.visual_kept == [sum(-(-n_tokens(3, t) // 2) for t in row) for row in ([(2, 1)], [], [(1, 2), (1, 1)])]
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits), atol=2e-4, rtol=1e-4)


def test_vision_signals_are_those_of_the_cells(loaded: Any) -> None:
    _, model, processor = loaded
    tap, crops = WIRED.vision_tap(model), [(2, 1)]
    patches = torch.arange(3 * 25.0)[:, None]
    got = tap.tokens({"key": patches}, (None, torch.tensor([crops])), {})["key"][:, 0]
    assert got.shape == (n_tokens(3, (2, 1)),)
    grid = torch.arange(25.0).view(5, 5)
    assert got[0] == grid[:2, :2].mean()
    assert got[2] == grid[:2, 4].mean()  # the last column of cells has one patch
    assert got[3] == got[:3].mean()  # newline
    with torch.no_grad():
        heard = []
        handle = tap.tower.register_forward_hook(lambda _module, args, _output: heard.append(args))
        model(**WIRED.encode(processor, ASKED[:1]))
        handle.remove()
    assert heard[0][1].tolist() == [[[2, 1]]]


def test_signals_that_latent_attention_has_not_are_refused_with_a_reason(loaded: Any) -> None:
    variant, model, _ = loaded
    latent = variant != "tiny"
    for signal in ("cached_key", "raw_value"):
        assert (WIRED.unsupported(model, signal) is not None) == latent
    assert WIRED.unsupported(model, "vision") is None

    class NeedsKeys(Watching):
        needs: ClassVar[frozenset[Any]] = frozenset({"raw_value"})

    if latent:
        with pytest.raises(Unsupported, match="latent"), ivcp_eval.prune(model, NeedsKeys(), 0.5):
            pass


def test_official_preset_asks_the_whole_model_for_tiles_and_padding() -> None:
    """Published view size: what the adapter finds is what a user gives the language model alone by hand."""
    language = published.config("small")["language_config"] | {"num_hidden_layers": 2}
    config = DeepseekVL2Config(
        language_config=language,
        vision_config={"layers": 1, "width": 16, "heads": 2, "mlp_ratio": 2, "patch_size": 14, "image_size": 384},
        projector_config={"input_dim": 16, "n_embed": published.HIDDEN},
        image_token_id=published.IMAGE,
    )
    model = DeepseekVL2ForConditionalGeneration(config).eval()
    tiny_models.initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 400, (12,), generator=generator).tolist()
    ids = torch.tensor([[*text[:4], *[published.IMAGE] * 421, *text[4:]]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 2, 3, 384, 384, generator=generator),
        "images_spatial_crop": torch.tensor([[[1, 1]]]),
        "image_sizes": torch.tensor([[[640, 400]]]),
    }
    options = {"preset": "official", "layer": 1}
    with torch.no_grad(), ivcp_eval.prune(model, "ivc_prune", 0.5, **options) as whole:
        model(**inputs)
    padding = padding_cells((640, 400), 14, 384, 28)
    assert len(padding) == 14 * 4
    with torch.no_grad():
        embeds = model.model._with_images(
            ids, model.get_input_embeddings()(ids), inputs["pixel_values"], inputs["images_spatial_crop"]
        )
        by_hand = {"image_mask": ids == published.IMAGE, "tiles": (1, 1), "padding": padding}
        with ivcp_eval.prune(model, "ivc_prune", 0.5, **by_hand, **options) as alone:
            model(inputs_embeds=embeds)
        with ivcp_eval.prune(model, "ivc_prune", 0.5, **(by_hand | {"padding": ()}), **options) as unpadded:
            model(inputs_embeds=embeds)
    assert whole.kept[0].tolist() == alone.kept[0].tolist()
    assert whole.kept[0].tolist() != unpadded.kept[0].tolist()
