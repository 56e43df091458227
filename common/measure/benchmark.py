"""Speed of a forward pass: latency, throughput, memory, and paired comparisons that cancel the drift of a machine.

What is measured: whole forward passes in evaluation mode under ``torch.inference_mode``, on image-like data already on
the device, each pass enclosed by a synchronisation. The result is the median over rounds with its interquartile spread.
The precision is that of the images and the model, which are *cast* to it (``model.to(dtype)``), as a deployed model
would be; autocast would convert every weight again in every pass and so measure the conversion at batch 1.

A ratio between two models is the median of the ratios of single rounds, in which the models take turns: a machine that
gets slower during the run slows both alike. The official protocol of the Hourglass repository is
``measure_paper_protocol``.
"""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.measure.flops import evaluating
from common.run.errors import UsageError

Clock = Callable[[], float]
"""Seconds since any fixed moment; tests inject their own."""

MIB = 2**20
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BenchmarkError(UsageError):
    """A measurement that cannot be made, with what to change."""


class NotEnoughMemory(BenchmarkError):
    """The batch does not fit; the message says how much is missing."""


@dataclass(frozen=True)
class Speed:
    """One model, one batch size, one precision, one device."""

    batch_size: int
    latency_ms: float
    """median time of one batch"""
    throughput_ips: float
    """images per second: batch size over median time (FPS when the batch size is 1)"""
    spread_percent: float | None
    """interquartile range of the batch times over their median; None for a single round"""
    peak_memory_mb: float | None
    """most memory allocated during a pass, this model's weights included, in MiB; None on the CPU"""
    dtype: str
    device: str
    compiled: bool
    rounds: int
    """timed passes"""


@dataclass(frozen=True)
class PairedSpeed:
    """Speed of one model of a comparison, and its ratio to the baseline."""

    speed: Speed
    speedup: float
    """baseline time over own time: median over the rounds"""
    speedup_spread_percent: float | None
    """interquartile range of the ratios over their median"""


def random_images(
    batch: int,
    size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """Image-like random data: smooth noise at several scales, normalised with ImageNet's mean and deviation.

    Zeros or constants let processors and kernels save work (and power) that real pictures need, and give every token
    the same content. Image i depends on the seed and i alone, whatever the batch.

    Returns:
        (batch, 3, size, size), a photograph's range: pixels in [0, 1] before normalisation.
    """
    mean, std = (torch.tensor(values, device="cpu").view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = torch.empty(batch, 3, size, size, device=device, dtype=dtype)
    for index in range(batch):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        pixels = torch.zeros(1, 3, size, size, device="cpu")  # also inside ``with torch.device("cuda")``
        cells, weight = 2, 1.0
        while cells < size:
            noise = torch.rand(1, 3, cells, cells, generator=generator, device="cpu") - 0.5
            pixels += weight * F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False)
            cells, weight = cells * 4, weight * 0.6
        pixels += 0.05 * (torch.rand(1, 3, size, size, generator=generator, device="cpu") - 0.5)
        pixels = (pixels - pixels.amin()) / (pixels.amax() - pixels.amin()).clamp_min(1e-6)
        images[index] = ((pixels - mean) / std)[0].to(device=device, dtype=dtype)
    return images


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was asked of it; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_clock(processor_time: bool, device: torch.device, *, one_thread: bool = True) -> Clock:
    """The clock of ``--processor-time``: what a CPU computes, on one thread; else the time that passes.

    Raises:
        UsageError: it is to measure a GPU.
    """
    if not processor_time:
        return time.perf_counter
    if device.type != "cpu":
        raise UsageError("--processor-time: a GPU's work does not count as processor time; it goes with --device cpu")
    if one_thread:
        torch.set_num_threads(1)
    return time.process_time


def compare(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    baseline: str,
    rounds: int = 10,
    warmup: int = 3,
    limit_s: float | None = None,
    progress: str | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, PairedSpeed]:
    """Speeds of models that take turns round by round, each with its ratio to the baseline of the same rounds.

    The order within a round rotates, so that no model always follows the same one.

    Args:
        models: networks on the device of ``images``, in their precision; compiled or not. Their mode is restored.
        images: one batch, (B, 3, height, width).
        baseline: name of the one that the ratios are over.
        warmup, rounds: untimed and timed passes of each.
        limit_s: stop after this many seconds, with the rounds done so far. The warm-up takes at most a fifth of it, but
            at least one round. A round is never interrupted, and at least one is reported: the last of the warm-up if
            that alone reaches the limit.
        progress: label of a progress bar, which appears if the measurement takes longer than two seconds.
        clock: source of the time.

    Raises:
        ValueError: if ``baseline`` is not one of ``models``, ``rounds`` < 1 or ``warmup`` < 0.
        NotEnoughMemory: if the batch does not fit.
    """
    if baseline not in models:
        raise ValueError(f"baseline {baseline!r} is not among the models {sorted(models)}")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"need rounds >= 1 and warmup >= 0, got {rounds} and {warmup}")
    device = images.device
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = dict.fromkeys(names, 0.0)
    warm = warmup
    started = clock()
    together = _resident_bytes(models.values(), device) / MIB
    others = 0.0  # what the process holds on the device besides these models
    if device.type == "cuda":
        others = max(torch.cuda.memory_allocated(device) / MIB - together, 0.0)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(explain_out_of_memory(images))
        for model in models.values():
            stack.enter_context(evaluating(model))
        bar = stack.enter_context(PassBar(progress, (warmup + rounds) * len(names)))
        for done in range(warmup + rounds):
            shift = done % len(names)
            for name in names[shift:] + names[:shift]:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                with bar.one_pass(models[name]):
                    seconds[name].append(time_pass(models[name], images, clock))
                if device.type == "cuda":
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) / MIB)
            elapsed = clock() - started
            if limit_s is not None and elapsed > limit_s / 5:
                warm = min(warm, done + 1)
            late = limit_s is not None and elapsed + elapsed / (done + 1) > limit_s
            if late or done + 1 == warm + rounds:
                break
    weights = {name: _resident_bytes([model], device) / MIB for name, model in models.items()}
    timed = {name: times[warm:] or times[-1:] for name, times in seconds.items()}
    return {
        name: PairedSpeed(
            speed=summarise(
                timed[name],
                images,
                peak_memory_mb=peaks[name] - others - together + weights[name] if device.type == "cuda" else None,
                compiled=hasattr(model, "_orig_mod"),
            ),
            speedup=statistics.median(ratios := [a / b for a, b in zip(timed[baseline], timed[name], strict=True)]),
            speedup_spread_percent=_spread_percent(ratios),
        )
        for name, model in models.items()
    }


def device_name(device: torch.device | str) -> str:
    """The device's own name: the GPU model, or the processor's."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_device(device: torch.device | str) -> dict[str, Any]:
    """What a measured number depends on besides the model: device, driver and versions."""
    device = torch.device(device)
    description: dict[str, Any] = {
        "type": device.type,
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    for package in ("torchvision", "timm"):
        try:
            description[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            description[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["memory_mb"] = round(properties.total_memory / MIB)
        description["capability"] = f"{properties.major}.{properties.minor}"
        description["cudnn"] = torch.backends.cudnn.version()
        description["driver"] = query_gpu("driver_version").get("driver_version")
    return description


def query_gpu(*keys: str) -> dict[str, str]:
    """What NVIDIA's driver tells about the first GPU; empty where nvidia-smi is not there to ask, or cannot tell."""
    if (program := shutil.which("nvidia-smi")) is None:
        return {}
    query = [program, f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    words = answer.stdout.strip().split("\n")[0].split(", ")
    return dict(zip(keys, words, strict=True)) if answer.returncode == 0 and len(words) == len(keys) else {}


def time_pass(model: nn.Module, images: Tensor, clock: Clock) -> float:
    """Seconds of one forward pass, synchronised on both sides."""
    synchronize(images.device)
    start = clock()
    model(images)
    synchronize(images.device)
    return clock() - start


def summarise(times: Sequence[float], images: Tensor, *, peak_memory_mb: float | None, compiled: bool) -> Speed:
    median = statistics.median(times)
    return Speed(
        batch_size=images.shape[0],
        latency_ms=1e3 * median,
        throughput_ips=images.shape[0] / median,
        spread_percent=_spread_percent(times),
        peak_memory_mb=peak_memory_mb,
        dtype=str(images.dtype).removeprefix("torch."),
        device=device_name(images.device),
        compiled=compiled,
        rounds=len(times),
    )


def _spread_percent(values: Sequence[float]) -> float | None:
    """Interquartile range over the median, in percent; None for a single value."""
    if len(values) < 2:
        return None
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return 100 * (third - first) / median


def _resident_bytes(models: Any, device: torch.device) -> int:
    """Bytes of the weights and buffers on a device, each storage once."""
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == device.type:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def explain_out_of_memory(images: Tensor) -> Generator[None]:
    """Turn the allocators' errors into one that names the batch."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in text:
            raise
        batch, _, height, width = images.shape
        raise NotEnoughMemory(
            f"a batch of {batch} images of {height}x{width} in {str(images.dtype).removeprefix('torch.')} does not fit "
            f"into the memory of {device_name(images.device)}; take a smaller batch (-b). "
            f"{text.splitlines()[0] if text else 'Out of memory'}"
        ) from error


class PassBar(tqdm):  # pyright: ignore[reportMissingTypeArgument] - which it takes in its stubs only
    """Progress over the passes of a measurement; within a pass, over the blocks of the model.

    The blocks are watched only while passes take longer than two seconds, where the cost of watching is nothing.
    """

    def __init__(self, label: str | None, passes: int) -> None:
        look = "{desc}: {percentage:3.0f} %|{bar}| {n:.1f}/{total} passes [{elapsed}, {remaining} left]"
        often: dict[str, Any] = {"delay": 2, "mininterval": 0.5 if sys.stderr.isatty() else 30}
        super().__init__(total=passes, desc=label, disable=label is None, leave=False, bar_format=look, **often)
        self._watch = not self.disable

    @contextmanager
    def one_pass(self, model: nn.Module) -> Generator[None]:
        """Enclose one pass of ``model``."""
        blocks = _blocks(model) if self._watch and not hasattr(model, "_orig_mod") else []
        before, start = self.n, time.perf_counter()
        handles = [
            block.register_forward_hook(  # whatever else than None it returned would replace the block's output
                lambda *_, part=part: self.update(before + part / (len(blocks) + 1) - self.n) and None
            )
            for part, block in enumerate(blocks, 1)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._watch = not self.disable and time.perf_counter() - start > 2
        self.update(before + 1 - self.n)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The longest chain of modules: the blocks of a transformer, the stages of a convolutional network."""
    chains = [list(module) for module in model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    return max(chains, key=len, default=[])
