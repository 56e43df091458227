"""Figures of DVT: curves of accuracy against cost and speed, and images that leave early and late.

    python dvt/visualize.py curves DVT_T2t_vit_12.pth.tar dynamic.json --output curves
    python dvt/visualize.py images --model DVT_T2t_vit_12 --checkpoint_path DVT_T2t_vit_12.pth.tar \\
        --data_url DIR --p 20 --classes n01819313 n02782093 --output images

``curves`` draws budgeted batch classification from packed checkpoints, and what ``inference.py --dynamic --output``
measured, against GFLOPs and, where it was measured, against throughput. ``images`` lists the exit and confidence of
every validation image (exits.csv), draws the first images that leave at each exit under its token grid (exits.png), and
three easy and three hard ones of each class (images.png): easy ones are answered rightly by the first exit, hard ones
reach the last. The selection behind the published figure is not stated; here the easy ones are those the first exit is
surest of, the hard ones those it is least sure of.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.run import cli
from common.run.errors import UsageError
from common.run.files import write_atomic
from common.run.program import get_logger, run
from dvt.arguments import add_image_args, add_network_args, budget_row, check_paths
from dvt.models import CASCADES, MODELS

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, prog="visualize.py")
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="accuracy against GFLOPs and throughput")
    curves.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="packed checkpoints, or results of inference.py --dynamic"
    )
    curves.add_argument("--title", default="Budgeted batch classification", help="above the figure")
    images = commands.add_parser("images", aliases=["pictures"], help="images that leave early and late")
    add = images.add_argument
    add("--checkpoint_path", "--checkpoint-path", required=True, metavar="FILE", help="packed checkpoint")
    add("--data_url", "--data-url", default="", metavar="DIR", help="folder that holds val/; the digits need none")
    add("--p", type=budget_row, default=20, help="row of the stored thresholds, 1 to 59")
    add("--classes", nargs="+", default=None, metavar="NAME", help="class folders to draw (default: the first four)")
    add_network_args(images, CASCADES)
    add_image_args(images)
    for command in (curves, images):
        command.add_argument(
            "--output", type=Path, default=Path("output/dvt"), metavar="DIR", help="folder to write to"
        )
    return parser.parse_args(argv)


def read_curve(path: Path) -> tuple[list[float], list[float], list[float]]:
    """Costs in GFLOPs, accuracies in percent and, where measured, throughputs of a file; in rising cost.

    Raises:
        ValueError, CheckpointError: if the file is neither kind.
    """
    if path.suffix == ".json":
        try:
            rows = [
                (row["gmacs"], row["top1_percent"], row["throughput_ips"])
                for row in json.loads(path.read_text())["rows"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected what inference.py --dynamic --output writes: {error!r}") from error
        costs, accuracies, speeds = (list(values) for values in zip(*sorted(rows), strict=True))
        return costs, accuracies, speeds
    from common.run.checkpoint import read_checkpoint
    from dvt.loading import read_packed

    stored = read_packed(read_checkpoint(path), ["budgeted_batch_classification"], source=path, why="a curve")
    assert stored.curve is not None
    return stored.curve[0], stored.curve[1], []


def draw_curves(files: Sequence[Path], title: str) -> dict[str, bytes]:
    """Accuracy against cost and, if any file has it, against throughput: figures by file name."""
    from common.ledger.plots import Figure, Series, draw

    by_cost: list[Series] = []
    by_speed: list[Series] = []
    for path in files:
        costs, accuracies, speeds = read_curve(path)
        name, blank = path.name.split(".")[0], [""] * len(costs)
        by_cost.append(Series(name, costs, accuracies, blank))
        if speeds:
            by_speed.append(Series(name, speeds, accuracies, blank))
    drawn = [Figure("dvt-gflops", title, "mean GFLOPs per image", "top-1 (%)", {"": by_cost})]
    if by_speed:
        drawn.append(Figure("dvt-throughput", title, "images per second", "top-1 (%)", {"": by_speed}))
    return {f"{figure.key}.png": draw(figure, "png")[0] for figure in drawn}


def draw_exits(args: argparse.Namespace) -> dict[str, str | bytes]:
    """The list of exits, and both sheets of images, by file name."""
    from common.data.loaders import build_dataset, default_num_classes
    from common.run.checkpoint import read_checkpoint
    from common.run.launch import choose_device
    from dvt import drawing
    from dvt.evaluation import ImageSource, collect_scores
    from dvt.exits import first_exit
    from dvt.loading import load_network, read_packed
    from dvt.models.cascade import Cascade

    device, size = choose_device(args.device), args.img_size or MODELS[args.model].img_size
    content = read_checkpoint(args.checkpoint_path)
    stored = read_packed(content, ["dynamic_threshold"], source=args.checkpoint_path, why="choosing images")
    assert stored.thresholds is not None
    if args.p > len(stored.thresholds):
        raise UsageError(f"--p {args.p}: the checkpoint has thresholds of {len(stored.thresholds)} budgets")
    root = args.data_url or None
    raw: Any = build_dataset(args.dataset, None if args.dataset == "digits" else root, "val", None)
    classes = list(getattr(raw, "classes", ()))
    names = args.classes or classes[:4]
    if unknown := [name for name in names if name not in classes]:
        raise UsageError(f"--classes {' '.join(unknown)}: the data set has no such class; it begins with {classes[:8]}")
    model = load_network(
        args.model, content, source=args.checkpoint_path, device=device, img_size=size,
        num_classes=args.num_classes or default_num_classes(args.dataset), feature_reuse=args.feature_reuse,
        relation_reuse=args.relation_reuse,
    )  # fmt: skip
    images = ImageSource(args.dataset, root, size, args.batch_size, args.workers, args.transforms)
    scores = collect_scores(model, images.held_out(), device=device, title="validation images")
    exits = first_exit(scores.confidence, stored.thresholds[args.p - 1])
    known = getattr(raw, "targets", None)  # without opening the images, where the data set can
    targets = list(known) if known is not None else [int(raw[i][1]) for i in range(len(raw))]
    columns = []
    for name in names:
        chosen = drawing.choose_images(exits, scores, targets, classes.index(name))
        for kind, colour, numbers in zip(("easy", "hard"), (drawing.EASY, drawing.HARD), chosen, strict=True):
            if len(numbers) < drawing.ROWS:
                logger.warning("%s: only %d %s images at p = %d", name, len(numbers), kind, args.p)
            title = name if kind == "easy" else ""
            columns.append(drawing.Column(title, kind, colour, [raw[i][0] for i in numbers]))
    shares = [100 * int((exits == k).sum()) / len(exits) for k in range(len(scores.confidence))]
    print("leave at each exit (%): " + " ".join(f"{share:.2f}" for share in shares))
    assert isinstance(model, Cascade)
    by_exit = drawing.exit_columns(raw, exits, scores, [stage.grid for stage in model.stages])
    return {
        "exits.csv": drawing.exit_table(raw, targets, exits, scores),
        "images.png": drawing.png_of(drawing.draw_sheet(columns)),
        "exits.png": drawing.png_of(drawing.draw_sheet(by_exit, side=drawing.SMALL)),
    }


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw; returns the files written."""
    args = parse_args(argv)
    if args.command == "curves":
        check_paths(map(str, args.files))
        drawn = draw_curves(args.files, args.title)
    else:
        check_paths([args.checkpoint_path], dataset=args.dataset, root=args.data_url)
        drawn = draw_exits(args)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in drawn.items():
        write_atomic(args.output / name, content)
        print(f"written to {args.output / name}")
    return [args.output / name for name in drawn]


if __name__ == "__main__":
    run(main, expected=(OSError, ValueError))
