"""Costs and speed of any network of hubconf.py.

    python hourglass_swag/get_flops_fps.py -m hourglass_vit_l16_in1k -r 512 -b 256 -l 12 -n 529
    python hourglass_swag/get_flops_fps.py -m hourglass_vit_l16_in1k -r 512 -b 4 -l 8 -n 256 --against vit_l16_in1k
    python hourglass_swag/get_flops_fps.py -m vit_h14_in1k -r 518 --no-speed

Costs come first and need no weights, but for ATS with dropped tokens; "Flops" counts as the published tool does (a
multiply-accumulate is 1). Then passes are timed: the median, each pass synchronised, on image-like random images;
--paper follows the published tool instead. The last line is the throughput of the table; --fps also measures batch 1,
the table's FPS.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.run.files import check_output
from common.run.flags import make_parser
from common.run.program import run
from hourglass_swag.tools.parser import HelpFormatter, add_cost_network_args, add_model_args, parse_network

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hourglass_swag.tools.costs import Costs

DTYPES = ("float32", "bfloat16", "float16")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The published flags, and those beyond them."""
    parser = make_parser(__doc__, formatter_class=HelpFormatter)
    add_cost_network_args(parser)
    parser.add_argument("-b", "--batch-size", type=int, default=200, help="images per pass")
    add_model_args(parser)
    group = parser.add_argument_group("beyond the published tool")
    group.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    group.add_argument("--runs", type=int, default=50, help="passes, of which the first quarter is warm-up")
    group.add_argument(
        "--limit-s",
        type=float,
        default=600,
        help="seconds after which no further pass is started; those done so far count",
    )
    group.add_argument("--fps", action="store_true", help="measure batch 1 too")
    group.add_argument("--paper", action="store_true", help="the published protocol: uniform noise, mean, no limit")
    group.add_argument(
        "--against",
        metavar="OTHER",
        help="time another network in turns with this one: its name, or in quotes its name and method flags",
    )
    group.add_argument("--dtype", default="float32", choices=DTYPES, help="precision that networks are cast to")
    group.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    group.add_argument("--no-speed", action="store_true", help="costs only")
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of random weights and of the random projections of ACT and SMYRF in the timed passes",
    )
    group.add_argument("--weights", metavar="FILE", help="time with this checkpoint (default: random weights)")
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="time with the published weights, downloading them; cost and speed depend on them only where a method "
        "decides by what it sees (ATS)",
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write a record file for python -m common.results")
    args = parser.parse_args(argv)
    for flag, value in (("--batch-size", args.batch_size), ("--runs", args.runs), ("--resolution", args.resolution)):
        if value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")
    if args.paper and (args.against or args.dtype != "float32"):
        parser.error("--paper is one network in float32: it does not go with --against or --dtype")
    try:
        parse_networks(args)
    except ValueError as error:
        parser.error(f"--against: {error}")
    return args


def parse_networks(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Name -> flags of the network and, with --against, of the other.

    Raises:
        ValueError: if the other is not described well, or is the same.
    """
    networks = {args.model: args}
    if args.against:
        other = parse_network(f"-r {args.resolution} -m {args.against}")
        if other.resolution != args.resolution:
            raise ValueError(f"both networks see the same images, so -r {other.resolution} cannot differ from -r")
        networks[args.against if args.against != args.model else f"-m {args.against}"] = other
    return networks


def print_costs(costs: Costs, label: str) -> None:
    """Costs, the first line as the published tool prints it."""
    print(f"{label}Flops: {costs.gflops:.5g} G")
    if costs.counted_for is not None:
        print(f"{label}The cost depends on weights and image; counted for {costs.counted_for}")
    print(f"{label}MACs: {costs.gmacs:.5g} G (convolutions, linear layers and matrix products alone)")
    print(f"{label}Parameters: {costs.params_m:.5g} M")
    if costs.clustering_percent is not None:
        print(f"{label}Clustering: {costs.clustering_percent:.2f} % of the MACs")


def load(args: argparse.Namespace, network: argparse.Namespace, device: torch.device) -> nn.Module:
    """A network on the device, in the precision of --dtype."""
    import torch

    from hourglass_swag.tools.costs import build_network

    with torch.device("cpu" if args.weights or args.pretrained else device):
        model = build_network(network, pretrained=args.pretrained, weights=args.weights)
    return model.to(device=device, dtype=getattr(torch, args.dtype))


def main(args: argparse.Namespace) -> None:
    """Costs, then speed."""
    check_output(args.output, inputs=[args.weights])
    import torch

    from common.run.launch import choose_device
    from hourglass_swag.tools import speed
    from hourglass_swag.tools.costs import count_costs

    print(args)
    networks = parse_networks(args)
    costs = {
        name: count_costs(network, pretrained=args.pretrained, weights=args.weights)
        for name, network in networks.items()
    }
    for name, cost in costs.items():
        print_costs(cost, "" if name == args.model else f"{name}: ")
    if args.no_speed:
        return
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    print(speed.device_line(device, dtype, args.compile), flush=True)
    models = {name: load(args, network, device) for name, network in networks.items()}
    own, size, batch = models[args.model], args.resolution, args.batch_size
    if device.type == "cpu" and batch > 1:
        limit_s = None if args.paper else args.limit_s
        largest = models[max(costs, key=lambda name: costs[name].gflops)]
        speed.check_cpu(largest, size, batch, dtype, passes=args.runs * len(models), limit_s=limit_s)
    batches = {"fps": 1} if args.fps or batch == 1 else {}
    batches |= {"throughput_ips": batch} if batch > 1 else {}
    runnable = {name: torch.compile(model) for name, model in models.items()} if args.compile else models
    speeds = speed.measure_speeds(
        runnable,  # pyright: ignore[reportArgumentType] - a compiled module is a module
        size,
        batches,
        device,
        dtype,
        runs=args.runs,
        limit_s=args.limit_s,
        paper=args.paper,
    )
    if args.output:
        speed.write_speeds(args.output, speeds, networks, device, shlex.join(["python", *sys.argv]))
        print(f"Written to {args.output}")
    last = list(speeds.values())[-1][args.model].speed
    speed.print_clustering_share(own, size, device, dtype, last.batch_size if last.latency_ms < 5e3 else 1)
    speed.print_speeds(speeds, list(costs.values())[-1].gflops / costs[args.model].gflops)


if __name__ == "__main__":
    run(lambda: main(parse_args()), expected=(ValueError,))
