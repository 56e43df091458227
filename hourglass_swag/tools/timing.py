"""What only the speeds of this paper need: its own protocol, the share of a layer, and whether a batch fits a CPU."""

import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.measure.benchmark import (
    MIB,
    Clock,
    PassBar,
    Speed,
    explain_out_of_memory,
    summarise,
    synchronize,
    time_pass,
)
from common.measure.flops import evaluating


def measure_paper_protocol(
    model: nn.Module,
    *,
    batch_size: int,
    resolution: int,
    device: torch.device | str,
    runs: int = 50,
    progress: str | None = None,
    clock: Clock = time.perf_counter,
) -> Speed:
    """Throughput as the Hourglass repository's own tool measures it.

    Uniform random input in [0, 1), not normalised, float32 without autocast, ``runs`` forward passes of which the first
    int(runs / 4) are warm-up; synchronised before the clock starts and at the end, not between passes. The latency is
    the mean, and there is no spread, because single passes are not timed.

    Raises:
        ValueError: if ``runs`` < 1.
        NotEnoughMemory: if the batch does not fit.
    """
    if runs < 1:
        raise ValueError(f"need runs >= 1, got {runs}")
    device = torch.device(device)
    warmup = int(runs * 0.25)
    start = clock()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(evaluating(model))
        images = torch.rand(batch_size, 3, resolution, resolution, device=device)
        stack.enter_context(explain_out_of_memory(images))
        bar = stack.enter_context(PassBar(progress, runs))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for done in range(runs):
            if done == warmup:
                synchronize(device)
                start = clock()
            with bar.one_pass(model):
                model(images)
        synchronize(device)
        seconds = clock() - start
        peak = torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else None
    timed = runs - warmup
    speed = summarise([seconds / timed], images, peak_memory_mb=peak, compiled=hasattr(model, "_orig_mod"))
    return replace(speed, rounds=timed)


def measure_share(
    model: nn.Module,
    part: nn.Module,
    images: Tensor,
    *,
    warmup: int = 1,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> float:
    """Fraction of a forward pass that is spent inside one of its modules; median over rounds.

    The device is synchronised on entry to and exit from the part, so on a GPU the share is an upper bound: the part
    cannot overlap with the launches around it. The model must not be compiled.

    Raises:
        ValueError: if ``part`` is not a module of ``model``, or is not called during the pass.
    """
    if all(part is not module for module in model.modules()):
        raise ValueError(f"{type(part).__name__} is not part of {type(model).__name__}")
    device = images.device
    entered = inside = 0.0

    def enter(*_: Any) -> None:
        nonlocal entered
        synchronize(device)
        entered = clock()

    def leave(*_: Any) -> None:
        nonlocal inside
        synchronize(device)
        inside += clock() - entered

    shares: list[float] = []
    handles = [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        with torch.inference_mode(), evaluating(model), explain_out_of_memory(images):
            for done in range(warmup + rounds):
                inside = 0.0
                seconds = time_pass(model, images, clock)
                if done >= warmup:
                    shares.append(inside / seconds)
    finally:
        for handle in handles:
            handle.remove()
    if not any(shares):
        raise ValueError(f"{type(part).__name__} is never called during a forward pass of {type(model).__name__}")
    return statistics.median(shares)


def measure_activation_bytes(model: nn.Module, images: Tensor) -> int:
    """Most memory that the results of one forward pass hold at the same time, without weights and input, in bytes.

    Follows the storages of all results of the operations dispatched; buffers inside a kernel are not seen. For one
    image it predicts what a batch will need.
    """
    with torch.no_grad(), evaluating(model), _LiveBytes() as live:
        model(images)
    return live.peak


def available_memory_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated, on a CUDA device or by this process on the CPU; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits: list[int] = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, usage = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and usage.exists() and (text := limit.read_text().strip()).isdigit():
        limits.append(int(text) - int(usage.read_text()))
    return min(limits) if limits else None


def _address(tensor: Tensor) -> int:
    """Of a tensor's storage, also of one without data."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


class _LiveBytes(TorchDispatchMode):
    """Bytes of all results that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} - set(self._seen)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _address(leaf)) not in given:
                storage = leaf.untyped_storage()
                self._seen[key] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))
        return result
