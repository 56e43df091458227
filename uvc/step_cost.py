"""What the primal-dual step costs: its share of a training step's time, and the memory it needs.

    python uvc/step_cost.py --model_type deit_small_patch16_224 --batch 64

A training step is teacher and student forward, backward, clipping and AdamW, on random pictures. Both are timed in turn
in the same rounds, so that a machine that slows down slows both; the shares are medians. Memory is the peak of what is
allocated while each runs, on top of what was there.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.measure.benchmark import device_name, synchronize
from common.run import cli
from common.run.distributed import World, choose_device, run
from common.run.engine import Optimization, autocast
from uvc.data import build_mix
from uvc.engine import JointSettings, JointTraining
from uvc.loading import default_image_size, freeze_idle
from uvc.losses import objective
from uvc.models import create
from uvc.models.gates import register_masks
from uvc.schedules import warmup_factor
from uvc.uvc_optimizer import PrimalDual, PrimalDualSettings


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model_type", default="deit_tiny_patch16_224", metavar="NAME", help="architecture")
    parser.add_argument("--batch", type=cli.positive_int, default=64, help="pictures per step (default: 64)")
    parser.add_argument("--rounds", type=cli.positive_int, default=10, help="timed rounds (default: 10)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--amp", type=cli.amp_mode, default="none", help="mixed precision: none, fp16 or bf16 (default: none)"
    )
    return parser.parse_args(argv)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Peak of memory allocated while ``function`` runs, in bytes on top of what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure_step(
    model_type: str, *, batch: int, rounds: int, device: torch.device, amp: str = "none"
) -> dict[str, Any]:
    """Times in milliseconds, share in percent and memory in MiB of a training step and of the primal-dual step.

    Args:
        model_type: a name of ``uvc.models``, with random weights.
        batch: pictures. rounds: timed rounds after two untimed ones.
        device, amp: where and how precisely.
    """
    model = register_masks(create(model_type)).to(device).train()
    freeze_idle(model)
    teacher = create(model_type).to(device).eval().requires_grad_(False)
    teacher.fix_blocks((True,) * len(teacher.blocks))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    state = PrimalDual(model, PrimalDualSettings(slr=1.0, rlr=1.0, gating_interval=50))
    model.gates.block_gating = True
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_factor("constant", warmup_steps=0, total_steps=1))
    training = JointTraining(
        model, model, optimizer=optimizer, scheduler=scheduler, primal_dual=state,
        criterion=objective(teacher, kind="soft", alpha=0.1), settings=JointSettings(warmup_epochs=0),
        mix=build_mix(
            model.num_classes, mixup=0, cutmix=0, cutmix_minmax=None, prob=0, switch_prob=0, mode="batch",
            smoothing=0.1,
        ),
    )  # fmt: skip
    size = default_image_size(model_type)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(0, model.num_classes, (batch,), device=device)
    optimization = Optimization(optimizer, clip_grad=1.0)

    def train() -> None:
        optimization.zero_grad()
        with autocast(amp, device):
            training.step((images, targets), optimization)
        optimization.step()

    def timed(function: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return 1000 * (time.perf_counter() - start)

    pairs = [(timed(train), timed(lambda: state.step(1e-4))) for _ in range(rounds + 2)][2:]
    return {
        "train_ms": statistics.median(pair[0] for pair in pairs),
        "primal_dual_ms": statistics.median(pair[1] for pair in pairs),
        "share_percent": statistics.median(100 * dual / (loss + dual) for loss, dual in pairs),
        "train_peak_mib": peak_bytes(train, device) / 2**20,
        "primal_dual_peak_mib": peak_bytes(lambda: state.step(1e-4), device) / 2**20,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    args = parse_args(argv)
    world = World(0, 1, 0, choose_device(args.device), None)
    values = measure_step(
        args.model_type, batch=args.batch, rounds=args.rounds, device=world.device, amp=args.amp
    )  # fmt: skip
    print(f"{args.model_type}, batch {args.batch}, {args.amp}, {device_name(world.device)}, torch {torch.__version__}")
    print(f"training step   {values['train_ms']:9.1f} ms  {values['train_peak_mib']:9.1f} MiB")
    print(f"primal-dual step {values['primal_dual_ms']:8.1f} ms  {values['primal_dual_peak_mib']:9.1f} MiB")
    print(f"share of the primal-dual step {values['share_percent']:.2f} %")
    return values


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(ValueError,))
