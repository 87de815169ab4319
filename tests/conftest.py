"""Every test runs on one thread, and stock transformers must be importable beside a CUDA build of torchvision."""

from __future__ import annotations

from ivcp_eval import cpu_torchvision

cpu_torchvision.install()  # before anything imports transformers

import torch  # noqa: E402

torch.set_num_threads(1)
