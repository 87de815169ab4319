"""Every test and every process it starts runs on one thread, and CUDA torchvision imports beside CPU torch."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # inherited by every process that a test starts; read when torch is imported

from ivcp_eval.vlmeval_bridge import cpu_torchvision

cpu_torchvision.install()  # before anything imports transformers

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from ivcp_eval.lab.tiny.processor import build_random  # noqa: E402
from tests import outcomes  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.register(outcomes)
    parser.addoption(
        "--every-pair", action="store_true", help="tests/engine/contract: every check on every method and family"
    )
    parser.addoption("--device", default="cpu", help="tests/engine/contract: where the models run")
    parser.addoption("--dtype", default="float32", help="tests/engine/contract: float32, bfloat16 or float16")
    parser.addoption("--attention", default="sdpa", help="tests/engine/contract: sdpa, eager or flash_attention_2")
    parser.addoption("--oracle-dir", help="tests/methods/test_oracles.py: a folder of other recorded answers")


def pytest_configure(config: pytest.Config) -> None:
    from tests.engine.tiny_models import WHERE

    WHERE.device, WHERE.attention = config.getoption("device"), config.getoption("attention")
    WHERE.dtype = getattr(torch, config.getoption("dtype"))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen2.5-VL, marked as such."""
    folder = tmp_path_factory.mktemp("model")
    build_random(folder, seed=0)
    (folder / "RANDOM_WEIGHTS").touch()
    return folder


@pytest.fixture(autouse=True)
def _gradients_stay_on() -> Iterator[None]:
    """VLMEvalKit's bare import turns them off for the whole process, so the test after it would fail instead of it."""
    yield
    on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert on, "this test left gradients off; import VLMEvalKit through `vlmeval_bridge.environment.import_vlmeval`"
