"""Short names, and what is said where weights are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivcp_eval.interface import models


def test_names_are_unique_and_have_a_source() -> None:
    found = models.checkpoints()
    assert {"tiny", "qwen25", "qwen25_3b", "llava15", "internvl25"} <= set(found)
    for name, (_, checkpoint) in found.items():
        assert bool(checkpoint.hub) != bool(checkpoint.local), name


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'internvl25'"):
        models.find("internvl2.5")


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
    first = models.fingerprint(tmp_path)
    weights.write_bytes(b"a" * 3_000_000)
    assert models.fingerprint(tmp_path) == first
    weights.write_bytes(b"a" * 2_999_999 + b"b")
    assert models.fingerprint(tmp_path) != first
    weights.write_bytes(b"a" * 3_000_000)
    (tmp_path / "config.json").write_text('{"x": 1}')
    assert models.fingerprint(tmp_path) != first
