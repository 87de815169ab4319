"""A fork gives every variant the tokens and the facts of its own single run, beside any others and at any memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers.integrations import sdpa_attention

from ivcp_eval.engine import fork as module
from ivcp_eval.engine import prune
from ivcp_eval.engine.fork import Answer, fork
from ivcp_eval.engine.fork.trunk import Branch, Trunk
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.variants import Variant
from tests.engine import tiny_models
from tests.engine.contract.pretended import limited_memory

RATIOS = (1.0, 0.9, 0.75, 0.5, 0.35, 0.25, 0.1)
IVC = tuple(Variant("", "ivc_prune", ratio, {"layer": 3}) for ratio in RATIOS)
# No cut; cuts at the input, early, in the middle; several; an observation before the first cut; renumbered positions;
# edits of the cache, evictions from it and sparse layers, which share nothing; two that differ only in their seed.
MIX = (
    Variant(""),
    Variant("", "random", 0.5),
    Variant("", "random", 0.5, seed=1),
    Variant("", "fastv", 0.5),
    Variant("", "pyramiddrop", 0.3),
    Variant("", "pyramiddrop", 0.3, {"renumber": True}),
    Variant("", "sparsevlm", 0.4),
    Variant("", "visionzip", 0.4),
    Variant("", "rotatek", 0.5),
    Variant("", "snapkv", 0.4),
    Variant("", "fastocr", 0.2),
    Variant("", "adaspark", 0.5, {"cube": (1, 2, 2)}),
    Variant("", "fastv+dstp", 0.4),
    Variant("", "ivc_prune", 0.3, {"layer": 3}),
    Variant("", "ivc_prune", 1.0, {"layer": 3}),
)
PROMPTS = {
    "one image": ("t5 i0 t9",),
    "two images": ("t4 i1 t3 i2 t6",),
    "text only": ("t12",),
    "three samples": ("t5 i0 t9", "t4 i1 t3 i2 t6", "t12"),
}
FACTS = ("method", "ratio", "visual_prompt", "visual_kept", "visual_per_layer", "visual_cached")


def layout(family: str) -> dict[str, Any]:
    return getattr(tiny_models.family(family), "PRUNE", {})


def supported(family: str, variants: tuple[Variant, ...]) -> list[Variant]:
    model, _ = tiny_models.build(family)
    found = []
    for variant in variants:
        try:
            with prune(model, variant.method, variant.ratio, **variant.parameters):
                found.append(variant)
        except Unsupported:
            continue
    return found


def alone(model: Any, variant: Variant, inputs: dict[str, Any], extra: dict[str, Any], **options: Any) -> Answer:
    """The reference: a plain `prune` block, rows cut after their first end token."""
    with prune(model, variant.method, variant.ratio, seed=variant.seed, **variant.parameters, **extra) as run:
        out = model.generate(**inputs, do_sample=False, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    end = options.get("eos_token_id")
    rows = [row[: row.index(end) + 1] if end in row else row for row in out]
    return Answer(tuple(torch.tensor(row) for row in rows), run)


def tokens(answer: Answer) -> list[list[int]]:
    return [row.tolist() for row in answer.tokens]


def same(forked: list[Answer], wanted: list[Answer]) -> None:
    for got, reference in zip(forked, wanted, strict=True):
        assert tokens(got) == tokens(reference), got.run.method
        assert [row.tolist() for row in got.run.kept] == [row.tolist() for row in reference.run.kept]
        for fact in FACTS:
            assert getattr(got.run, fact) == getattr(reference.run, fact), fact


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", tiny_models.names())
def test_every_row_is_its_single_run(family: str, prompt: str) -> None:
    model, make_inputs = tiny_models.build(family)
    inputs, extra = make_inputs(*PROMPTS[prompt]), layout(family)
    for variants in (supported(family, IVC), supported(family, MIX)):
        assert len(variants) >= 7
        wanted = [alone(model, variant, inputs, extra, max_new_tokens=6) for variant in variants]
        same(fork(model, variants, inputs, layout=extra, max_new_tokens=6), wanted)


TOWER = tuple(
    Variant("", name, 0.5) for name in ("visionzip", "hiprune", "prumerge", "vscan", "aot", "vispruner", "fastv")
)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_variants_that_listen_to_different_blocks_share_a_tower(family: str) -> None:
    """Under the same names: each still sees the block that it asked for."""
    model, make_inputs = tiny_models.build(family)
    variants, inputs = supported(family, TOWER), make_inputs("t5 i0 t9", "t4 i1 t3 i2 t6")
    for got, variant in zip(fork(model, variants, inputs, max_new_tokens=3), variants, strict=True):
        wanted = alone(model, variant, inputs, {}, max_new_tokens=3)
        assert tokens(got) == tokens(wanted), variant.method
        assert [kept.tolist() for kept in got.run.kept] == [kept.tolist() for kept in wanted.run.kept], variant.method


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ends_of_sequence_and_logits_processors(attention: str) -> None:
    """Rows stop at different times and are penalised for their own tokens only."""
    model, make_inputs = tiny_models.build("qwen2_5_vl", attn=attention)
    inputs = make_inputs("t5 i0 t9")
    free = fork(model, MIX, inputs, max_new_tokens=12, repetition_penalty=1.3)
    end = next(t for t in tokens(free[1])[0] if t != tokens(free[4])[0][0])  # early for one, elsewhere for others
    options = {"max_new_tokens": 12, "repetition_penalty": 1.3, "eos_token_id": end, "pad_token_id": 0}
    answers = fork(model, MIX, inputs, **options)
    same(answers, [alone(model, variant, inputs, {}, **options) for variant in MIX])
    assert len({len(tokens(answer)[0]) for answer in answers}) > 1, "all rows stopped together: the test proves nothing"
    plain = fork(model, MIX, inputs, max_new_tokens=12)
    assert [tokens(a) for a in plain] != [tokens(a) for a in free], "the penalty changed nothing"


def test_without_the_baseline_the_trunk_ends_at_the_last_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs, variants = make_inputs("t5 i0 t9"), list(IVC[1:])
    wanted = [alone(model, variant, inputs, {}, max_new_tokens=4) for variant in variants]
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(tiny_models.text_model("qwen2_5_vl", model).layers)
    ]
    prefill = Trunk.prefill
    monkeypatch.setattr(Trunk, "prefill", lambda self, inputs: (prefill(self, inputs), ran.append(-1)))
    try:
        same(fork(model, variants, inputs, max_new_tokens=4), wanted)
    finally:
        for handle in handles:
            handle.remove()
    assert ran[: ran.index(-1)] == [0, 1, 2]


def test_the_trunk_and_the_vision_tower_run_once() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    calls = {"vision": 0, "lower": 0}
    text = tiny_models.text_model("qwen2_5_vl", model)
    handles = [
        model.model.visual.register_forward_hook(lambda *_: calls.__setitem__("vision", calls["vision"] + 1)),
        text.layers[2].mlp.register_forward_hook(
            lambda _m, args, _o: calls.__setitem__("lower", calls["lower"] + (args[0].shape[1] > 1))
        ),
    ]
    try:
        fork(model, IVC, make_inputs("t5 i0 t9"), max_new_tokens=3)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == {"vision": 1, "lower": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_and_exact_is_exact(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.half("qwen2_5_vl", dtype=dtype)
    _, make_inputs = tiny_models.build("qwen2_5_vl")
    agree = total = 0
    for seed in range(4):
        inputs = make_inputs("t5 i0 t9", seed=seed)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        wanted = [alone(model, variant, inputs, {}, max_new_tokens=6) for variant in IVC]
        same(fork(model, IVC, inputs, exact=True, max_new_tokens=6), wanted)
        for got, reference in zip(fork(model, IVC, inputs, max_new_tokens=6), wanted, strict=True):
            assert tokens(got)[0][0] == tokens(reference)[0][0], "the first token comes from unbatched numbers"
            agree += tokens(got) == tokens(reference)
            total += 1
    with capsys.disabled():
        print(f"\n{dtype}: {agree} of {total} forked answers equal their single runs token for token")  # noqa: T201
    assert agree / total > 0.7


def test_out_of_memory_halves_the_group_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = make_inputs("t5 i0 t9")
    wanted = fork(model, IVC, inputs, max_new_tokens=4)
    with limited_memory(monkeypatch, 2) as tried:
        same(fork(model, IVC, inputs, max_new_tokens=4), wanted)
    assert tried == [7, 3, 1, 2, 4, 2, 2]
    learnt: list[int] = []
    with limited_memory(monkeypatch, 2):
        same(fork(model, IVC, inputs, max_new_tokens=4, too_many=learnt.append), wanted)
    with limited_memory(monkeypatch, 2) as tried:
        same(fork(model, IVC, inputs, max_new_tokens=4, at_once=min(learnt)), wanted)
    assert max(tried) == min(learnt) == 2, "what is remembered runs out of memory no more"
    with limited_memory(monkeypatch, 0) as tried:
        same(fork(model, IVC, inputs, max_new_tokens=4, at_once=0), wanted)
    assert not tried
    with limited_memory(monkeypatch, 0):  # not even one fits beside the trunk: they run alone
        same(fork(model, IVC, inputs, max_new_tokens=4), wanted)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Branch, "prefill", fail)
        same(fork(model, IVC, inputs, max_new_tokens=4), wanted)
        patch.setattr(Trunk, "prefill", fail)
        same(fork(model, IVC, inputs, max_new_tokens=4), wanted)
        patch.setattr(module, "prune", fail)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            fork(model, IVC, inputs, max_new_tokens=4)


def test_groups_follow_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = make_inputs("t5 i0 t9")
    wanted = fork(model, IVC, inputs, max_new_tokens=4)
    # 6 layers, keys and values, 2 heads of 16 float32: what one variant adds, twice, and four new tokens.
    length = inputs["input_ids"].shape[1]
    per_variant = 6 * 2 * 2 * 16 * 4 * (2 * length + 4)
    monkeypatch.setattr(module, "free_memory", lambda _model: int(3.5 * per_variant / module.SHARE))
    with limited_memory(monkeypatch, 7) as tried:
        same(fork(model, IVC, inputs, max_new_tokens=4), wanted)
    assert tried == [3, 3, 1]
    monkeypatch.setattr(module, "free_memory", lambda _model: 0)
    with limited_memory(monkeypatch, 7) as tried:
        same(fork(model, IVC, inputs, max_new_tokens=4), wanted)
    assert tried == [1] * 7
    with limited_memory(monkeypatch, 7) as tried:
        fork(model, IVC, inputs, max_new_tokens=4, at_once=5)
    assert tried == [4, 3]


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"do_sample": True}, {"stop_strings": ["x"]}, {"use_cache": False}]
)
def test_what_a_batch_of_variants_cannot_honour_is_refused(options: dict[str, Any]) -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with pytest.raises(ValueError, match=next(iter(options))):
        fork(model, IVC, make_inputs("t5 i0 t9"), max_new_tokens=2, **options)


def test_changed_pictures_are_refused_and_nothing_is_left_behind() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with pytest.raises(ValueError, match="changes the picture"):
        fork(model, [*IVC, Variant("", "downsample", 0.5)], make_inputs("t5 i0 t9"), max_new_tokens=2)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    fork(model, IVC, make_inputs("t5 i0 t9"), max_new_tokens=2)
    assert [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == hooks


def test_bench_counts_and_agrees(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The smallest bench runs, its variants agree token for token, and sharing never costs more operations."""
    from ivcp_eval.lab.bench import fork as bench_fork

    assert bench_fork.main(["--size", "tiny", "--rounds", "1", "--out", str(tmp_path / "new" / "fork")]) == 0
    written = json.loads((tmp_path / "new" / "fork.json").read_text())
    assert [row["equal"] for row in written["rows"]] == [row["variants"] for row in written["rows"]]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all("7 of 7" in line for line in lines if "seven" in line)
    case = bench_fork.Case("", *_bench_model(), bench_fork.seven(2), 4, None)
    one_by_one, together = bench_fork.flops(case)
    assert 1 < one_by_one / together < 7
    assert bench_fork.measure(case, rounds=3, seconds=0)[0].n == 1, "its time was up after one round"


def _bench_model() -> tuple[Any, Any]:
    from ivcp_eval.lab.bench.models import build_model, configuration, make_inputs, size

    shape = size("tiny")
    model = build_model(configuration(shape), "cpu", torch.float32, "sdpa")
    return model, make_inputs(model.config, 64, 1, 12, torch.float32, "cpu")


def test_ragged_rows_decode_on_the_cached_heads() -> None:
    """Padding needs a mask; the cached keys are not copied for every query head on its account.

    Releases before 5.23 copy masked keys, those of every model and batch with padding: docs/gpu.md says so.
    """
    model: Any = tiny_models.build("qwen2_5_vl")[0]
    text = model.config.get_text_config()
    calls: list[tuple[int, bool]] = []

    class Attention(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if func is torch.nn.functional.scaled_dot_product_attention and args[0].shape[0] == len(IVC):
                key = args[1]
                calls.append((key.shape[1], given.get("attn_mask") is not None))
            return func(*args, **given)

    with Attention():
        fork(model, IVC, tiny_models.make_inputs("qwen2_5_vl", "t5 i0 t9"), max_new_tokens=3)
    assert text.num_key_value_heads < text.num_attention_heads
    packs = hasattr(sdpa_attention, "pack_gqa")
    expected = text.num_key_value_heads if packs else text.num_attention_heads
    assert {heads for heads, masked in calls if masked} == {expected}, "no masked step, or copies"
    assert {heads for heads, masked in calls if not masked} <= {text.num_key_value_heads}
