"""Pictures of every mode Pillow reads look as they are; one that no processor takes is one miss, once."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ivcp_eval.benchmarks.pictures import decoded, rgb
from ivcp_eval.cli import main
from ivcp_eval.reports.table import read_results, read_samples
from tests.vlmeval_bridge.conftest import Laboratory, RecordingSession
from tests.vlmeval_bridge.files import MCQ, Files, files

__all__ = ["files"]
RAMP = np.linspace(0, 255, 24 * 16).round().reshape(16, 24)  # grey values, black to white
COLOURS = Image.fromarray(np.random.default_rng(0).integers(40, 215, (4, 6, 3), np.uint8)).resize((24, 16))


def cielab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(COLOURS, *profiles, outputMode="LAB")  # type: ignore[return-value]


GREYS = {
    "16-bit PNG": (Image.fromarray((RAMP * 257).astype(np.uint16)), "PNG"),
    "16-bit TIFF": (Image.fromarray((RAMP * 257).astype(np.uint16)), "TIFF"),
    "32-bit TIFF": (Image.fromarray((RAMP * 257).astype(np.int32)), "TIFF"),
    "bytes in 32 bits": (Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "large whole numbers": (Image.fromarray((RAMP * 1_000_000).astype(np.int32)), "TIFF"),
    "floats to 1": (Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    "floats to a little over 1": (Image.fromarray((RAMP / 254.9).astype(np.float32)), "TIFF"),
    "floats to 255": (Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "floats to 65535": (Image.fromarray((RAMP * 257).astype(np.float32)), "TIFF"),
}
COLOURED = {
    "CMYK JPEG": (COLOURS.convert("CMYK"), "JPEG"),
    "CMYK TIFF": (COLOURS.convert("CMYK"), "TIFF"),
    "YCbCr TIFF": (COLOURS.convert("YCbCr"), "TIFF"),
    "LAB TIFF": (cielab(), "TIFF"),
}


def stored(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 100} if kind == "JPEG" else {}))
    return buffer.getvalue()


def expected(name: str) -> np.ndarray:
    return np.repeat(RAMP[..., None], 3, axis=2) if name in GREYS else np.asarray(COLOURS, dtype=float)


@pytest.mark.parametrize("name", [*GREYS, *COLOURED])
def test_every_mode_is_seen_as_it_is(name: str):
    got = np.asarray(decoded(io.BytesIO(stored(*(GREYS | COLOURED)[name]))), dtype=float)
    assert np.abs(got - expected(name)).max() <= (12 if "JPEG" in name or "LAB" in name else 4)


@pytest.mark.parametrize("name", [*GREYS, *COLOURED])
@pytest.mark.parametrize("path", ["", "a/picture.jpg", "['a.png', 'b.jpg']"])
def test_every_mode_reaches_the_model_from_a_tsv(laboratory: Laboratory, files: Files, name: str, path: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    text = base64.b64encode(stored(*(GREYS | COLOURED)[name])).decode()
    row = {
        "index": 1,
        "image": str([text, text]) if path.startswith("[") else text,
        "question": "Q",
        "A": "x",
        "B": "y",
    }
    row |= {"answer": "A"} | ({"image_path": path} if path else {})
    for benchmark in (files.put("own", [row], MCQ), files.put("MMStar", [row])):
        (asked,) = bridge.messages(bridge.build(benchmark, None), laboratory.model(RecordingSession()).prompting)
        assert asked.message, asked.failure
        pictures = [part["value"] for part in asked.message if part["type"] == "image"]
        assert len(pictures) == (2 if path.startswith("[") else 1)
        for picture in pictures:
            got = np.asarray(decoded(picture), dtype=float)
            assert np.abs(got - expected(name)).max() <= (12 if "JPEG" in name or "LAB" in name else 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "RGBX", "HSV", "I;16B"])
def test_no_mode_is_refused(mode: str):
    assert rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_nothing_is_divided_by_zero_or_nan():
    values = np.array([[np.nan, -1.0], [np.inf, 0.0]], dtype=np.float32)
    assert np.asarray(rgb(Image.fromarray(values))).max() == 0


@pytest.mark.parametrize("cli", ["eval", "sweep"])
def test_a_picture_that_no_processor_takes_is_one_miss_once(
    laboratory: Laboratory, files: Files, random_model: Path, cli: str
):
    thin = base64.b64encode(stored(Image.new("RGB", (300, 1)), "PNG")).decode()
    rows = [{"index": i, "question": f"q{i}", "A": "x", "B": "y", "answer": "A"} for i in range(3)]
    files.put("own", [rows[0], {**rows[1], "image": thin}, rows[2]], MCQ)
    lab = files.root / "lab"  # data files of benchmarks lie in the root itself
    lab.mkdir()
    csv, runs = lab / "thin.csv", lab / "runs"

    def run() -> int:
        if cli == "eval":
            common = ["--model", "tiny", "--model-path", str(random_model), "--runs", str(runs), "--no-timing"]
            return main(["eval", *common, "--data", "own", "--max-new-tokens", "2", "--output", str(csv)])
        spec = lab / "thin.yaml"
        spec.write_text(
            f"models: {{tiny: {random_model}}}\nbenchmarks: [own]\nmethods: [{{method: fastv, ratios: [0.5]}}]\n"
            "controls: []\nmax_new_tokens: 2\ntiming: false\n"
        )
        return main(["sweep", "run", str(spec), "--runs", str(runs), "--quiet"])

    assert run() == 0
    results = read_results(csv)
    assert len(results) == 2
    for row in results:
        assert (row["status"], row["n_samples"], row["n_failed"]) == ("ok", 3, 1)
        assert "1 of 3 samples cannot be answered and count as wrong (InputRefused 1), e.g. 1: " in row["reason"]
        assert "aspect ratio" in row["reason"]
        assert read_samples(csv.parent / row["predictions"])[1]["score"] == 0
    journals = {path: path.read_bytes() for path in runs.rglob("journal.jsonl")}
    assert run() == 0
    assert {path: path.read_bytes() for path in journals} == journals, "it was not tried again"


def test_a_processor_that_refuses_everything_is_a_failure(
    laboratory: Laboratory, files: Files, random_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from ivcp_eval.interface.registry import adapter

    def refuse(*_: object) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(type(adapter("qwen2_5_vl")), "encode", refuse)
    files.put("own", [{"index": i, "question": "q", "A": "x", "B": "y", "answer": "A"} for i in range(2)], MCQ)
    csv = files.root / "r.csv"
    common = ["--model", "tiny", "--model-path", str(random_model), "--runs", str(files.root / "runs"), "--no-timing"]
    assert main(["eval", *common, "--data", "own", "--method", "none", "--output", str(csv)]) == 1
    (row,) = read_results(csv)
    assert row["status"] == "incomplete"
    assert "2 of 2 samples failed (InputRefused 2)" in row["reason"]
