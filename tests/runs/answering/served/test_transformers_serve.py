"""A stock ``transformers serve`` with the embedded model: asked as any server, it answers as the model in this process.

It must be able to decode pictures. Where torchvision cannot (its CUDA build beside a CPU torch), the served folder has
a processor of its own that decodes with Pillow, which the server loads as it would any checkpoint's code.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivcp_eval.cli import main
from ivcp_eval.files import PACKAGE
from ivcp_eval.reports.table import read_results, read_samples
from ivcp_eval.runs.answering.session import Session
from tests.runs.answering.served.conftest import Bench
from tests.runs.answering.served.engine import is_probe, parts_of
from tests.vlmeval_bridge.judge.server import Reply, error, serve

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"`transformers serve` needs {package}: pip install 'ivcp-eval[dev]'")

DECODER = """\
from transformers import Qwen2VLImageProcessor
from transformers.image_utils import load_image


class Decoder(Qwen2VLImageProcessor):
    def fetch_images(self, images):
        return [self.fetch_images(one) for one in images] if isinstance(images, list) else load_image(images)
"""
START_S = 120.0  # importing transformers takes seconds, on a machine with other work many


def model_folder(folder: Path) -> Path:
    """The embedded model as it is, or with a decoder of pictures."""
    from transformers.image_utils import load_image_as_tensor

    model = PACKAGE / "lab" / "tiny" / "model"
    Image.new("RGB", (28, 28)).save(folder / "picture.png")
    try:
        load_image_as_tensor(str(folder / "picture.png"))
    except RuntimeError:
        pass
    else:
        return model
    copy = Path(shutil.copytree(model, folder / "model"))
    (copy / "decoder.py").write_text(DECODER)
    config = json.loads((copy / "processor_config.json").read_text())
    config["image_processor"] |= {
        "image_processor_type": "Decoder",
        "auto_map": {"AutoImageProcessor": "decoder.Decoder"},
    }
    (copy / "processor_config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(base URL, name of the model) of a running server."""
    folder = tmp_path_factory.mktemp("serve")
    model = str(model_folder(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "hub").mkdir()
    environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--trust-remote-code"]
    command = [sys.executable, "-c", code, "serve", model, *options]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while not is_up(port):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def ask(bench: Bench, url: str, model: str, *more: str) -> int:
    command = ["eval", "--base-url", url, "--served-model", model, "--data", "tiny_mcq", "--limit", "3"]
    return main([*command, "--no-timing", "--quiet", "--runs", str(bench.folder / "runs"), *more])


@pytest.mark.slow
def test_it_answers_as_the_model_here_and_is_asked_again_after_errors(
    bench: Bench, session: Session, stock: tuple[str, str]
) -> None:
    url, model = stock
    refused: set[str] = set()

    def forward(body: dict[str, Any], n: int) -> Reply:
        """Refuses each question once, as a server does that is too busy."""
        question = json.dumps(body["messages"])
        if question not in refused and not is_probe(body):
            refused.add(question)
            return error(503, "busy", retry_after_ms="1")
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return Reply(body=reply.read())

    with serve(forward) as between:
        assert ask(bench, between.url, model) == 0
    assert len(refused) == 3
    assert len(between.requests) == 1 + 2 * 3, "a probe, and every question twice"
    here, there = [row for row in read_results(bench.folder / "eval" / "tiny.csv") if row["metric"] == "accuracy"]
    assert (here["method"], there["method"]) == ("none", "deployed")
    assert (there["status"], there["n_failed"], there["score"]) == ("ok", 0, here["score"])
    own, served = (list(read_samples(bench.folder / "eval" / row["predictions"])) for row in (here, there))
    for one, other in zip(own, served, strict=True):
        for column in ("index", "prompt_sha256", "prediction", "score", "new_tokens"):
            assert one[column] == other[column], column
        assert other["visual_kept"] is None
    asked = {json.dumps(body["messages"]): body for body in between.requests if not is_probe(body)}
    counted = sorted(session.prompt_tokens(parts_of(body)) for body in asked.values())
    assert sorted(row["prompt_tokens"] for row in served) == counted, "the server's usage"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--served-model", "another"], "Server is pinned to"),
        (["--served-options", "colour=red"], "Unexpected fields in the request: {'colour'}"),
    ],
)
def test_what_it_refuses_is_said_in_its_own_words(
    bench: Bench, stock: tuple[str, str], capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    url, model = stock
    assert ask(bench, url, model, "--baseline-url", url, *options) != 0
    shown = capsys.readouterr()
    assert "does not answer a question about a small grey picture" in shown.out + shown.err
    assert said in shown.out + shown.err
