"""What early exit really saves: measured speed-up over the full cascade beside the one that the costs promise.

    python dvt/benchmark.py --model DVT_T2t_vit_12 -b 64 128 --p 5 20 40
    python dvt/benchmark.py --model DVT_Deit_small -b 64 --p 20 --device cuda --compile

Needs no data: weights and images are random, and thresholds are found on the images themselves, so that the shares
of the published budget p leave at each exit. Full cascade and early exit take turns, round by round. With trained
weights and real images, see ``inference.py --dynamic``.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.run import cli
from common.run.files import check_output, write_atomic
from common.run.flags import Group
from common.run.program import run
from dvt import BUDGETS
from dvt.arguments import budget_row
from dvt.models import CASCADES, MODELS, create_model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, prog="benchmark.py")
    add = Group(parser, "measurement")
    add("--model", CASCADES, "DVT_T2t_vit_12", "cascade to time")
    add("-b --batch-size", cli.positive_int, [64], "images per batch", nargs="+", metavar="N")
    add("--p", budget_row, [5, 20, 40], f"published budgets, 1 to {BUDGETS}: shares of the exits form a geometric "
        "series with ratio P / 20", nargs="+", metavar="P")  # fmt: skip
    add("--img-size", cli.positive_int, None, "side of the images in pixels (default: the model's)")
    add("--rounds", cli.positive_int, 5, "timed passes of each, in turns")
    add("--warmup", cli.count, 1, "untimed passes of each")
    add("--device", str, "auto", "auto (CUDA where there is one), cpu, cuda or cuda:N")
    add("--dtype", ("float32", "bfloat16", "float16"), "float32", "precision")
    add("--compile", bool, False, "compile the full cascade and every exit")
    add("--processor-time", bool, False, "count this process's seconds on the processor, all threads together, instead "
        "of those of the clock on the wall: for a machine that does other things meanwhile (CPU only)")  # fmt: skip
    add("--seed", int, 0, "of the random weights")
    add("--output", Path, None, "write the numbers as JSON", metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Time one model at every batch size; returns all rows."""
    args = parse_args(argv)
    check_output(args.output)
    import torch

    from common.measure.benchmark import choose_clock, random_images
    from common.run.launch import choose_device
    from dvt.costs import exit_gflops
    from dvt.exits import confidence_and_prediction, exit_shares, find_thresholds
    from dvt.inference import described
    from dvt.models.cascade import Cascade
    from dvt.throughput import FULL, measure_dynamic

    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    clock = choose_clock(args.processor_time, device, one_thread=False)
    torch.manual_seed(args.seed)
    size = args.img_size or MODELS[args.model].img_size
    cascade = create_model(args.model, img_size=size).to(device=device, dtype=dtype).eval()
    assert isinstance(cascade, Cascade)
    costs = exit_gflops(cascade)
    rows: list[dict[str, Any]] = []
    for batch in args.batch_size:
        images = random_images(batch, size, device, dtype)
        with torch.no_grad():
            confidence = torch.stack([confidence_and_prediction(logits)[0] for logits in cascade(images)])  # (K, B)
        timed = measure_dynamic(
            cascade, {f"p = {p}": find_thresholds(confidence, exit_shares(p / 20)) for p in args.p},
            [(images, torch.zeros(batch, dtype=torch.int64))] * args.rounds, costs, device=device,
            compiled=args.compile, warmup=args.warmup, clock=clock,
        )  # fmt: skip
        for result in timed:
            row = {"batch_size": batch, **asdict(result), "name": "full" if result.name == FULL else result.name}
            row["left"] = [round(share * batch / 100) for share in result.exit_percent]
            del row["top1_percent"], row["thresholds"]  # of random weights: no numbers to keep
            rows.append(row)
            print(
                f"{args.model}  batch {batch}  {row['name']:7}  leave {'/'.join(map(str, row['left']))}  "
                f"{row['gmacs']:.3f} GMACs  {row['throughput_ips']:.1f} img/s  speed-up {row['speedup']:.3f}  "
                f"promised {row['flops_ratio']:.3f}  realised {row['realised']:.3f}",
                flush=True,
            )
    if args.output:
        record = {name: getattr(args, name) for name in ("model", "dtype", "processor_time", "rounds")}
        record |= {"compiled": args.compile, **described(device), "rows": rows}
        write_atomic(args.output, json.dumps(record, indent=1) + "\n")
    print(f"realised {min(row['realised'] for row in rows):.3f}")
    return rows


if __name__ == "__main__":
    run(main, expected=(RuntimeError, ValueError))
