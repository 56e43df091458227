"""Images that leave a cascade early and late, as sheets.

Letters: K exits, n images.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from dvt.evaluation import Scores

ROWS = 3
"""Images in a column."""

SIDE, SMALL, GAP, TITLE, RIM = 160, 104, 8, 26, 3
"""Pixels of an image, of a small one, between two, of a line of text, and of the rim of an image."""

PAPER, INK = (255, 255, 255), (24, 24, 27)
EASY, HARD = (34, 160, 107), (208, 69, 76)
EXIT_COLOURS = (EASY, (217, 142, 4), HARD)


@dataclass(frozen=True)
class Column:
    """A column of a sheet."""

    title: str  # above it
    subtitle: str  # under the title, in ``colour``
    colour: tuple[int, int, int]  # of the rims, too
    images: Sequence[Image.Image]
    grid: tuple[int, int] | None = None  # rows and columns of tokens, drawn over every image


class RawImages:
    """The images of a data set as they are, with their classes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.classes: list[str] = list(getattr(dataset, "classes", ()))
        known = getattr(dataset, "targets", None)  # without opening the images, where the data set can
        self.targets: list[int] = list(known) if known is not None else [int(target) for _, target in dataset]

    def pick(self, numbers: Sequence[int]) -> list[Image.Image]:
        return [self.dataset[i][0] for i in numbers]


def draw_sheet(columns: Sequence[Column], *, side: int = SIDE) -> bytes:
    """Columns of images of ``side`` pixels side by side: a PNG file of few colours, which sheets are small in."""
    sheet = Image.new("RGB", (GAP + len(columns) * (side + GAP), 2 * TITLE + GAP + ROWS * (side + GAP)), PAPER)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    inner = side - 2 * RIM
    for number, column in enumerate(columns):
        left = GAP + number * (side + GAP)
        canvas.text((left, GAP // 2), column.title, INK, font)
        canvas.text((left, TITLE), column.subtitle, column.colour, font)
        for row, image in enumerate(column.images):
            top = 2 * TITLE + GAP // 2 + row * (side + GAP)
            fitted = ImageOps.fit(image.convert("RGB"), (inner, inner), Image.Resampling.BICUBIC)
            sheet.paste(ImageOps.expand(fitted, RIM, column.colour), (left, top))
            x, y, far = left + RIM, top + RIM, inner - 1
            rows, tokens = column.grid or (1, 1)
            for at in (round(line * inner / rows) for line in range(1, rows)):
                canvas.line([x, y + at, x + far, y + at], column.colour)
            for at in (round(line * inner / tokens) for line in range(1, tokens)):
                canvas.line([x + at, y, x + at, y + far], column.colour)
    stream = io.BytesIO()
    sheet.quantize(128).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def choose_images(
    exits: Tensor, scores: Scores, targets: Sequence[int], label: int, count: int = ROWS
) -> tuple[list[int], list[int]]:
    """Numbers of the easy and of the hard images of a class; fewer where there are not as many.

    ``exits`` and ``targets`` are the exit that answers each image, and its class.
    """
    last = len(scores.confidence) - 1
    sure = scores.confidence[0].tolist()
    own = [i for i, target in enumerate(targets) if target == label]
    easy = sorted((i for i in own if exits[i] == 0 and scores.correct[0, i]), key=lambda i: (-sure[i], i))
    hard = sorted((i for i in own if exits[i] == last), key=lambda i: (sure[i], i))
    return easy[:count], hard[:count]


def exit_columns(
    shown: RawImages, exits: Tensor, scores: Scores, grids: Sequence[tuple[int, int]], *, width: int = 3
) -> list[Column]:
    """``width`` columns for each exit: the first images that leave there, under its token grid."""
    columns: list[Column] = []
    for k, (rows, tokens) in enumerate(grids):
        own = (exits == k).nonzero().squeeze(1)
        right = 100 * scores.correct[k, own].double().mean().item() if len(own) else 0.0
        title = f"exit {k + 1}: {rows}x{tokens} tokens"
        share = f"{100 * len(own) / len(exits):.1f} % leave here, {right:.1f} % of them right"
        for number in range(width):
            chosen = shown.pick(own[number : width * ROWS : width].tolist())
            texts = ("", "") if number else (title, share)  # which reach over the columns beside
            columns.append(Column(*texts, EXIT_COLOURS[k % len(EXIT_COLOURS)], chosen, (rows, tokens)))
    return columns


def exit_table(shown: RawImages, exits: Tensor, scores: Scores) -> str:
    """CSV: file (or number), class, exit, confidence and correctness of every image."""
    samples = getattr(shown.dataset, "samples", None)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "exit", "confidence", "correct"])
    for i, k in enumerate(exits.tolist()):
        name = i if samples is None else samples[i][0]
        sure, right = scores.confidence[k, i], int(scores.correct[k, i])
        writer.writerow([name, shown.classes[shown.targets[i]], k + 1, f"{sure:.6f}", right])
    return text.getvalue()
