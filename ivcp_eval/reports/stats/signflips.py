"""The exact sign-flip test of a sum: all 2^C permutations of the sides of C clusters, counted without drawing any."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["sign_flip_p"]

#: What scores and their means over a few seeds are multiples of; then every permutation can be counted.
_UNITS = tuple(1 / parts for parts in (1, 2, 3, 6, 10, 30, 100, 300))
#: Most values of the characteristic function that are computed, about a second.
_MOST_VALUES = 20_000_000


def sign_flip_p(moves: NDArray[np.float64]) -> float | None:
    """Share of all sign flips of ``moves`` (C,) whose sum is as far from zero as theirs; None if it cannot be counted.

    It cannot where the moves are no multiples of a common part, or of very many different ones. The distribution of the
    sum on the multiples of that part is the inverse Fourier transform of its characteristic function, a product over
    moves. It is tilted exponentially to have its mean at the observed sum (Esscher 1932), so that a tail far out is as
    exact as one near the middle.
    """
    moved = moves[np.abs(moves) > 1e-9]
    unit = next((u for u in _UNITS if np.allclose(moved / u, np.rint(moved / u), rtol=0, atol=1e-6)), None)
    if unit is None:
        return None
    signed = np.rint(moved / unit).astype(np.int64)
    observed, reach = abs(int(signed.sum())), int(np.abs(signed).sum())
    if observed == 0:
        return 1.0
    if observed == reach:
        return 2.0 ** (1 - signed.size)
    steps, counts = np.unique(np.abs(signed), return_counts=True)
    tilt = _tilt(steps, counts, observed)
    deviation = math.sqrt(float(counts @ (steps**2 * (1 - np.tanh(tilt * steps) ** 2))))
    # Beyond 13 standard deviations and a step lies less than what a double can tell from 0 beside the tail.
    spread = min(2 * (reach + observed) + 1, int(26 * deviation + 2 * steps.max()) + 64)
    size = 1 << (spread - 1).bit_length()
    if size * steps.size > 2 * _MOST_VALUES:
        return None
    angles = 2 * np.pi * np.arange(size // 2 + 1) / size
    transform = np.exp(-1j * observed * angles)
    for step, count in zip(steps, counts, strict=True):
        transform *= (np.cos(step * angles) + 1j * math.tanh(tilt * step) * np.sin(step * angles)) ** int(count)
    # Conjugated: numpy's inverse transform has e^{+i}, a characteristic function needs e^{-i}.
    chances = np.fft.irfft(transform.conj(), size)
    offsets = np.arange(size // 2)
    tail = float(np.sum(chances[: size // 2] * np.exp(-tilt * offsets)))
    weight = float(np.sum(counts * _log_cosh(tilt * steps))) - tilt * observed
    return min(1.0, 2 * tail * math.exp(weight))


def _tilt(steps: NDArray[np.int64], counts: NDArray[np.int64], observed: int) -> float:
    """The tilt under which the expected sum is the observed one, by bisection."""
    low, high = 0.0, 1.0
    while float(counts @ (steps * np.tanh(high * steps))) < observed:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if float(counts @ (steps * np.tanh(middle * steps))) < observed:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _log_cosh(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values + np.log1p(np.exp(-2 * values)) - math.log(2)
