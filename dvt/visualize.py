"""Figures of DVT: curves of accuracy against cost and speed, and pictures that leave early and late.

    python dvt/visualize.py curves DVT_T2t_vit_12.pth.tar dynamic.json --output curves
    python dvt/visualize.py pictures --model DVT_T2t_vit_12 --checkpoint_path DVT_T2t_vit_12.pth.tar \\
        --data_url DIR --p 20 --classes n01819313 n02782093 --output pictures

``curves`` draws budgeted batch classification from packed checkpoints, and what ``inference.py --dynamic --output``
measured, against GFLOPs and, where it was measured, against throughput. ``pictures`` lists the exit and confidence of
every validation picture (exits.csv), and draws three easy and three hard ones of each class: easy ones are answered
rightly by the first exit, hard ones reach the last. The selection behind the published figure is not stated; here the
easy ones are those the first exit is surest of, the hard ones those it is least sure of.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from common.data.loaders import DataError, build_dataset, default_num_classes
from common.ledger.plots import Figure, Series, draw
from common.run import cli
from common.run.checkpoint import CheckpointError
from common.run.errors import LaunchError
from common.run.files import write_atomic
from common.run.launch import choose_device
from dvt.checkpoints import load_weights, read, read_packed
from dvt.evaluation import PICTURES, Scores, collect_scores, held_out_loader
from dvt.exits import BUDGETS, first_exit
from dvt.models import MODELS, Cascade, create_model

ROWS = 3
"""Easy, and hard, pictures of a class."""

SIDE, GAP, TITLE = 160, 8, 26
"""Pixels of a picture, between two, and of a line of text."""

PAPER, INK = (255, 255, 255), (24, 24, 27)
EDGE = {"easy": (34, 160, 107), "hard": (208, 69, 76)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="accuracy against GFLOPs and throughput")
    curves.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="packed checkpoints, or results of inference.py --dynamic"
    )
    curves.add_argument("--title", default="Budgeted batch classification", help="above the figure")
    pictures = commands.add_parser("pictures", help="pictures that leave early and late")
    add = pictures.add_argument
    cascades = [name for name, entry in MODELS.items() if entry.stages]
    add("--model", default="DVT_T2t_vit_12", choices=cascades, help="cascade")
    add("--checkpoint_path", "--checkpoint-path", required=True, metavar="FILE", help="packed checkpoint")
    add("--data_url", "--data-url", default="", metavar="DIR", help="folder that holds val/; the digits need none")
    add("--dataset", default="imagenet", metavar="NAME", help="imagenet, cifar10, cifar100, digits, ...")
    add("--pictures", default=None, choices=PICTURES, help="transforms of the network's training (by the data set)")
    add("--num-classes", type=cli.positive_int, default=None, help="classes (default: the data set's)")
    add("--img-size", type=cli.positive_int, default=None, metavar="PIXELS", help="side of the pictures (the model's)")
    add("--feature-reuse", action=cli.Switch, default=True, help="the cascade was trained with it")
    add("--relation-reuse", action=cli.Switch, default=True, help="the cascade was trained with it")
    add("--p", type=cli.positive_int, default=20, help="row of the stored thresholds, 1 to 59")
    add("--classes", nargs="+", default=None, metavar="NAME", help="class folders to draw (default: the first four)")
    add("--batch_size", "--batch-size", type=cli.positive_int, default=64, help="pictures at once")
    add("--workers", type=cli.count, default=8, help="loading processes")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    for command in (curves, pictures):
        command.add_argument(
            "--output", type=Path, default=Path("output/dvt"), metavar="DIR", help="folder to write to"
        )
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Curves


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
    stored = read_packed(read(path), ["budgeted_batch_classification"], source=path, why="a curve")
    assert stored.curve is not None
    costs, accuracies = stored.curve
    return costs, accuracies, []


def curve_figures(files: Sequence[Path], title: str) -> list[Figure]:
    """Accuracy against cost and, if any file has it, against throughput."""
    by_cost: list[Series] = []
    by_speed: list[Series] = []
    for path in files:
        costs, accuracies, speeds = read_curve(path)
        name = path.name.split(".")[0]
        blank = [""] * len(costs)
        by_cost.append(Series(name, costs, accuracies, blank))
        if speeds:
            by_speed.append(Series(name, speeds, accuracies, blank))
    drawn = [Figure("dvt-gflops", title, "mean GFLOPs per picture", "top-1 (%)", {"": by_cost})]
    if by_speed:
        drawn.append(Figure("dvt-throughput", title, "pictures per second", "top-1 (%)", {"": by_speed}))
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def choose_pictures(
    exits: Tensor, scores: Scores, targets: Sequence[int], label: int, count: int = ROWS
) -> tuple[list[int], list[int]]:
    """Numbers of the easy and of the hard pictures of a class; fewer where there are not as many.

    Args:
        exits: exit that answers each picture, (n,).
        scores: of all exits.
        targets: class of each picture.
    """
    last = len(scores.confidence) - 1
    sure = scores.confidence[0].tolist()
    own = [i for i, target in enumerate(targets) if target == label]
    easy = sorted((i for i in own if exits[i] == 0 and scores.correct[0, i]), key=lambda i: (-sure[i], i))
    hard = sorted((i for i in own if exits[i] == last), key=lambda i: (sure[i], i))
    return easy[:count], hard[:count]


def draw_grid(columns: Sequence[tuple[str, str, Sequence[Image.Image]]]) -> Image.Image:
    """Columns of pictures, each under two lines of text and with a rim in the colour of the second.

    Args:
        columns: class name, ``easy`` or ``hard``, pictures.
    """
    width = GAP + len(columns) * (SIDE + GAP)
    sheet = Image.new("RGB", (width, 2 * TITLE + GAP + ROWS * (SIDE + GAP)), PAPER)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, (name, kind, pictures) in enumerate(columns):
        x = GAP + number * (SIDE + GAP)
        if number % 2 == 0:
            canvas.text((x, GAP // 2), name, INK, font)
        canvas.text((x, TITLE), kind, EDGE[kind], font)
        for row, picture in enumerate(pictures):
            y = 2 * TITLE + GAP // 2 + row * (SIDE + GAP)
            rim = 3
            fitted = ImageOps.fit(picture.convert("RGB"), (SIDE - 2 * rim, SIDE - 2 * rim), Image.Resampling.BICUBIC)
            sheet.paste(ImageOps.expand(fitted, rim, EDGE[kind]), (x, y))
    return sheet


def run_pictures(args: argparse.Namespace) -> list[Path]:
    """List the exits of all pictures and draw the grid."""
    device = choose_device(args.device)
    size = args.img_size or MODELS[args.model].options.get("img_size", 224)
    content = read(args.checkpoint_path)
    stored = read_packed(content, ["dynamic_threshold"], source=args.checkpoint_path, why="choosing pictures")
    assert stored.thresholds is not None
    if args.p > len(stored.thresholds):
        raise ValueError(f"--p {args.p}: the checkpoint has thresholds of {len(stored.thresholds)} budgets")
    root = args.data_url or None
    raw = build_dataset(args.dataset, None if args.dataset == "digits" else root, "val", None)
    classes = list(getattr(raw, "classes", ()))
    names = args.classes or classes[:4]
    if unknown := [name for name in names if name not in classes]:
        raise ValueError(f"--classes {' '.join(unknown)}: the data set has no such class; it begins with {classes[:8]}")
    model = create_model(
        args.model, num_classes=args.num_classes or default_num_classes(args.dataset), img_size=size,
        feature_reuse=args.feature_reuse, relation_reuse=args.relation_reuse,
    )  # fmt: skip
    assert isinstance(model, Cascade)
    load_weights(model, content, source=args.checkpoint_path).to(device)
    loader = held_out_loader(
        args.dataset, root, size=size, batch_size=args.batch_size, workers=args.workers, pictures=args.pictures
    )
    scores = collect_scores(model, loader, device=device, title="validation pictures")
    exits = first_exit(scores.confidence, stored.thresholds[args.p - 1])
    targets = targets_of(raw)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["picture", "class", "exit", "confidence", "correct"])
    for i, k in enumerate(exits.tolist()):
        row = (file_of(raw, i), classes[targets[i]], k + 1)
        writer.writerow([*row, f"{scores.confidence[k, i]:.6f}", int(scores.correct[k, i])])
    files = [args.output / "exits.csv", args.output / "pictures.png"]
    write_atomic(files[0], table.getvalue())
    columns: list[tuple[str, str, list[Image.Image]]] = []
    for name in names:
        chosen = choose_pictures(exits, scores, targets, classes.index(name))
        for kind, numbers in zip(("easy", "hard"), chosen, strict=True):
            if len(numbers) < ROWS:
                print(f"{name}: only {len(numbers)} {kind} pictures at p = {args.p}", file=sys.stderr)
            columns.append((name, kind, [raw[i][0] for i in numbers]))
    stream = io.BytesIO()
    draw_grid(columns).save(stream, "PNG")
    write_atomic(files[1], stream.getvalue())
    shares = torch.bincount(exits, minlength=len(scores.confidence)).double() * 100 / len(exits)
    print("leave at each exit (%): " + " ".join(f"{share:.2f}" for share in shares.tolist()))
    return files


def targets_of(dataset: Any) -> list[int]:
    """Class of every picture, from what the data set knows without opening pictures where it can."""
    targets = getattr(dataset, "targets", None)
    return list(targets) if targets is not None else [int(dataset[i][1]) for i in range(len(dataset))]


def file_of(dataset: Any, index: int) -> str:
    """File of a picture, or its number where pictures are not files."""
    samples = getattr(dataset, "samples", None)
    return str(samples[index][0]) if samples is not None else str(index)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw; returns the files written."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.command == "curves":
        files = []
        for figure in curve_figures(args.files, args.title):
            path = args.output / f"{figure.key}.png"
            write_atomic(path, draw(figure, "png")[0])
            files.append(path)
    else:
        if not 1 <= args.p <= BUDGETS:
            raise ValueError(f"--p must be from 1 to {BUDGETS}, got {args.p}")
        files = run_pictures(args)
    for path in files:
        print(f"written to {path}")
    return files


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError, LaunchError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
