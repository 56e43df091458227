"""Speed of a student against its teacher: paired, by LeViT's protocol, and where a training step spends its time.

    python sit/speed_test.py --model sit_lvvit_small
    python sit/speed_test.py --model sit_lvvit_tiny sit_lvvit_xsmall --device cpu --processor-time --batch-size 1
    python sit/speed_test.py --model sit_lvvit_small --protocol levit --batch-size 1024
    python sit/speed_test.py --model sit_lvvit_tiny --training --batch-size 64

Ours: student and teacher take turns, each pass synchronised, median over rounds, float32 unless --dtype says otherwise.
LeViT's, which the paper names: a traced network, autocast to float16 on a GPU, ten seconds of warm-up, passes until
their times sum up to sixty; on the CPU one thread, processor time. Networks as deployed: logits alone, batch norm
folded. The last line is the speed-up; --output writes a record for python -m common.results add.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.ledger import results
from common.ledger.tables import Row, load_tables
from common.measure.benchmark import (
    BenchmarkError,
    Clock,
    PairedSpeed,
    compare,
    describe_device,
    device_name,
    random_images,
    synchronize,
)
from common.measure.flops import gmacs
from common.run.cli import make_parser, positive_float, positive_int
from common.run.distributed import LaunchError, choose_device
from common.run.engine import autocast
from common.run.files import ROOT
from sit.arguments import parse_args as parse_flags
from sit.engine import get_param_groups, store_for_autocast, training_step
from sit.losses import DistillationLoss
from sit.models import SIZES, LVViT
from sit.models.lvvit import build_lvvit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEVIT_BATCH = {"cuda": 1024, "cpu": 16}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Networks and protocol."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    names = [name for name in SIZES if name != "sit_lvvit_desk"]
    add("--model", nargs="+", default=names, choices=list(SIZES), metavar="NAME",
        help="students to time, each against its teacher (default: the five published)")  # fmt: skip
    add("--protocol", default="ours", choices=("ours", "levit", "both"), help="how to time (default: ours)")
    add("--training", action="store_true", help="time training steps instead: share of the teacher and of RTSM")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N (default: auto)")
    add("--batch-size", type=positive_int, metavar="N",
        help="images per pass (default: 256 on a GPU, 1 on a CPU; LeViT's protocol: 1024 and 16)")  # fmt: skip
    add("--dtype", default="float32", choices=list(DTYPES), help="precision of the networks (default: float32)")
    add("--compile", action="store_true", help="compile the networks with torch.compile")
    add("--warmup", type=positive_int, default=2, metavar="N", help="untimed rounds (default: 2)")
    add("--rounds", type=positive_int, default=10, metavar="N", help="timed rounds (default: 10)")
    add("--limit-s", type=positive_float, default=None, metavar="S", help="seconds for each pair (default: no limit)")
    add("--levit-warmup-s", type=positive_float, default=10.0, metavar="S", help="LeViT's warm-up (default: 10)")
    add("--levit-seconds", type=positive_float, default=60.0, metavar="S", help="LeViT's measurement (default: 60)")
    add("--processor-time", action="store_true",
        help="count what this process computed, on one thread: for a CPU that other work disturbs")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="write a record file for python -m common.results add")
    args = parser.parse_args(argv)
    if args.processor_time and choose_device(args.device).type != "cpu":
        parser.error("--processor-time: a GPU's work does not count as processor time; it goes with --device cpu")
    if args.output and args.protocol != "ours":
        parser.error("--output records our protocol only")
    return args


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

    Source: LeViT, arXiv:2104.01136, the protocol that SiT's README names; throughput of the traced network.
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


def run_levit(name: str, args: argparse.Namespace, device: torch.device) -> float:
    """Print LeViT's line for teacher and student; returns the ratio."""
    models = pair(name, device, torch.float32)
    batch = args.batch_size or LEVIT_BATCH[device.type]
    size = models["student"].img_size
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device, generator=generator)
    speed = {}
    for role, model in models.items():
        speed[role] = measure_levit(model, images, warmup_s=args.levit_warmup_s, seconds=args.levit_seconds)
        how = "traced, autocast float16" if device.type == "cuda" else "traced, float32, 1 thread, processor time"
        print(f"{name} {role} {device} {speed[role]:.2f} images/s @ batch size {batch} ({how})", flush=True)
    return speed["student"] / speed["teacher"]


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def run_pair(name: str, args: argparse.Namespace, device: torch.device, clock: Clock) -> dict[str, PairedSpeed]:
    """Time teacher and student in turns."""
    models = pair(name, device, DTYPES[args.dtype])
    batch = args.batch_size or {"cuda": 256, "cpu": 1}[device.type]
    images = random_images(batch, models["student"].img_size, device, DTYPES[args.dtype])
    networks = {role: torch.compile(model) if args.compile else model for role, model in models.items()}
    speeds = compare(
        networks,  # pyright: ignore[reportArgumentType] - a compiled module is a module
        images,
        baseline="teacher",
        warmup=args.warmup,
        rounds=args.rounds,
        limit_s=args.limit_s,
        progress=name,
        clock=clock,
    )
    cost = {role: gmacs(model.count_ops()) for role, model in models.items()}
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


def published_row(name: str) -> Row:
    """The row of the table of students that a size belongs to.

    Raises:
        BenchmarkError: if it is no published size.
    """
    for table in load_tables("sit", root=ROOT):
        for row in table.rows:
            if row.dense and parse_flags(shlex.split(row.arguments)).model == name:
                return row
    raise BenchmarkError(f"{name} has no published row, so --output cannot record it")


def record_of(name: str, speeds: dict[str, PairedSpeed]) -> results.Record:
    """What a pair measured, as a record."""
    row = published_row(name)
    student, teacher = speeds["student"], speeds["teacher"].speed
    column = "fps" if student.speed.batch_size == 1 else "throughput_ips"
    return results.Record(
        paper="sit", table=row.table, row=row.id, column=column, value=student.speed.throughput_ips,
        reference_row=row.dense, reference_value=teacher.throughput_ips, ratio=student.speedup,
        dtype=student.speed.dtype, batch_size=student.speed.batch_size,
        resolution=int(SIZES[name].get("img_size", 224)), compiled=student.speed.compiled,
        rounds=student.speed.rounds, spread_percent=student.speed.spread_percent,
        peak_memory_mb=student.speed.peak_memory_mb,
    )  # fmt: skip


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
    images = random_images(batch, teacher.img_size, device)
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


def run_training(name: str, args: argparse.Namespace, device: torch.device, clock: Clock) -> dict[str, float]:
    """Print the shares of a training step."""
    batch = args.batch_size or {"cuda": 64, "cpu": 2}[device.type]
    found = measure_training(name, device, batch=batch, rounds=args.rounds, clock=clock, limit_s=args.limit_s)
    shares = {key: 100 * found[key] / found["step"] for key in ("plain", "teacher", "recovery")}
    print(
        f"{name}: {found['step']:.1f} ms per training step of {batch} images: student {shares['plain']:.0f} %, "
        f"teacher {shares['teacher']:.0f} %, reverse modules and their losses {shares['recovery']:.0f} %",
        flush=True,
    )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Time what the flags name; returns the speed-up of each student, or of each training step its milliseconds."""
    args = parse_args(argv)
    device = choose_device(args.device)
    clock = time.process_time if args.processor_time else time.perf_counter
    if args.processor_time:
        torch.set_num_threads(1)
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}")
    answers: dict[str, float] = {}
    records: list[results.Record] = []
    for name in args.model:
        if args.training:
            answers[name] = run_training(name, args, device, clock)["step"]
            continue
        if args.protocol in ("ours", "both"):
            speeds = run_pair(name, args, device, clock)
            answers[name] = speeds["student"].speedup
            if args.output:
                records.append(record_of(name, speeds))
        if args.protocol in ("levit", "both"):
            answers[name] = run_levit(name, args, device)
            print(f"{name}: {answers[name]:.2f}x by LeViT's protocol", flush=True)
    if args.output:
        described = describe_device(device)
        if args.processor_time:  # as common/ledger/gpu.py describes it
            described |= {"threads": 1, "timing": "processor time, 1 thread"}
        words = ["FILE" if word == str(args.output) else word for word in (sys.argv[1:] if argv is None else argv)]
        command = shlex.join(["python", "sit/speed_test.py", *words])
        part = f"speed-batch{records[0].batch_size}-{args.dtype}"
        origin = results.Origin(results.now(), results.current_commit(ROOT), described, command, part=part)
        results.write_records(args.output, records, origin)
        print(f"written to {args.output}")
    print("  ".join(f"{name} {answer:.2f}{'' if args.training else 'x'}" for name, answer in answers.items()))
    return answers


if __name__ == "__main__":
    try:
        main()
    except (BenchmarkError, LaunchError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
