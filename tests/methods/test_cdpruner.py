"""Oracle: the authors' relevance with a small CLIP of its own, step by step, and the determinant taken literally."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

import ivcp_eval
from ivcp_eval.interface import Signals, Unsupported
from ivcp_eval.interface.registry import make_method, parameters_of
from ivcp_eval.methods.cdpruner import _clip
from tests.engine import tiny_models
from tests.engine.contract.cases import Case
from tests.methods.material import image_columns, random_signals

LENGTH, WORDS = 7, tiny_models.VOCABULARY  # of CLIP's text tower; of the language model's tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CLIP checkpoint with patches as wide as the tiny LLaVA's, and a tokenizer of the words w0, w1, ..."""
    clip, words = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("words")
    model: Any
    model, _ = tiny_models.build("llava")
    vision = model.config.vision_config.to_dict() | {"projection_dim": 16}
    letters = {letter: i for i, letter in enumerate("w0123456789")}
    letters |= {f"{letter}</w>": 11 + i for letter, i in letters.items()}
    letters |= {"<|startoftext|>": 22, "<|endoftext|>": 23}
    text = {
        **{"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "max_position_embeddings": LENGTH, "projection_dim": 16},
        **{"bos_token_id": 22, "eos_token_id": 23, "pad_token_id": 23},
    }
    made: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    tiny_models.initialise(made, 4)
    made.save_pretrained(clip)
    (clip / "vocab.json").write_text(json.dumps(letters))
    (clip / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(clip / "vocab.json"), str(clip / "merges.txt")).save_pretrained(clip)
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(words)
    return clip, words


def relevance(clip: Path, patches: Tensor, ids: list[int]) -> Tensor:
    """The authors', in double precision but for the towers."""
    seeing: Any = CLIPVisionModelWithProjection.from_pretrained(clip)
    reading: Any = CLIPTextModelWithProjection.from_pretrained(clip)
    tokens = [22]
    for word in ids:  # CLIP reads every digit as a word of its own
        tokens += [11, *(12 + int(digit) for digit in str(word))]
    tokens.append(23)
    cosines = []
    with torch.no_grad():
        image = seeing.visual_projection(getattr(seeing, "vision_model", seeing).post_layernorm(patches))
        for start in range(0, len(tokens), LENGTH):
            part = tokens[start : start + LENGTH]
            seen = [1] * len(part) + [0] * (LENGTH - len(part))
            part = part + [0] * (LENGTH - len(part))
            text = reading(input_ids=torch.tensor([part]), attention_mask=torch.tensor([seen])).text_embeds[0]
            cosines.append(torch.nn.functional.cosine_similarity(image.double(), text.double()[None], dim=1))
    minus = -torch.stack(cosines).mean(dim=0)
    return (minus - minus.min() + 1e-6) / (minus.max() - minus.min())


def greedy(states: Tensor, weight: Tensor, k: int) -> list[int]:
    unit = torch.nn.functional.normalize(states.double(), dim=1) * weight[:, None]
    kernel = unit @ unit.T
    chosen: list[int] = []
    while len(chosen) < k:
        gain = {
            i: float(torch.linalg.slogdet(kernel[[*chosen, i]][:, [*chosen, i]]).logabsdet)
            for i in range(len(states))
            if i not in chosen
        }
        chosen.append(max(gain, key=lambda i: (gain[i], -i)))
    return sorted(chosen)


@pytest.mark.parametrize("layout", ["t5 i0 t9", "t3 i0 t2 i0 t1"])
def test_relevance_is_clips(folders: tuple[Path, Path], layout: str) -> None:
    clip, words = folders
    case = Case("llava", "cdpruner", (("clip", str(clip)), ("tokenizer", str(words))), ratio=0.25)
    inputs = case.inputs(layout)
    with case.prune() as recording:
        case.forward(inputs)
    ((signals, selection),) = recording.calls
    columns = image_columns("llava", inputs)
    ids = inputs["input_ids"][0, columns[-1] + 1 :].tolist()
    model: Any = case.model
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    wanted = []
    for number, image in enumerate(signals.images):
        weight = relevance(clip, tower[number], ids)
        wanted += [int(image.tokens[i]) for i in greedy(states_of(signals, image.tokens), weight, image.budget)]
    assert selection.keep.tolist() == wanted
    with case.but(parameters=()).prune() as plain:
        case.forward(inputs)
    assert [row.tolist() for row in plain.run.kept] != [row.tolist() for row in recording.run.kept]


def states_of(signals: Signals, tokens: Tensor) -> Tensor:
    return signals.hidden[signals.visual[tokens]]


def test_both_folders_are_part_of_the_run(folders: tuple[Path, Path], tmp_path: Path) -> None:
    clip, words = folders
    method = make_method("cdpruner", {"clip": str(clip), "tokenizer": str(words)})
    noted = parameters_of(method)["clip"]
    assert noted.startswith(f"{clip.name} (fingerprint ")
    config = json.loads((clip / "config.json").read_text())
    try:
        (clip / "config.json").write_text(json.dumps(config | {"logit_scale_init_value": 1.0}))
        assert parameters_of(method)["clip"] != noted
    finally:
        (clip / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="clip and tokenizer belong together"):
        make_method("cdpruner", {"clip": str(clip)})
    with pytest.raises(ValueError, match=r"tokenizer=.*none is no folder"):
        make_method("cdpruner", {"clip": str(clip), "tokenizer": str(tmp_path / "none")})


def test_other_towers_are_refused(folders: tuple[Path, Path]) -> None:
    clip, words = folders
    parameters = {"clip": str(clip), "tokenizer": str(words)}
    model, _ = tiny_models.build("qwen2_5_vl")
    with (
        pytest.raises(Unsupported, match="its vision tower is no CLIP"),
        ivcp_eval.prune(model, "cdpruner", 0.5, **parameters),
    ):
        pass
    with pytest.raises(ValueError, match="of width 5; give the checkpoint that the tower was taken from"):
        _clip(clip, "cpu").of_patches(torch.zeros(3, 5))


@pytest.mark.parametrize("theta", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_without_clip_the_documented_rule_of_openvino(ratio: float, theta: float) -> None:
    """Every determinant is computed; one token after the other."""
    answers = []
    for seed in range(3):
        signals = random_signals((4, 6), (3, 5), ratio=ratio, seed=seed, question=7)
        states = torch.nn.functional.normalize(signals.hidden.double(), dim=1)
        question = torch.nn.functional.normalize(signals.hidden[signals.question].double().mean(dim=0), dim=0)
        wanted: list[int] = []
        for image in signals.images:
            unit = states[signals.visual[image.tokens]]
            cosine = unit @ question
            relevance = (cosine - cosine.min()) / (cosine.max() - cosine.min())
            weight = (theta / (2 * (1 - theta)) * relevance).exp()
            kernel = weight[:, None] * (unit @ unit.T) * weight
            chosen: list[int] = []
            while len(chosen) < image.budget:
                rest = [i for i in range(len(unit)) if i not in chosen]
                volume = {i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in rest}
                chosen.append(max(rest, key=lambda i: volume[i]))
            wanted += image.tokens[chosen].tolist()
        kept = make_method("cdpruner", {"theta": theta}).select(signals).keep.tolist()
        assert kept == sorted(wanted)
        answers.append(kept != make_method("cdpruner", {"theta": 0.45}).select(signals).keep.tolist())
    assert any(answers), "another weight chooses other tokens"
