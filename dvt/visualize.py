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

from common.data.paths import check_data_path
from common.plots import Figure, Series, draw
from common.run import cli
from common.run.errors import UsageError
from common.run.files import check_files, check_output, write_atomic
from common.run.program import get_logger, run
from dvt.arguments import add_image_args, add_network_args, budget_row, network_options
from dvt.models import CASCADES, find_entry

logger = get_logger(__name__)

AXES = (("dvt-gflops", "mean GFLOPs per image"), ("dvt-throughput", "images per second"))
"""Name of a figure of curves -> label of its x axis."""


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
    add("--data_url", "--data-url", default="", metavar="DIR", help="folder with val/; digits, fashion need none")
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
    """Costs in GFLOPs, throughputs where they were measured, and accuracies in percent of a file.

    Raises:
        ValueError, CheckpointError: if the file is neither kind.
    """
    if path.suffix == ".json":
        try:
            rows = sorted(json.loads(path.read_text())["rows"], key=lambda row: row["gmacs"])
            return tuple([row[name] for row in rows] for name in ("gmacs", "throughput_ips", "top1_percent"))  # pyright: ignore[reportReturnType]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected what inference.py --dynamic --output writes: {error!r}") from error
    from common.run.checkpoint import read_checkpoint
    from dvt.loading import read_packed

    key = "budgeted_batch_classification"
    costs, accuracies = read_packed(read_checkpoint(path), [key], source=path, why="a curve")[key]
    return costs, [], accuracies


def draw_curves(files: Sequence[Path], title: str) -> dict[str, bytes]:
    """Accuracy against cost and, if any file has it, against throughput: figures by file name."""
    drawn: dict[str, bytes] = {}
    curves = {path.name.split(".")[0]: read_curve(path) for path in files}
    for column, (name, label) in enumerate(AXES):
        if lines := [Series(file, curve[column], curve[2]) for file, curve in curves.items() if curve[column]]:
            panels = {lines[0].name if len(lines) == 1 else "": lines}  # a single line has no legend
            (drawn[f"{name}.png"],) = draw(Figure(name, title, label, "top-1 (%)", panels), "png")
    return drawn


def draw_exits(args: argparse.Namespace) -> dict[str, str | bytes]:
    """The list of exits, and both sheets of images, by file name."""
    from common.run.checkpoint import read_checkpoint
    from common.run.launch import choose_device
    from dvt import drawing
    from dvt.evaluation import ImageSource, collect_scores
    from dvt.exits import first_exit
    from dvt.loading import load_network, read_packed
    from dvt.models.cascade import Cascade

    device, options = choose_device(args.device), network_options(args)
    content = read_checkpoint(args.checkpoint_path)
    key = "dynamic_threshold"
    exits = find_entry(args.model, args.grids).exits
    thresholds = read_packed(content, [key], source=args.checkpoint_path, why="choosing images", exits=exits)[key]
    if args.p > len(thresholds):
        raise UsageError(f"--p {args.p}: the checkpoint has thresholds of {len(thresholds)} budgets")
    images = ImageSource.of(args, root=args.data_url, size=options["img_size"])
    shown = drawing.RawImages(images.open("val", plain=True))
    names = args.classes or shown.classes[:4]
    if unknown := [name for name in names if name not in shown.classes]:
        raise UsageError(
            f"--classes {' '.join(unknown)}: the data set has no such class; it begins with {shown.classes[:8]}"
        )
    model = load_network(args.model, content, source=args.checkpoint_path, **options).to(device).eval()
    assert isinstance(model, Cascade)
    scores = collect_scores(model, images.held_out(), device=device, title="validation images")
    exits = first_exit(scores.confidence, thresholds[args.p - 1])
    columns = []
    for name in names:
        chosen = drawing.choose_images(exits, scores, shown.targets, shown.classes.index(name))
        for kind, colour, numbers in zip(("easy", "hard"), (drawing.EASY, drawing.HARD), chosen, strict=True):
            if len(numbers) < drawing.ROWS:
                logger.warning("%s: only %d %s images at p = %d", name, len(numbers), kind, args.p)
            columns.append(drawing.Column(name if kind == "easy" else "", kind, colour, shown.pick(numbers)))
    shares = [100 * int((exits == k).sum()) / len(exits) for k in range(len(scores.confidence))]
    print("leave at each exit (%): " + " ".join(f"{share:.2f}" for share in shares))
    by_exit = drawing.exit_columns(shown, exits, scores, [stage.grid for stage in model.stages])
    return {
        "exits.csv": drawing.exit_table(shown, exits, scores),
        "images.png": drawing.draw_sheet(columns),
        "exits.png": drawing.draw_sheet(by_exit, side=drawing.SMALL),
    }


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw; returns the files written."""
    args = parse_args(argv)
    check_output(args.output, folder=True)
    if args.command == "curves":
        check_files(*args.files)
        drawn = draw_curves(args.files, args.title)
    else:
        check_files(args.checkpoint_path)
        check_data_path(args.dataset, args.data_url)
        drawn = draw_exits(args)
    for name, content in drawn.items():
        write_atomic(args.output / name, content)
        print(f"written to {args.output / name}")
    return [args.output / name for name in drawn]


if __name__ == "__main__":
    run(main, expected=(OSError, ValueError))
