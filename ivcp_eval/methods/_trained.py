"""Networks that methods read from a file, and the file: safetensors, made by `ivcp lab train NAME`.

Its metadata says of which part it is. A method that is given one by its parameter ``weights`` is still a variant: the
authors' own weights are not public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from ivcp_eval.interface import Image, Signals

Net = TypeVar("Net", bound=nn.Module)
PART = "part"  # key of the metadata


class Importance(nn.Module):
    """An MLP from a token's states to a score; behind LLaVA-1.5's tower it has the published 0.53 M parameters.

    1,024 states, one hidden layer of half as many: 525,313. The paper's shape is not public; states are normalised
    first, without parameters, since towers differ by orders of magnitude.
    """

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.width = width
        hidden = hidden or width // 2
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Importance:
        """One of the shape that these weights have."""
        hidden, width = tensors["layers.0.weight"].shape
        return cls(width, hidden)

    def forward(self, states: Tensor) -> Tensor:
        """(N,) scores of ``states`` (N, width)."""
        return self.layers(nn.functional.layer_norm(states.float(), states.shape[-1:]))[:, 0]


class QueryKey(nn.Module):
    """Two linear maps of states: what is asked for, and what is offered."""

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.width = width
        self.q_proj, self.k_proj = (nn.Linear(width, hidden or width // 2) for _ in range(2))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """One of the shape that these weights have."""
        hidden, width = tensors["q_proj.weight"].shape
        return cls(width, hidden)


class Scorer(QueryKey):
    """VisionSelector's: the mean over an image of what each token's query makes of all tokens' keys.

    Reference: https://github.com/JulietChoo/VisionSelector @ 800a70f (selector_scorer.py, ``TransformerScorer``).
    """

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__(width, hidden)
        for layer in (self.q_proj, self.k_proj):
            nn.init.normal_(layer.weight, std=1e-4)
            nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(N,) scores of ``states`` (N, width)."""
        query, key = self.q_proj(states.float()), self.k_proj(states.float())
        return query @ key.mean(dim=0) / query.shape[-1] ** 0.5


class Router(nn.Module):
    """DualComp's: from a picture and a question to the geometric share lambda and the rate rho.

    Its shape is not public; mean states of both, each normalised, and one hidden layer of a 32nd of the width have the
    published million parameters at a width of 4,096. It begins with lambda = 0.5 and rho = 0.25.
    """

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.width = width
        hidden = hidden or max(8, width // 32)
        last = nn.Linear(hidden, 2)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.5, 0.25]).logit())
        self.layers = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), last)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Router:
        """One of the shape that these weights have."""
        hidden, width = tensors["layers.0.weight"].shape
        return cls(width // 2, hidden)

    def forward(self, picture: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Lambda and rho, each in 0..1, of states (N, width) and (Q, width)."""
        means = [nn.functional.layer_norm(s.float().mean(dim=0), s.shape[-1:]) for s in (picture, question)]
        share, rate = self.layers(torch.cat(means)).sigmoid()
        return share, rate


class FrameRouter(QueryKey):
    """VideoRouter's relevance of frames: how what the question's states ask for agrees with what a frame's offer.

    Its shape is not public: two linear maps to half the width, of mean states, each normalised, and a threshold.
    """

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__(width, hidden)
        self.threshold = nn.Parameter(torch.zeros(()))

    def forward(self, frames: Tensor, question: Tensor) -> Tensor:
        """(T,) of the frames' mean states (T, width), for the question's (Q, width); above 0 is relevant."""
        words, pictures = (
            nn.functional.layer_norm(s.float(), s.shape[-1:]) for s in (question.float().mean(dim=0), frames)
        )
        query, key = self.q_proj(words), self.k_proj(pictures)
        return key @ query / query.shape[-1] ** 0.5 - self.threshold


def network(file: Path, part: str, build: Callable[[Mapping[str, Tensor]], Net], device: torch.device) -> Net:
    """The trained network of a file.

    Args:
        part: whose it must be. build: makes one of the shape that the tensors have.

    Raises:
        ValueError: the file holds no safetensors, or the weights of something else. FileNotFoundError: no such file.
    """
    made: Net = _loaded(file, part, build, device, file.stat().st_mtime_ns)
    return made


@lru_cache(maxsize=8)
def _loaded(
    file: Path, part: str, build: Callable[[Mapping[str, Tensor]], Net], device: torch.device, _changed: int
) -> Net:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as handle:
            found = (handle.metadata() or {}).get(PART)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error}); `ivcp lab train {part}` writes one") from error
    if found not in (part, None):  # authors' own files do not say
        raise ValueError(
            f"{file} holds the weights of {found}, not of {part}; `ivcp lab train {part} --model MODEL` makes those"
        )
    try:
        net = build(tensors)
        net.load_state_dict(dict(tensors))
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{file} does not hold the tensors of {part} ({error}); `ivcp lab train {part} --model MODEL` makes them"
        ) from error
    return net.requires_grad_(requires_grad=False).to(device)


@torch.no_grad()
def answer_of(file: Path, part: str, kind: Any, *states: Tensor) -> Any:
    """What the trained network of a file, one of those above, makes of ``states`` (..., width).

    Raises:
        ValueError: as `network`; or the network reads states of another width.
    """
    net = network(file, part, kind.of, states[0].device)
    if states[0].shape[-1] != net.width:
        raise ValueError(
            f"{file} was trained for states of width {net.width}, this model's have {states[0].shape[-1]}: it belongs "
            "to another model; train one for this model (`ivcp lab train`)"
        )
    return net(*states)


def tower_states(signals: Signals, image: Image) -> Tensor:
    """(N, F) what the vision tower says of an image's alive tokens."""
    return signals.vision["feature"][image.tokens]
