"""LLaVA-UHD v4's compressor in the vision tower of Qwen2.5-VL: 16 patches a visual token in place of 4.

Paper: https://arxiv.org/abs/2605.08985
Code: https://github.com/THUMAI-Lab/LLaVA-UHD-v4 @ 98345a7, train/multimodal_common/base_models/vit_insert_merger.py
Differs: the tower and the decoder are Qwen2.5-VL's, not SigLIP 2 and Qwen3; pictures are not sliced. `modeling` lists
what that changes. No weights are published in this layout: `ivcp lab train uhd_v4 --model M` makes them from a model
of the family Qwen2.5-VL.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ivcp_eval.interface import Checkpoint
from model_adapters.qwen2_5_vl import Adapter as Qwen25Adapter


class Adapter(Qwen25Adapter):
    """Wiring of Qwen2.5-VL, with visual tokens of 4 x 4 patches that stand two positions apart."""

    model_types = ("uhd_v4",)
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("uhd_v4", note="nothing published; `ivcp lab train uhd_v4` makes a folder for --model-path"),
    )

    def config(self, source: str) -> Any:
        """As the stock one, which has to be told of this architecture."""
        _register()
        return super().config(source)

    def load(self, source: str, **options: Any) -> tuple[Any, Any]:
        """Likewise."""
        _register()
        return super().load(source, **options)


def _register() -> None:
    """Tell transformers' Auto classes of a model type that is not its own; again does no harm."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from model_adapters.qwen2_5_vl_uhd.modeling import UhdV4Config, UhdV4ForConditionalGeneration

    AutoConfig.register(UhdV4Config.model_type, UhdV4Config, exist_ok=True)
    AutoModelForImageTextToText.register(UhdV4Config, UhdV4ForConditionalGeneration, exist_ok=True)
