"""Schedules of r, the tokens per layer that follow from them, and throughput."""

import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from .merge import merge_limit

R = int | tuple[float, float] | list[int]


def parse_r(num_layers: int, r: R) -> list[int]:
    """Tokens to merge away in each layer.

    Args:
        num_layers: L.
        r: a number for all layers; a list, one number per layer (padded with zeros, a longer one is kept); or a tuple
            (r, f): r on average, changing linearly from r (1 - f) in the first layer to r (1 + f) in the last. So
            f = 1 rises from 0 to 2 r, f = -1 falls from 2 r to 0; fractions are cut off.

    Returns:
        At least L numbers. A single layer gets the average.

    Raises:
        TypeError: if r is none of the three.
        ValueError: if a number is negative, or f is not between -1 and 1.

    Source: ToMe, arXiv:2210.09461, section 4.1, merging schedules; notation: the published code's ``inflect`` is f.
    """
    if isinstance(r, tuple):
        if len(r) != 2:
            raise ValueError(f"r as a tuple must be (tokens per layer, inflection), got {r}")
        mean, inflection = r
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection of r must be between -1 and 1, got {r}")
        if not 0 <= mean < math.inf:
            raise ValueError(f"r must be at least 0, got {r}")
        if num_layers == 1:
            return [int(mean)]
        low = int(mean * (1 - inflection))
        high = 2 * mean - low
        step = (high - low) / (num_layers - 1)
        return [int(low + step * i) for i in range(num_layers)]
    if not isinstance(r, (int, list)):
        raise TypeError(f"r must be an int, a tuple (r, inflection) or a list of ints, got {r!r}")
    numbers = [r] * num_layers if isinstance(r, int) else list(r)
    for number in [r] if isinstance(r, int) else numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"r must be an int, a tuple (r, inflection) or a list of ints, got {r!r}")
        if number < 0:
            raise ValueError(f"r must be at least 0, got {r!r} (there is no upper limit: a layer merges half at most)")
    return numbers + [0] * (num_layers - len(numbers))


def tokens_per_layer(num_tokens: int, schedule: Sequence[int], protected: int) -> list[int]:
    """Tokens that enter each layer and, last, those that leave the last one, as a merge halves the others at most."""
    counts = [num_tokens]
    for r in schedule:
        counts.append(counts[-1] - min(r, merge_limit(counts[-1], protected)))
    return counts


def benchmark(
    model: nn.Module,
    device: torch.device | str | int = "cuda",
    input_size: Sequence[int] = (3, 224, 224),
    batch_size: int = 64,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Throughput in images per second on uniform noise: the mean over the runs behind the warm-up.

    Args:
        model: network; it is put in evaluation mode and moved to ``device``.
        device: where to run.
        input_size: of one image.
        batch_size: images per run.
        runs: forward passes.
        throw_out: fraction of them that is warm-up.
        use_fp16: run under automatic mixed precision in float16.
        verbose: print the result.

    Raises:
        ValueError: if no run is left to be timed.
    """
    warmup = int(runs * throw_out)
    if runs - warmup < 1:
        raise ValueError(f"runs = {runs} of which {throw_out} are thrown out leave none to be timed")
    device = torch.device(device)
    model = model.eval().to(device)
    images = torch.rand(batch_size, *input_size, device=device)
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.float16, enabled=use_fp16):
        for run in range(runs):
            if run == warmup:
                _synchronize(device)
                start = time.perf_counter()
            model(images)
    _synchronize(device)
    throughput = (runs - warmup) * batch_size / (time.perf_counter() - start)
    if verbose:
        print(f"Throughput: {throughput:.2f} im/s")
    return throughput


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
