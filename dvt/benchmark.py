"""What early exit really saves: measured speed-up over the full cascade beside the one that the costs promise.

    python dvt/benchmark.py --model DVT_T2t_vit_12 -b 64 128 --p 5 20 40
    python dvt/benchmark.py --model DVT_Deit_small -b 64 --p 20 --device cuda --compile

Needs no data: weights and pictures are random, and thresholds are found on the pictures themselves, so that the shares
of the published budget p leave at each exit. Full cascade and early exit take turns, round by round. With trained
weights and real pictures, see ``inference.py --dynamic``.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.ledger.results import current_commit, now
from common.measure.benchmark import compare, describe_device, random_images
from common.run.cli import count, positive_int
from common.run.errors import LaunchError
from common.run.files import write_atomic
from common.run.launch import choose_device
from dvt.dynamic import DynamicClassifier, DynamicOutput
from dvt.evaluation import cascade_gflops
from dvt.exits import BUDGETS, NOBODY, confidence_and_prediction, exit_shares, find_thresholds
from dvt.models import MODELS, Cascade, create_model

CASCADES = [name for name, entry in MODELS.items() if entry.stages]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DVT_T2t_vit_12", choices=CASCADES, help="cascade to time")
    parser.add_argument(
        "-b", "--batch-size", type=positive_int, nargs="+", default=[64], metavar="N", help="pictures per batch"
    )
    parser.add_argument(
        "--p",
        type=int,
        nargs="+",
        default=[5, 20, 40],
        metavar="P",
        help=f"published budgets, 1 to {BUDGETS}: shares of the exits form a geometric series with ratio P / 20",
    )
    parser.add_argument("--img-size", type=positive_int, help="side of the pictures in pixels (default: the model's)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="timed passes of each, in turns")
    parser.add_argument("--warmup", type=count, default=1, help="untimed passes of each")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="precision")
    parser.add_argument("--compile", action="store_true", help="compile the full cascade and every exit")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count this process's seconds on the processor, all threads together, instead of those of the clock on "
        "the wall: for a machine that does other things meanwhile (CPU only)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args(argv)
    if not all(1 <= p <= BUDGETS for p in args.p):
        parser.error(f"--p must be from 1 to {BUDGETS}, got {args.p}")
    return args


@torch.no_grad()
def confidences(cascade: Cascade, images: Tensor) -> Tensor:
    """Confidence of every exit, (K, B)."""
    return torch.stack([confidence_and_prediction(logits)[0] for logits in cascade(images)])


class Under(nn.Module):
    """A classifier under thresholds of its own, as a module that can be timed; what it compiled is shared."""

    def __init__(self, classifier: DynamicClassifier, thresholds: Tensor) -> None:
        super().__init__()
        self.classifier, self.thresholds = classifier, thresholds

    def forward(self, images: Tensor) -> DynamicOutput:
        self.classifier.set_thresholds(self.thresholds)
        return self.classifier(images)


def time_exits(
    cascade: Cascade,
    images: Tensor,
    thresholds: dict[str, Tensor],
    costs: Sequence[float],
    *,
    rounds: int,
    warmup: int = 1,
    compiled: bool = False,
    progress: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Early exit against the full cascade on one batch, in turns.

    Args:
        cascade: in evaluation mode, on the device of ``images``.
        images: (B, 3, size, size).
        thresholds: (K,) each, by name.
        costs: cumulative GMACs of the exits.

    Returns:
        A row per name, the full cascade first: ``left`` (pictures per exit), ``gmacs`` (mean), ``throughput_ips``,
        ``speedup`` (median of the ratios of single rounds), ``flops_ratio`` and ``realised`` (the former over it).
    """
    classifier = DynamicClassifier(cascade, [NOBODY] * len(costs), compiled=compiled)
    if compiled:
        classifier.warm_up(images)
    full = Under(classifier, torch.tensor(classifier.thresholds)) if compiled else cascade
    models: dict[str, nn.Module] = {
        "full": full,
        **{name: Under(classifier, rows) for name, rows in thresholds.items()},
    }
    speeds = compare(models, images, baseline="full", rounds=rounds, warmup=warmup, progress=progress, clock=clock)
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        left = [0] * (len(costs) - 1) + [len(images)]
        if isinstance(model, Under):
            left = torch.bincount(model(images).exits, minlength=len(costs)).tolist()
        mean = sum(number * cost for number, cost in zip(left, costs, strict=True)) / len(images)
        speed = speeds[name]
        rows.append(
            {
                "name": name,
                "left": left,
                "gmacs": mean,
                "throughput_ips": speed.speed.throughput_ips,
                "speedup": speed.speedup,
                "spread_percent": speed.speedup_spread_percent,
                "flops_ratio": costs[-1] / mean,
                "realised": speed.speedup * mean / costs[-1],
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Time one model at every batch size; returns all rows."""
    args = parse_args(argv)
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    if args.processor_time and device.type != "cpu":
        raise ValueError(f"--processor-time measures a CPU, not {device}: give --device cpu")
    torch.manual_seed(args.seed)
    cascade = create_model(args.model, **({"img_size": args.img_size} if args.img_size else {}))
    assert isinstance(cascade, Cascade)
    cascade = cascade.to(device=device, dtype=dtype).eval()
    costs = cascade_gflops(cascade)
    size = args.img_size or MODELS[args.model].options.get("img_size", 224)
    rows: list[dict[str, Any]] = []
    for batch in args.batch_size:
        images = random_images(batch, size, device, dtype)
        found = confidences(cascade, images)
        thresholds = {f"p = {p}": find_thresholds(found, exit_shares(p / 20)) for p in args.p}
        label = f"batch {batch}"
        timed = time_exits(
            cascade, images, thresholds, costs,
            rounds=args.rounds, warmup=args.warmup, compiled=args.compile, progress=label,
            clock=time.process_time if args.processor_time else time.perf_counter,
        )  # fmt: skip
        rows += [{"batch_size": batch, **row} for row in timed]
        for row in timed:
            print(
                f"{args.model}  {label}  {row['name']:7}  leave {'/'.join(map(str, row['left']))}  "
                f"{row['gmacs']:.3f} GMACs  {row['throughput_ips']:.1f} img/s  speed-up {row['speedup']:.3f}  "
                f"promised {row['flops_ratio']:.3f}  realised {row['realised']:.3f}",
                flush=True,
            )
    if args.output:
        record = {
            "model": args.model,
            "dtype": args.dtype,
            "compiled": args.compile,
            "processor_time": args.processor_time,
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "device": describe_device(device),
            "commit": current_commit(),
            "created": now(),
            "rows": rows,
        }
        write_atomic(args.output, json.dumps(record, indent=1) + "\n")
    print(f"realised {min(row['realised'] for row in rows):.3f}")
    return rows


if __name__ == "__main__":
    try:
        main()
    except (LaunchError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
