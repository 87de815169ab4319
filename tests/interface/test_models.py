"""Short names, and what is said where weights are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval import files
from ivcp_eval.interface import models


def test_names_are_unique_and_have_a_source() -> None:
    found = models.checkpoints()
    assert {"tiny", "qwen25", "qwen25_3b", "llava15", "internvl25"} <= set(found)
    for name, (_, checkpoint) in found.items():
        assert bool(checkpoint.hub) + bool(checkpoint.local) + ("`ivcp lab train" in checkpoint.note) == 1, name


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'internvl25'"):
        models.find("internvl2.5")


@pytest.mark.parametrize(
    ("name", "made_by"),
    [("uhd_v4", "uhd_v4"), ("points_long", "points_long"), ("points_long_standby", "points_long")],
)
def test_what_is_trained_by_its_user_is_told_to_be(name: str, made_by: str) -> None:
    with pytest.raises(models.MissingWeights, match=rf"'{name}' is at no known place: .*`ivcp lab train {made_by}`"):
        models.locate(name)


def test_missing_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(models.MissingWeights) as error:
        models.locate("qwen25", offline=True)
    message = str(error.value)
    assert "Qwen/Qwen2.5-VL-7B-Instruct" in message
    assert "hf download" in message
    assert "MODEL_PATH" in message
    assert "models: {qwen25: /path/to/folder}" in message
    assert "not on this machine; a run would download them" in message, "nothing was tried"


@pytest.mark.parametrize("content", [[], ["config.json"]])
def test_a_folder_without_weights_is_refused(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).write_text("{}")
    with pytest.raises(models.MissingWeights, match="safetensors"):
        models.locate("qwen25", tmp_path)


def test_fingerprint_follows_content_not_time(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    weights.write_bytes(b"a" * 3_000_000)
    first = files.fingerprint(tmp_path)
    weights.write_bytes(b"a" * 3_000_000)
    assert files.fingerprint(tmp_path) == first
    weights.write_bytes(b"a" * 2_999_999 + b"b")
    assert files.fingerprint(tmp_path) != first
    weights.write_bytes(b"a" * 3_000_000)
    (tmp_path / "config.json").write_text('{"x": 1}')
    assert files.fingerprint(tmp_path) != first
    with_config = files.fingerprint(tmp_path)
    (tmp_path / "modeling_own.py").write_text("code that --trust-remote-code runs")
    assert files.fingerprint(tmp_path) != with_config


def _safetensors(path: Path, data: bytes) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_fine_tunes_that_differ_in_the_middle_have_two_fingerprints(tmp_path: Path) -> None:
    found = set()
    for name, middle in (("one", b"a"), ("two", b"b")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        _safetensors(folder / "model.safetensors", b"a" * 2_000_000 + middle + b"a" * 2_000_000)
        found.add(files.fingerprint(folder))
    assert len(found) == 2


@pytest.mark.parametrize("cut", [1, 500, 996])
def test_weights_cut_short_are_said_with_their_name(tmp_path: Path, cut: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    _safetensors(file, b"a" * 900)
    file.write_bytes(file.read_bytes()[:-cut] if cut < 996 else b"abc")
    with pytest.raises(models.MissingWeights, match=r"model\.safetensors .*download it again") as error:
        models.locate("qwen25", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b'{"model_type": "qwen', b"", b"\xff\xfe{}", b"[" * 100_000])
def test_a_configuration_cut_short_is_said_with_its_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    _safetensors(tmp_path / "model.safetensors", b"a")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(models.MissingWeights, match=f"{name} is damaged .*download it again") as error:
        models.locate("qwen25", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", [b"[]", b'{"a": {"data_offsets": ["x", "y"]}}', b'{"a": 7}', b"[" * 100_000])
def test_a_header_of_another_shape_is_said(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"data")
    with pytest.raises(models.MissingWeights, match=r"model\.safetensors is no safetensors file, or damaged"):
        models.locate("qwen25", tmp_path)


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    _safetensors(tmp_path / "model-1.safetensors", b"a")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(models.MissingWeights, match=r"lacks model-2\.safetensors of 2 parts"):
        models.locate("qwen25", tmp_path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "U8", "shape": [3], "data_offsets": [0, 4]}, "has 4 bytes"),
        ({"dtype": "X", "shape": [4], "data_offsets": [0, 4]}, "of type 'X'"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}, "lies at -4 to 0"),
        ({"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}, "lies at 1 to 4"),
    ],
)
def test_a_header_that_contradicts_itself_is_said_with_its_file(tmp_path: Path, entry: Any, said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(models.MissingWeights, match=f"{file}.*{said}"):
        models.locate("qwen25", tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "1"])
def test_a_configuration_that_is_no_object_is_said_with_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    _safetensors(tmp_path / "model.safetensors", b"a")
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(models.MissingWeights, match=r"generation_config\.json is damaged \(it holds no object\)"):
        models.locate("qwen25", tmp_path)
