"""Speed of a width: inside the full network, as a model of its own, and as timm's model built at that width.

    python scala/benchmark.py --model deit_small_distilled_patch16_224_scala --ratios 0.25 0.5 0.75 1.0
    python scala/benchmark.py --device cpu --processor-time --batch-size 4 --output slices.json

Three networks take turns round by round (common.measure): *timm*, its own class built at width r D with random
weights; *stand-alone*, what export.py writes, loaded into timm's class; *in place*, the slice inside the full network.
Ratios are of times in the same rounds: 1 is as fast, 1.05 takes 5 % longer. --output writes everything as JSON.
The last line printed is the largest ratio of in place over stand-alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.run import cli
from common.run.errors import UsageError
from common.run.files import write_atomic
from common.run.program import run

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
BASELINES = ("timm", "stand-alone")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="deit_small_distilled_patch16_224_scala", metavar="NAME",
        help="a DeiT of this package (default: deit_small_distilled_patch16_224_scala)")  # fmt: skip
    add("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], metavar="R",
        help="widths to measure (default: 0.25 0.5 0.75 1.0)")  # fmt: skip
    add("--batch-size", "-b", type=cli.positive_int, default=32, help="images per pass (default: 32)")
    add("--rounds", type=cli.positive_int, default=20, help="timed passes of each network (default: 20)")
    add("--warmup", type=cli.count, default=3, help="passes before them (default: 3)")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and images (default: float32)")
    add("--compile", action=cli.Switch, default=False, help="run all three through torch.compile (default: off)")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, or cuda:N (default: auto)")
    add("--processor-time", action=cli.Switch, default=False,
        help="on the CPU: count the time that one thread computes, not that which passes (default: off)")  # fmt: skip
    add("--output", default="", metavar="FILE", help="also write the measurements as JSON")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def measure(
    name: str,
    ratio: float,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_size: int,
    compiled: bool,
    rounds: int,
    warmup: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Speeds of the three networks at one width, and the ratios of their times."""
    import torch

    from common.measure.benchmark import compare, random_images
    from scala.engine_scala import AtRatio
    from scala.models_scala import create
    from scala.standalone import describe, standalone_state

    torch.manual_seed(0)
    full = create(name).eval()
    standalone = describe(full, ratio)
    networks: dict[str, Any] = {
        "timm": standalone.build_timm(),
        "stand-alone": standalone.load(standalone_state(full, ratio)),
        "in place": AtRatio(full, ratio),
    }
    networks = {form: network.eval().to(device, dtype) for form, network in networks.items()}
    if compiled:
        networks = {form: torch.compile(network) for form, network in networks.items()}
    images = random_images(batch_size, standalone.input_size, device, dtype)
    # once against each: the median of the ratios of single rounds is not the ratio of the medians
    with torch.no_grad():
        paired = {
            baseline: compare(networks, images, baseline=baseline, rounds=rounds, warmup=warmup, clock=clock)
            for baseline in BASELINES
        }
    in_place = paired["stand-alone"]["in place"]
    return {
        "ratio": ratio,
        "width": full.embed_dim * ratio,
        "speeds": {form: asdict(result.speed) for form, result in paired["timm"].items()},
        "stand-alone / timm": 1 / paired["timm"]["stand-alone"].speedup,
        "in place / stand-alone": 1 / in_place.speedup,
        "spread_percent": in_place.speedup_spread_percent,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse_args(argv)
    import torch

    from common.measure.benchmark import NotEnoughMemory, describe_device
    from common.run.launch import choose_device

    device = choose_device(args.device)
    if args.processor_time:
        if device.type != "cpu":
            raise UsageError("--processor-time goes with --device cpu: a GPU's work does not count as processor time")
        torch.set_num_threads(1)
    try:
        rows = [
            measure(
                args.model, ratio, device, getattr(torch, args.dtype), batch_size=args.batch_size,
                compiled=args.compile, rounds=args.rounds, warmup=args.warmup,
                clock=time.process_time if args.processor_time else time.perf_counter,
            )
            for ratio in args.ratios
        ]  # fmt: skip
    except NotEnoughMemory as error:
        raise UsageError(str(error)) from error
    described = describe_device(device) | {"timing": "processor time" if args.processor_time else "elapsed time"}
    print(
        f"{args.model}, batch {args.batch_size}, {args.dtype}, {described['name']}, torch {described['torch']}, "
        f"{described['threads']} thread(s), {described['timing']}, {args.rounds} rounds"
    )
    print("| ratio | timm (ms) | stand-alone / timm | in place / stand-alone |\n| --: | --: | --: | --: |")
    for row in rows:
        print(
            f"| {row['ratio']:g} | {row['speeds']['timm']['latency_ms']:.1f} | {row['stand-alone / timm']:.3f} | "
            f"{row['in place / stand-alone']:.3f} |"
        )
    if args.output:
        content = {"arguments": vars(args), "device": described, "rows": rows}
        write_atomic(Path(args.output), json.dumps(content, indent=1) + "\n")
    print(f"{max(row['in place / stand-alone'] for row in rows):.3f}")
    return rows


if __name__ == "__main__":
    run(main)
