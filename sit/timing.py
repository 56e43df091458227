"""How long students, teachers and training steps take, for ``speed_test.py``; networks as deployed, random weights."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.measure.benchmark import Clock, PairedSpeed, compare, random_images, synchronize
from common.measure.flops import gmacs
from common.run.precision import autocast
from sit.engine import get_param_groups, store_for_autocast, training_step
from sit.losses import DistillationLoss
from sit.models.lvvit import LVViT, build_lvvit, count_ops


def pair(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, LVViT]:
    """Teacher and student of a size, as deployed, with random weights: speed does not depend on them."""
    torch.manual_seed(0)
    made = {}
    for role, kind in (("teacher", None), ("student", "frd")):
        with torch.device(device):
            model = build_lvvit(name, distillation_type=kind, logits_only=True)
        made[role] = model.deployed().to(device=device, dtype=dtype)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# LeViT's protocol


@torch.no_grad()
def measure_levit(
    model: nn.Module, images: Tensor, *, warmup_s: float, seconds: float, clock: Clock | None = None
) -> float:
    """Images per second as LeViT's speed tool measures them: batch over the mean time of a pass.

    Args:
        model: deployed network; it is traced on ``images``, float32.
        warmup_s, seconds: of wall clock untimed; of measured time.
        clock: of single passes; by default wall clock on a GPU, processor time on the CPU.

    Source: LeViT, arXiv:2104.01136, speed protocol: throughput of the traced network, which SiT's README names.
    """
    device = images.device
    on_gpu = device.type == "cuda"
    clock = clock or (time.perf_counter if on_gpu else time.process_time)
    threads = torch.get_num_threads()
    if not on_gpu:
        torch.set_num_threads(1)
    try:
        with autocast("fp16" if on_gpu else "none", device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated, and is the protocol
            traced = torch.jit.trace(model, images)
            if on_gpu:
                torch.cuda.empty_cache()
            synchronize(device)
            started = time.monotonic()
            while time.monotonic() - started < warmup_s:
                traced(images)  # pyright: ignore[reportCallIssue]
            synchronize(device)
            times: list[float] = []
            while sum(times) < seconds:
                begin = clock()
                traced(images)  # pyright: ignore[reportCallIssue]
                synchronize(device)
                times.append(clock() - begin)
    finally:
        torch.set_num_threads(threads)
    return images.shape[0] / statistics.mean(times)


def run_levit(name: str, device: torch.device, *, batch: int | None, warmup_s: float, seconds: float) -> float:
    """Print LeViT's line for teacher and student; returns the ratio."""
    models = pair(name, device, torch.float32)
    batch = batch or {"cuda": 1024, "cpu": 16}[device.type]
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch, 3, *models["student"].image_shape, device=device, generator=generator)
    speed = {}
    for role, model in models.items():
        speed[role] = measure_levit(model, images, warmup_s=warmup_s, seconds=seconds)
        how = "traced, autocast float16" if device.type == "cuda" else "traced, float32, 1 thread, processor time"
        print(f"{name} {role} {device} {speed[role]:.2f} images/s @ batch size {batch} ({how})", flush=True)
    return speed["student"] / speed["teacher"]


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def run_pair(
    name: str, device: torch.device, dtype: torch.dtype, *, batch: int | None, compiled: bool, **options: Any
) -> dict[str, PairedSpeed]:
    """Time teacher and student in turns, and print both; ``options`` are those of ``compare``."""
    models = pair(name, device, dtype)
    batch = batch or {"cuda": 256, "cpu": 1}[device.type]
    images = random_images(batch, models["student"].image_shape[0], device, dtype)
    networks: Any = {role: torch.compile(model) if compiled else model for role, model in models.items()}
    speeds = compare(networks, images, baseline="teacher", progress=name, **options)
    cost = {role: gmacs(count_ops(model)) for role, model in models.items()}
    ratio = cost["teacher"] / cost["student"]
    for role, paired in speeds.items():
        speed = paired.speed
        spread = "" if speed.spread_percent is None else f", spread {speed.spread_percent:.1f} %"
        print(
            f"{name} {role}: {speed.throughput_ips:.2f} images/s, {speed.latency_ms:.1f} ms per batch of {batch}, "
            f"{cost[role]:.3f} GMACs{spread}"
        )
    speedup = speeds["student"].speedup
    print(f"{name}: {speedup:.2f}x, promised {ratio:.2f}x, realised/theoretical {speedup / ratio:.2f}", flush=True)
    return speeds


# ---------------------------------------------------------------------------------------------------------------------
# Training step


def measure_training(
    name: str, device: torch.device, *, batch: int, rounds: int, clock: Clock, limit_s: float | None = None
) -> dict[str, float]:
    """Milliseconds of a training step and of its parts, medians of rounds in which they take turns.

    ``step`` is the whole one; ``plain`` the same without any teacher and without the reverse modules; ``teacher`` the
    teacher's pass; ``recovery`` the rest: reverse modules, distillation losses, and their part of the optimiser. Under
    autocast to float16 on a GPU.
    """
    torch.manual_seed(0)
    amp = "fp16" if device.type == "cuda" else "none"
    teacher = build_lvvit(name, distillation_type=None).to(device).eval().requires_grad_(False)
    teacher.with_cp = False
    store_for_autocast(teacher, torch.float16 if amp == "fp16" else None)
    students = {key: build_lvvit(name, distillation_type="frd").to(device).train() for key in ("step", "plain")}
    students["plain"].recover = False
    students["plain"].rtsm.requires_grad_(False)
    base = nn.CrossEntropyLoss()
    criteria = {
        "step": DistillationLoss(base, teacher, None, "frd", 2.0, 2.0, 1.0, 1.0),
        "plain": DistillationLoss(base, None, None, "frd", 0.0, 0.0, 1.0, 1.0),
    }
    optimizers = {key: torch.optim.AdamW(get_param_groups(model, 0.05), lr=1e-5) for key, model in students.items()}
    images = random_images(batch, teacher.image_shape[0], device)
    labels = torch.arange(batch, device=device)

    def step(key: str) -> None:
        optimizers[key].zero_grad(set_to_none=True)
        with autocast(amp, device):
            loss = training_step((images, labels), network=students[key], criterion=criteria[key])["loss"]
        loss.backward()
        optimizers[key].step()

    def ask() -> None:
        with autocast(amp, device):
            criteria["step"].ask_teacher(images)

    parts: dict[str, Callable[[], None]] = {"step": lambda: step("step"), "plain": lambda: step("plain")}
    parts["teacher"] = ask
    times: dict[str, list[float]] = {key: [] for key in parts}
    started = time.monotonic()
    for done in tqdm(range(rounds + 1), desc=f"{name} training", delay=2, leave=False):
        for key, work in parts.items():
            synchronize(device)
            begin = clock()
            work()
            synchronize(device)
            times[key].append(clock() - begin)
        if limit_s is not None and done and time.monotonic() - started > limit_s:
            break
    medians = {key: 1e3 * statistics.median(values[1:]) for key, values in times.items()}
    return medians | {"recovery": medians["step"] - medians["plain"] - medians["teacher"]}


def run_training(name: str, device: torch.device, *, batch: int | None, **options: Any) -> float:
    """Print the shares of a training step; returns its milliseconds. ``options`` are of :func:`measure_training`."""
    batch = batch or {"cuda": 64, "cpu": 2}[device.type]
    found = measure_training(name, device, batch=batch, **options)
    shares = {key: 100 * found[key] / found["step"] for key in ("plain", "teacher", "recovery")}
    print(
        f"{name}: {found['step']:.1f} ms per training step of {batch} images: student {shares['plain']:.0f} %, "
        f"teacher {shares['teacher']:.0f} %, reverse modules and their losses {shares['recovery']:.0f} %",
        flush=True,
    )
    return found["step"]
