"""Which channels each width uses, or what each width of a trained network attends to and predicts.

    python scala/visualize.py --output docs/plots/scala-channels.png
    python scala/visualize.py --embed-dim 768 --granularity 0.0625 --output channels.png
    python scala/visualize.py --checkpoint log/digits/checkpoint.pth --output widths.png

Without a checkpoint nothing is trained or measured: a bar per width is what ``slicing.SliceRule`` cuts of a layer and
of its fused projection; channels that a width shares with the smallest are dark. With a checkpoint of a plain ViT
trained on digits: held-out digits inside scikit-learn, the first ones and the first on which widths disagree, with the
attention of the class token in the last block (mean over heads) and the predicted digit; and how often widths agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.run import cli
from common.run.errors import UsageError
from common.run.files import check_files, check_output, replacing
from common.run.program import run
from scala.arguments import add_width_args
from scala.slicing import WidthGrid, make_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from scala.loading import Trained

COLOURS = {"smallest": "#c44e52", "other": "#4c72b0", "shared": "#2a2a2a", "right": "#2a7a2a", "wrong": "#c44e52"}
SHOWN = 4
"""Images of each of the two kinds."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add_width_args(parser, {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.125})
    add("--embed-dim", type=cli.positive_int, default=384, metavar="D", help="width (default: 384)")
    add("--checkpoint", default="", metavar="FILE",
        help="of main_scala.py: draw what its widths see, instead of channels (default: none)")  # fmt: skip
    add("--output", required=True, metavar="FILE", help="image to write, .png or .svg")
    args = parser.parse_args(argv)
    if not args.output.endswith((".png", ".svg")):
        parser.error(f"--output {args.output}: expected a file that ends in .png or .svg")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Channels


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
    both: Any = figure.subplots(1, 2, sharey=True)
    for axes, (title, parts) in zip(both, panels, strict=True):
        for row, (first, count, shared) in enumerate(spans(grid, parts * embed_dim, parts)):
            axes.barh(row, count, left=first, color=COLOURS["other" if row else "smallest"], height=0.7)
            axes.barh(row, shared if row else 0, left=first, color=COLOURS["shared"], height=0.7)
        axes.set(title=title, xlim=(0, parts * embed_dim), xticks=[part * embed_dim for part in range(parts + 1)])
        axes.title.set_fontsize(9)
    both[-1].set_yticks(range(len(grid.ratios)), [f"r = {ratio:g}" for ratio in grid.ratios])
    both[-1].tick_params(labelleft=False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# What a trained network does


def look(model: Any, images: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Predicted classes (B,), and the attention of the class token over the patches, (B, rows, columns)."""
    import torch

    attention = model.blocks[-1].attn
    seen: list[Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda _, __, result: seen.append(result))
    with torch.no_grad():
        predicted = model(images, ratio).argmax(dim=1)
    hook.remove()
    q, k, _ = seen[0].unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d/H)
    scores = (q[:, :, :1] @ k.transpose(2, 3) * attention.scale).softmax(dim=-1).mean(dim=1)  # (B, 1, N)
    return predicted, scores[:, 0, 1:].unflatten(1, model.patch_embed.grid_size)


def draw_widths(trained: Trained, source: str) -> Figure:
    """The figure: images, a row per width, and the agreement of the widths.

    Raises:
        UsageError: a network that is no plain ViT for the ten digits, or one whose widths are not known.
    """
    import torch
    from matplotlib.figure import Figure

    from common.data.build import open_split
    from common.data.transforms import eval_transform
    from common.run.settings import DataSettings
    from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala

    model, ratios = trained.model, trained.ratios
    plain = isinstance(model, VisionTransformer_scala) and not isinstance(model, DistilledVisionTransformer_scala)
    if not plain or model.num_classes != 10 or not ratios:
        raise UsageError(f"--checkpoint {source}: expected a plain ViT trained on digits at several widths")
    data = DataSettings(data_set="digits", data_path="", input_size=trained.input_size, batch_size=1)
    held_out: Any = open_split(data, "val", eval_transform(data.input_size))
    images = torch.stack([held_out[index][0] for index in range(len(held_out))])
    labels = torch.tensor([held_out[index][1] for index in range(len(held_out))])
    predicted, maps = map(torch.stack, zip(*(look(model, images, ratio) for ratio in ratios), strict=True))
    torn = (predicted != predicted[0]).any(dim=0).nonzero().flatten()
    columns = [*range(SHOWN), *(int(index) for index in torn if index >= SHOWN)][: 2 * SHOWN]

    figure = Figure(figsize=(11, 0.9 + 1.05 * len(ratios)), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    left, right = panels
    left.suptitle("attention of the class token, and the predicted digit", fontsize=9)
    for row, (axes, ratio) in enumerate(
        zip(left.subplots(len(ratios), len(columns), squeeze=False), ratios, strict=True)
    ):
        axes[0].set_ylabel(f"r = {ratio:g}", fontsize=8)
        for cell, index in zip(axes, columns, strict=True):
            grey = images[index].mean(dim=0)
            extent = (0, grey.shape[1], grey.shape[0], 0)
            cell.imshow(grey, cmap="gray", extent=extent)
            cell.imshow(maps[row, index], cmap="inferno", alpha=0.55, extent=extent, interpolation="nearest")
            right_one = predicted[row, index] == labels[index]
            cell.set_title(int(predicted[row, index]), fontsize=8, color=COLOURS["right" if right_one else "wrong"])
            cell.set(xticks=[], yticks=[])
    agreement = 100 * (predicted[:, None] == predicted[None]).double().mean(dim=2)
    agreement.fill_diagonal_(0)
    agreement += torch.diag(100 * (predicted == labels).double().mean(dim=1))
    axes = right.subplots()
    axes.imshow(agreement, cmap="Blues", vmin=0, vmax=130)
    names = [f"{ratio:g}" for ratio in ratios]
    axes.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(names)), yticklabels=names)
    axes.set_title(f"same prediction (%), {len(labels)} digits;\non the diagonal: top-1 (%)", fontsize=9)
    for row, values in enumerate(agreement.tolist()):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                      weight="bold" if row == column else "normal")  # fmt: skip
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    args = parse_args(argv)
    check_files(args.checkpoint)
    check_output(args.output, inputs=[args.checkpoint])
    if args.checkpoint:
        from common.run.checkpoint import read_checkpoint
        from scala.loading import load_trained

        figure = draw_widths(load_trained(read_checkpoint(args.checkpoint), args.checkpoint), args.checkpoint)
    else:
        figure = draw(make_grid(args.smallest_ratio, args.largest_ratio, args.granularity), args.embed_dim)
    path = Path(args.output)
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix.removeprefix(".") or None)
    print(path)
    return path


if __name__ == "__main__":
    run(main)
