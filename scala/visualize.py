"""Which channels each width uses: a bar per width over the channels of a layer and the rows of its fused projection.

    python scala/visualize.py --output docs/plots/scala-channels.png
    python scala/visualize.py --embed-dim 768 --granularity 0.0625 --output channels.png

Every bar is what ``slicing.SliceRule`` cuts; nothing is trained or measured. The smallest width takes the leading
channels and all between it and the largest the trailing ones; channels that a width shares with the smallest are dark.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.run import cli
from common.run.program import run
from scala.arguments import add_width_args
from scala.slicing import WidthGrid, make_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"smallest": "#c44e52", "other": "#4c72b0", "shared": "#2a2a2a"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_width_args(parser, {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.125})
    parser.add_argument("--embed-dim", type=cli.positive_int, default=384, metavar="D", help="width (default: 384)")
    parser.add_argument("--output", required=True, metavar="FILE", help="image to write, .png or .svg")
    return parser.parse_args(argv)


def spans(grid: WidthGrid, full: int, parts: int) -> list[tuple[int, int, int]]:
    """Of each width, ascending: first channel, how many, and how many of them the smallest width uses, too."""
    start, size = grid.rule.span(full, grid.smallest, parts)
    found = []
    for ratio in grid.ratios:
        first, count = grid.rule.span(full, ratio, parts)
        found.append((first, count, max(0, min(start + size, first + count) - max(start, first))))
    return found


def draw(grid: WidthGrid, embed_dim: int) -> Figure:
    """The figure; widths from the smallest at the bottom to the largest on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.28 * len(grid.ratios)), layout="constrained")
    panels = (("channels of tokens, norms and heads", 1), ("rows of the fused query, key, value projection", 3))
    for axes, (title, parts) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for row, (first, count, shared) in enumerate(spans(grid, parts * embed_dim, parts)):
            axes.barh(row, count, left=first, color=COLOURS["other" if row else "smallest"], height=0.7)
            axes.barh(row, shared if row else 0, left=first, color=COLOURS["shared"], height=0.7)
        axes.set(title=title, xlim=(0, parts * embed_dim), xticks=[part * embed_dim for part in range(parts + 1)])
        axes.title.set_fontsize(9)
    axes.set_yticks(range(len(grid.ratios)), [f"r = {ratio:g}" for ratio in grid.ratios])
    axes.tick_params(labelleft=False)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    args = parse_args(argv)
    figure = draw(make_grid(args.smallest_ratio, args.largest_ratio, args.granularity), args.embed_dim)
    figure.savefig(args.output, dpi=110)
    print(args.output)
    return Path(args.output)


if __name__ == "__main__":
    run(main)
