"""Oracle: HAWK's scores and choice with the released weights of the heads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from torch import Tensor

from ivcp_eval.methods.hawk import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    start, n = int(case["image_start"]), int(case["image_length"])
    signals = one_image(
        n,
        case["n_kept"],
        start=start,
        behind=case["query"].shape[1] - start - n,
        project=lambda signal: case[signal],
    )
    signals.question = case["query_indices"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.json"
        file.write_text(json.dumps(case["head_weights"].tolist()))
        method = Method(weights=file)
        return {"kept": answer(method, signals).keep, "scores": method.score(signals)}
