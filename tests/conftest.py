"""Every test runs on one thread, and stock transformers must be importable beside a CUDA build of torchvision."""

from __future__ import annotations

from ivcp_eval import cpu_torchvision

cpu_torchvision.install()  # before anything imports transformers

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-pair", action="store_true", help="tests/contract: every check on every method and family")
