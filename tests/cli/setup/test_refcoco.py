"""The command line, the script, and VLMEvalKit's own class as the reader."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ivcp_eval.cli import main as ivcp
from tests.benchmarks.refcoco.data import Corpus, convert, truncate

ROOT = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def main(arguments: list[str]) -> int:
    return ivcp(["refcoco", *arguments])


def _cli(corpus: Corpus, *more: str) -> int:
    paths = ["--annotations_files", str(corpus.save()), "--images_folder", str(corpus.pictures)]
    return main([*paths, "--output_dir", str(corpus.output), "--workers", "1", *more])


def test_command_line(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _cli(corpus) == 1
    assert "has 6 expressions, RefCOCO_val has 10834" in caplog.text
    truncate(corpus.pictures / corpus.file_name(2))
    assert _cli(corpus, "--allow-partial") == 1
    caplog.clear()
    assert _cli(corpus, "--allow-partial", "--skip-bad", "--qwen25") == 0
    assert "2 of 6 entries were LEFT OUT of RefCOCO_val_for_qwen25vl.tsv" in caplog.text
    # One bad file does not keep the others from being converted, but the status tells.
    other = Corpus(tmp_path / "b", name="finetune_refcoco_testA")
    files = ["--annotations_files", str(corpus.path), str(other.save()), "--images_folder", str(other.pictures)]
    (other.pictures / other.file_name(2)).unlink()
    other.images, other.annotations = other.images[:2], other.annotations[:2]
    other.save()
    assert main([*files, "--output_dir", str(other.output), "--allow-partial", "--workers", "1"]) == 1
    assert (other.output / "RefCOCO_testA.tsv").is_file()
    assert not (other.output / "RefCOCO_val.tsv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["--annotations_files", "{json}"], "needs --images_folder"),
        (["--annotations_files", "{json}", "--images_folder", "{none}"], "does not exist"),
        (["--annotations_files", "{none}", "--images_folder", "{images}"], "there is no file"),
        (["--stock_tsv", "{none}"], "there is no file"),
        (
            ["--annotations_files", "{json}", "--images_folder", "{images}", "--workers", "0"],
            "--workers: must be a whole number above 0",
        ),
        (
            ["--annotations_files", "{json}", "--images_folder", "{images}", "--min_pixels", "0"],
            "must be a whole number above 0",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"json": str(corpus.save()), "images": str(corpus.pictures), "none": str(corpus.folder / "none")}
    try:
        code: object = main(
            [argument.format(**places) for argument in arguments] + ["--output_dir", str(corpus.output)]
        )
    except SystemExit as end:  # of argparse
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_two_files_for_one_name_are_refused(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Corpus(tmp_path / "b").save()
    files = ["--annotations_files", str(corpus.save()), str(other), "--images_folder", str(corpus.pictures)]
    assert main([*files, "--output_dir", str(corpus.output), "--allow-partial"]) == 1
    assert "would both be written to" in caplog.text


def test_the_script_runs_and_loads_neither_torch_nor_vlmeval(corpus: Corpus) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path('convert_to_tsv.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert not {'torch', 'vlmeval', 'transformers'} & set(sys.modules)\n"
    )
    arguments = ["--annotations_files", corpus.save(), "--images_folder", corpus.pictures, "--allow-partial"]
    command = [sys.executable, "-c", code, *map(str, arguments), "--output_dir", str(corpus.output), "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (corpus.output / "RefCOCO_val.tsv").is_file()
    assert "6 expressions" in done.stderr
    done = subprocess.run([*command, "--quiet", "--overwrite"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, "is up to date" in done.stderr) == (0, "", False)


_UNPACK = """
import json, sys
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.smp import load

class Plain(ImageBaseDataset):
    def load_data(self, dataset):
        return load(sys.argv[1])

    def evaluate(self, eval_file, **kwargs):
        raise NotImplementedError

data = Plain("RefCOCO_val")
rows = [data.data.iloc[i] for i in range(len(data))]
print(json.dumps([[str(row["question"]), data.dump_image(row)] for row in rows]))
"""


@pytest.mark.slow
def test_vlmevalkits_own_class_reads_the_file(corpus: Corpus) -> None:
    """Unmodified VLMEvalKit resolves the references and unpacks each image once, without loss.

    In a process of its own: importing VLMEvalKit switches gradients off and changes the environment.
    """
    if importlib.util.find_spec("vlmeval") is None:
        pytest.skip("needs the vlmeval extra")
    corpus.images[0]["caption"] = "null"
    convert(corpus)
    command = [sys.executable, "-c", _UNPACK, str(corpus.output / "RefCOCO_val.tsv")]
    environment = {**os.environ, "LMUData": str(corpus.output)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [question for question, _ in rows] == ["null ", *(f"thing {i}" for i in range(1, 6))]
    assert len({name for _, (name,) in rows}) == 3
    for position, (_, (name,)) in enumerate(rows):
        original = Image.open(corpus.pictures / corpus.file_name(position % 3))
        assert Image.open(name).tobytes() == original.tobytes()
