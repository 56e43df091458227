"""What the primal-dual step costs: its share of a training step's time, and the memory it needs.

    python uvc/step_cost.py --model_type deit_small_patch16_224 --batch 64

A training step is teacher and student forward, backward, clipping and AdamW, on random images. Both are timed in turn
in the same rounds, so that a machine that slows down slows both; the shares are medians. Memory is the peak of what is
allocated while each runs, on top of what was there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common.run import cli
from common.run.program import run

if TYPE_CHECKING:
    import torch


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model_type", default="deit_tiny_patch16_224", metavar="NAME", help="architecture")
    add("--batch", type=cli.positive_int, default=64, help="images per step (default: 64)")
    add("--rounds", type=cli.positive_int, default=10, help="timed rounds (default: 10)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--amp", type=cli.amp_mode, default="none", help="mixed precision: none, fp16 or bf16 (default: none)")
    return parser.parse_args(argv)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Peak of memory allocated while ``function`` runs, in bytes on top of what was allocated before."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
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


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Measure and print times in milliseconds, the share in percent, and memory in MiB; returns them."""
    args = parse_args(argv)
    import torch

    from common.measure.benchmark import device_name, synchronize
    from common.run.engine import Optimization
    from common.run.launch import choose_device
    from common.run.precision import autocast
    from common.run.settings import AugmentationSettings
    from uvc.data import build_mix
    from uvc.engine import FineTuning
    from uvc.loading import freeze_idle
    from uvc.losses import objective
    from uvc.models import create
    from uvc.models.gates import register_masks
    from uvc.settings import PrimalDualSettings
    from uvc.uvc_optimizer import PrimalDual

    device = choose_device(args.device)
    model = register_masks(create(args.model_type)).to(device).train()
    freeze_idle(model)
    model.gates.block_gating = True
    teacher = create(args.model_type).to(device).eval().requires_grad_(False)
    teacher.fix_blocks((True,) * len(teacher.blocks))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    optimization = Optimization(optimizer, clip_grad=1.0)
    state = PrimalDual(model, PrimalDualSettings(slr=1.0, rlr=1.0, gating_interval=50))
    mix = build_mix(AugmentationSettings(mixup=0, cutmix=0), model.num_classes)
    training = FineTuning(model=model, criterion=objective(teacher, kind="soft", alpha=0.1), mix=mix)
    images = torch.randn(args.batch, 3, *model.image_size, device=device)
    targets = torch.randint(0, model.num_classes, (args.batch,), device=device)

    def train() -> None:
        optimization.zero_grad()
        with autocast(args.amp, device):
            training.step((images, targets), optimization)
        optimization.step()

    def update() -> None:
        state.step(1e-4)

    def timed(function: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return 1000 * (time.perf_counter() - start)

    pairs = [(timed(train), timed(update)) for _ in range(args.rounds + 2)][2:]
    values = {
        "train_ms": statistics.median(pair[0] for pair in pairs),
        "primal_dual_ms": statistics.median(pair[1] for pair in pairs),
        "share_percent": statistics.median(100 * dual / (loss + dual) for loss, dual in pairs),
        "train_peak_mib": peak_bytes(train, device) / 2**20,
        "primal_dual_peak_mib": peak_bytes(update, device) / 2**20,
    }
    print(f"{args.model_type}, batch {args.batch}, {args.amp}, {device_name(device)}, torch {torch.__version__}")
    print(f"training step   {values['train_ms']:9.1f} ms  {values['train_peak_mib']:9.1f} MiB")
    print(f"primal-dual step {values['primal_dual_ms']:8.1f} ms  {values['primal_dual_peak_mib']:9.1f} MiB")
    print(f"share of the primal-dual step {values['share_percent']:.2f} %")
    return values


if __name__ == "__main__":
    run(main)
