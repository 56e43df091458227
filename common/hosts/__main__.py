"""What token methods cost and keep on a network of timm, beside the network itself and beside smaller images.

    python -m common.hosts vit_small_patch14_dinov2 --img-size 448 --weights FILE --images DIR --output DIR \\
        --methods tome:r=16 "hourglass:layer=6,clusters=(16,16)" "hourglass:layer=3+evit:layers=(6,9)"

A method is a name and its settings; a plus sign joins several in one network, and a bar lists values that are tried,
"tome:r=4|8|12". Every method stands beside the dense network at a smaller image size of about the same cost: what does
not beat that is not worth having. Cosines are of the features restored to the full grid, and of the class feature, with
those of the dense network. A budget names the settings within it that keep most.
"""

import argparse
import ast
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.run.flags import make_parser, positive_float, positive_int
from common.run.program import run


@dataclass(frozen=True)
class Wanted:
    """Methods of one network: what was typed, and each name with its settings."""

    text: str
    methods: Sequence[tuple[str, Mapping[str, Any]]]


def methods(text: str) -> list[Wanted]:
    """``name:key=value,key=value``, several joined by ``+``; values as Python writes them, words without quotes.

    Values with a bar between them are alternatives, of which all combinations are meant.
    """
    choices = [piece.split("|") for piece in re.split(r"([,+](?![^(\[]*[)\]]))", text)]
    choices = [[choice[0], *(f"{choice[0].partition('=')[0]}={value}" for value in choice[1:])] for choice in choices]
    return [_one("".join(pieces)) for pieces in itertools.product(*choices)]


def _one(text: str) -> Wanted:
    found = []
    for part in re.split(r"\+(?=[a-z_]+(?:[:+]|$))", text):
        name, _, rest = part.partition(":")
        settings: dict[str, Any] = {}
        for setting in filter(None, re.split(r",(?![^(\[]*[)\]])", rest)):
            key, equals, value = setting.partition("=")
            if not equals or not key.strip():
                raise argparse.ArgumentTypeError(f"expected name:key=value,..., got {setting!r} in {text!r}")
            try:
                word = value.strip()
                settings[key.strip()] = ast.literal_eval(word.capitalize() if word in ("true", "false") else word)
            except (ValueError, SyntaxError):
                settings[key.strip()] = value.strip()
        found.append((name, settings))
    return Wanted(text, found)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog="python -m common.hosts")
    parser.add_argument("name", help="a network of timm, such as vit_small_patch14_reg4_dinov2")
    parser.add_argument(
        "--methods", nargs="+", type=methods, required=True, metavar="METHOD", help="name:key=value,... of each"
    )
    parser.add_argument("--images", type=Path, required=True, help="an image, or a folder of them")
    parser.add_argument("--img-size", type=positive_int, help="pixels of a side (default: the network's own)")
    parser.add_argument("--weights", type=Path, help="checkpoint; without one the weights are random")
    parser.add_argument("--data", type=Path, help="folder of ImageNet, or class folders: top-1 as well")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images at a time (default: 8)")
    parser.add_argument("--rounds", type=positive_int, default=10, help="timed passes of each network (default: 10)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget-gmacs", type=positive_float, help="name the best network that costs no more")
    budget.add_argument("--budget-ms", type=positive_float, help="the same for milliseconds per image of a batch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--output", type=Path, help="folder for trade.json and a PNG of the tokens of every image")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Any:
    """Measure, print the table, write the files."""
    args = parse_args(argv)
    from common.hosts.trade import Trade, best_within, image_files, open_network
    from common.run.launch import choose_device

    files = image_files(args.images)
    net = open_network(args.name, args.img_size, args.weights).to(choose_device(args.device))
    wanted = list(itertools.chain.from_iterable(args.methods))
    trade = Trade(net, wanted, files, batch_size=args.batch_size)
    rows = trade.measure(rounds=args.rounds, data=args.data)
    if not args.weights:
        print(
            "The weights are random: costs and speeds hold, cosines and accuracies say nothing about a trained network."
        )
    print(trade.table(rows))
    if args.budget_gmacs or args.budget_ms:
        print(best_within(rows, gmacs=args.budget_gmacs, ms=args.budget_ms))
    if args.output:
        trade.write(rows, args.output)
    return rows


if __name__ == "__main__":
    run(main)
