"""Courses over a run: learning rate of the weights, learning rate of z, temperature of token selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

DECAYS = ("cosine", "linear", "constant")


def warmup_factor(kind: str, *, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate by step: linear from 0 over the warm-up, then the decay.

    Args:
        kind: ``cosine`` (half a period to zero; it rises again beyond the total), ``linear`` (stays at zero) or
            ``constant``.
        warmup_steps: steps of warm-up.
        total_steps: step at which the decay ends.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in DECAYS:
        raise ValueError(f"--decay_type must be one of {', '.join(DECAYS)}, got {kind!r}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        if kind == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if kind == "linear":
            return max(0.0, 1 - progress)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))

    return factor


def zlr_schedule(values: Sequence[float], epochs: int) -> dict[int, float]:
    """Learning rate of z by the epoch from which it holds, the values spread evenly over the run.

    Later values win where there are more of them than epochs.

    Source: arXiv:2203.08243, learning rate of z: changed during the run.
    """
    return {index * (epochs // len(values)): value for index, value in enumerate(values)}


def zlr_at(schedule: dict[int, float], epoch: int) -> float:
    """The rate that holds in an epoch."""
    return schedule[max(start for start in schedule if start <= epoch)]


def selection_tau(step: int, total_steps: int, *, end: float = 10.0, start: float = 0.1) -> float:
    """Temperature of token selection, rising linearly from ``start`` to ``end``."""
    return start + (end - start) * step / max(1, total_steps)
