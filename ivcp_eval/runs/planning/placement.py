"""Where and how a model runs, and the limits of its pictures and answers. No torch until one is resolved."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ivcp_eval.interface.models import QUANTISED, Weights
from ivcp_eval.interface.registry import adapter

_EXTRAS = {"torchao": "quantised", "bitsandbytes": "quantised-gpu"}  # what to install for a library


@dataclass(frozen=True)
class Placement:
    """Where and how a model runs. `resolve` fills what was left to be found."""

    device: str = ""
    dtype: str = ""
    attention: str = ""

    def resolve(self, plan_only: bool = False) -> Placement:
        """CUDA with bfloat16 (and FlashAttention-2 if it is installed) where there is a GPU, else CPU and float32.

        Args:
            plan_only: the model will not run on this machine; finds what a machine that has the device would, in an
                environment like this one's (a cluster's login node, a scoring job without a GPU).

        Raises:
            ValueError: a device or dtype that torch does not know or have.
        """
        import torch

        try:
            torch.device("cuda" if self.device == "auto" else self.device or "cpu")
        except RuntimeError:
            raise ValueError(
                f"device {self.device!r} is unknown; use cuda, cuda:1, cpu, or auto for all GPUs"
            ) from None
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not plan_only and device.startswith(("cuda", "auto")) and not torch.cuda.is_available():
            raise ValueError(f"device {device!r} was asked for, but torch {torch.__version__} sees no CUDA device here")
        dtype = self.dtype or ("float32" if device == "cpu" else "bfloat16")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
        flash = device != "cpu" and _has_flash_attention(plan_only)
        attention = self.attention or ("flash_attention_2" if flash else "sdpa")
        return Placement(device, dtype, attention)


def _has_flash_attention(plan_only: bool) -> bool:
    if plan_only:
        return find_spec("flash_attn") is not None  # transformers also asks for a GPU
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def quantiser(kind: str, device: str) -> str:
    """The library of a kind of `QUANTISED` and its version, as results name it.

    Raises:
        ValueError: it is not installed, or does not work on ``device``.
    """
    library = QUANTISED[kind]
    try:
        found = f"{library} {version(library)}"
    except PackageNotFoundError:
        raise ValueError(
            f"quantised weights ({kind}) need {library}, which is not installed: "
            f"pip install 'ivcp-eval[{_EXTRAS[library]}]'"
        ) from None
    if library == "bitsandbytes" and device.partition(":")[0] not in ("cuda", "auto"):
        raise ValueError(
            f"weights stored as {kind} by bitsandbytes need a CUDA device, and this is {device}; use int8 or int4, "
            "which torchao stores on any device"
        )
    return found


@dataclass(frozen=True)
class Limits:
    """Pixel limits and answer length of a run."""

    min_pixels: int | None
    max_pixels: int | None
    max_new_tokens: int

    @classmethod
    def published(cls, weights: Weights) -> Limits:
        """Those of the family's published evaluation, or of the checkpoint where it has its own."""
        wired = adapter(weights.family)
        longest = weights.checkpoint.max_new_tokens or int(wired.generation["max_new_tokens"])
        return cls(wired.min_pixels, wired.max_pixels, longest)
