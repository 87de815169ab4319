"""Inputs with anything done to them: what is read is read, the rest is refused in one sentence with the file's name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.interface import models
from ivcp_eval.runs.planning import data
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.runs.store.journal import Journal, line_of
from ivcp_eval.vlmeval_bridge.reading import tsv
from tests.answers import answer

ROUNDS = 150

SWEEP = b"""models: [qwen25, llava15]
benchmarks: [POPE, MMStar]
methods:
  - method: ivc_prune
    ratios: [0.5, 0.25]
    parameters: {layer: [14, 16], ivc: 0.1}
    seeds: [0, 1]
exclude:
  - {model: llava15, ratio: 0.25}
limit: 10
"""
DATA = b"""kind: mcq
prompt: dataset
file: own.tsv
metrics:
  - {name: "accuracy", file: "_acc.csv", column: "Overall", factor: 100}
samples: {file: "_{judge}_result.tsv", column: hit}
abilities: [colour, shape]
n_samples: 240
"""
TABLE = (
    "index\tquestion\tA\tB\tanswer\tcategory\n"
    "007\tWhat?\tNone\tNA\tA\tOverall\n"
    "08\tcaf\u00e9 \"x\" = 1+1?\tnull\t=1+1\tB\t[1, 2]\n"
).encode()  # fmt: skip
PIECES = (
    *(b'"', b"'", b"\t", b"\n", b"\r", b"\0", b"\xe9", b"\xed\xa0\x80", b"[" * 3000, b"{", b"}", b"&a [*a]", b"*a"),
    *(b"010", b"1:30", b"!!python/object:os.system", b"=", b"None", b"-1", b"1e999", b"9" * 5000, b"../"),
    b"__import__('os')",
)


def changed(content: bytes, draw: random.Random) -> bytes:
    """Some bytes cut out, doubled, turned to noise, or something put between."""
    for _ in range(draw.choice((1, 1, 3))):
        start = draw.randrange(len(content) + 1)
        stop = min(len(content), start + draw.choice((0, 1, 5, 60)))
        piece = content[start:stop]
        put = draw.choice((b"", piece * 2, draw.randbytes(len(piece)), *PIECES))
        content = content[:start] + put + content[stop:]
    return content


def sweep(path: Path) -> None:
    load(path)


def declaration(path: Path) -> None:
    benchmarks._read.cache_clear()
    benchmarks.load(path.stem)


def table(path: Path) -> None:
    data._count(path)
    tsv.columns(path)
    tsv.read(path)


def checkpoint(path: Path) -> None:
    models.locate("qwen25", path.parent)


def header() -> bytes:
    text = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return len(text).to_bytes(8, "little") + text + b"data"


INPUTS: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "sweep": ("my.yaml", SWEEP, sweep),
    "declaration": ("own.yaml", DATA, declaration),
    "table": ("own.tsv", TABLE, table),
    "weights": ("model.safetensors", header(), checkpoint),
    "index": ("model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors"}}', checkpoint),
    "configuration": ("config.json", b'{"model_type": "qwen2_5_vl", "layers": [1, 2]}', checkpoint),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_an_input_is_read_or_refused_in_a_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "FOLDER" if kind == "declaration" else "_unused", tmp_path, raising=False)
    name, content, read = INPUTS[kind]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(header())
    path = tmp_path / name
    path.write_bytes(content)
    read(path)
    draw = random.Random(kind)
    refused = []
    for _ in range(ROUNDS):
        path.write_bytes(changed(content, draw))
        try:
            read(path)
        except (ValueError, models.MissingWeights) as error:
            refused.append(str(error))
    assert ROUNDS / 10 < len(refused) < ROUNDS
    assert [text for text in refused if name not in text or "\n" in text or len(text) > 1500] == []
    benchmarks._read.cache_clear()


def test_a_journal_keeps_every_line_that_nothing_was_done_to(tmp_path: Path) -> None:
    lines = [line_of(f"{i:02d}", answer(f"text {i} \u00e9\u2028")) for i in range(12)]
    draw = random.Random(0)
    for _ in range(ROUNDS):
        hit = draw.sample(range(12), 2)
        content = b"".join(changed(line, draw) if i in hit else line for i, line in enumerate(lines))
        path = tmp_path / "journal.jsonl"
        path.write_bytes(content)
        with Journal(path).open() as journal:
            journal.append("new", answer("behind it"))
        found = Journal(path).load()
        assert found["new"].prediction == "behind it"
        for i in range(12):
            whole = b"\n" + lines[i] in b"\n" + content
            assert (f"{i:02d}" in found) >= whole
            if f"{i:02d}" in found:
                assert found[f"{i:02d}"] == answer(f"text {i} \u00e9\u2028"), "a changed answer never counts"
