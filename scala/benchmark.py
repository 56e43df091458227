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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.run import cli
from common.run.files import check_output, write_atomic
from common.run.flags import Settings, add_flags, count, flag, positive_int
from common.run.program import run
from scala.arguments import DEFAULT_MODEL

if TYPE_CHECKING:
    import torch

    from common.measure.benchmark import Clock


@dataclass(frozen=True)
class SpeedSettings(Settings):
    """What is measured."""

    model: str = flag(DEFAULT_MODEL, "a DeiT of this package", metavar="NAME")
    ratios: Sequence[float] = flag([0.25, 0.5, 0.75, 1.0], "widths to measure", own=(), type=float, nargs="+",
                                   metavar="R")  # fmt: skip
    batch_size: int = flag(32, "images per pass", "-b", type=positive_int)
    rounds: int = flag(20, "timed passes of each network", type=positive_int)
    warmup: int = flag(3, "passes before them", type=count)
    dtype: str = flag("float32", "of weights and images", choices=("float32", "bfloat16", "float16"))
    compile: bool = flag(False, "run all three through torch.compile")
    device: str = flag("auto", "auto (CUDA if there is one), cpu, cuda, or cuda:N")
    processor_time: bool = flag(False, "on the CPU: count the time that one thread computes, not that which passes")
    output: str = flag("", "also write the measurements as JSON", metavar="FILE")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_flags(parser, "measurement", SpeedSettings)
    return parser.parse_args(argv)


def measure(settings: SpeedSettings, ratio: float, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Speeds of the three networks at one width, and the ratios of their times."""
    import torch

    from common.measure.benchmark import compare, random_images
    from scala.engine_scala import AtRatio
    from scala.models_scala import create
    from scala.standalone import describe, standalone_state

    torch.manual_seed(0)
    full, dtype = create(settings.model).eval(), getattr(torch, settings.dtype)
    standalone = describe(full, ratio)
    networks: dict[str, Any] = {
        "timm": standalone.build_timm(),
        "stand-alone": standalone.load(standalone_state(full, ratio)),
        "in place": AtRatio(full, ratio),
    }
    networks = {form: network.eval().to(device, dtype) for form, network in networks.items()}
    if settings.compile:
        networks = {form: torch.compile(network) for form, network in networks.items()}
    images = random_images(settings.batch_size, standalone.input_size, device, dtype)
    against = partial(compare, networks, images, rounds=settings.rounds, warmup=settings.warmup, clock=clock)
    # once against each: the median of the ratios of single rounds is not the ratio of the medians
    with torch.no_grad():
        over_timm, over_alone = against(baseline="timm"), against(baseline="stand-alone")
    return {
        "ratio": ratio,
        "width": full.embed_dim * ratio,
        "speeds": {form: asdict(result.speed) for form, result in over_timm.items()},
        "stand-alone / timm": 1 / over_timm["stand-alone"].speedup,
        "in place / stand-alone": 1 / over_alone["in place"].speedup,
        "spread_percent": over_alone["in place"].speedup_spread_percent,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    settings = SpeedSettings.of(parse_args(argv))
    check_output(settings.output)
    from common.measure.benchmark import choose_clock, describe_device
    from common.run.launch import choose_device

    device = choose_device(settings.device)
    clock = choose_clock(settings.processor_time, device)
    rows = [measure(settings, ratio, device, clock) for ratio in settings.ratios]
    described = describe_device(device) | {"timing": "processor time" if settings.processor_time else "elapsed time"}
    print(
        f"{settings.model}, batch {settings.batch_size}, {settings.dtype}, {described['name']}, torch "
        f"{described['torch']}, {described['threads']} thread(s), {described['timing']}, {settings.rounds} rounds"
    )
    print("| ratio | timm (ms) | stand-alone / timm | in place / stand-alone |\n| --: | --: | --: | --: |")
    for row in rows:
        print(
            f"| {row['ratio']:g} | {row['speeds']['timm']['latency_ms']:.1f} | {row['stand-alone / timm']:.3f} | "
            f"{row['in place / stand-alone']:.3f} |"
        )
    if settings.output:
        content = {"arguments": asdict(settings), "device": described, "rows": rows}
        write_atomic(Path(settings.output), json.dumps(content, indent=1) + "\n")
    print(f"{max(row['in place / stand-alone'] for row in rows):.3f}")
    return rows


if __name__ == "__main__":
    run(main)
