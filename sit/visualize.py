"""Which input tokens each slimmed token mixes: the weights of the slimming modules over the image, one PNG each.

    python sit/visualize.py --model sit_lvvit_small --weights checkpoint.pth photo.jpg

A row per slimming module. First what all its tokens together take from each patch (1 is an equal share), then single
tokens, chosen to be as different as possible. From the second module on the weights are multiplied back through the
modules before, so that every map is over the patches of the image; what attention mixes in between is not in them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from common.data.loaders import DataError, eval_transform, load_picture
from common.run.checkpoint import CheckpointError
from common.run.cli import make_parser, positive_int
from sit.loading import load_for_evaluation, read_weights
from sit.models import SIZES, LVViT, TokenSlimmingModule
from sit.models.lvvit import build_lvvit

PANEL = 168  # pixels of a map's side, at least
MARGIN, GAP, LINE = 20, 10, 22
PAPER, INK, FAINT = (255, 255, 255), (24, 24, 27), (96, 96, 104)
IMAGE_SHARE = 0.35  # how much of the grey image shines through a map


class SlimmedStage(NamedTuple):
    """One slimming module on one image; ``weights`` (M, N) are over the patches of the image."""

    block: int
    entering: int
    weights: Tensor

    @property
    def taken(self) -> Tensor:
        """What all tokens together take from each patch, (N,); 1 is an equal share."""
        return self.weights.mean(0) * self.weights.shape[1]


@torch.no_grad()
def trace_mixing(model: LVViT, images: Tensor) -> list[SlimmedStage]:
    """The mixing weights of every slimming module for one image (1, 3, height, width), in order.

    Raises:
        ValueError: if the network does not slim.
    """
    if not model.slimmed:
        raise ValueError("this network does not slim its tokens; give a slimmed one (--distillation-type frd)")
    seen: list[Tensor] = []

    def remember(module: torch.nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, TokenSlimmingModule)
        seen.append(module.mixing_weights(inputs[0])[0].float().cpu())

    handles = [module.register_forward_hook(remember) for module in model.tsm]
    try:
        model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    stages, total = [], None
    for block, weights in zip(model.slim_index, seen, strict=True):
        total = weights if total is None else weights @ total
        stages.append(SlimmedStage(block, weights.shape[1], total))
    return stages


def choose_different(weights: Tensor, number: int) -> list[int]:
    """Rows of (M, N) that are far apart: the most concentrated, then always the one farthest from those chosen."""
    chosen = [int(weights.square().sum(1).argmax())]
    while len(chosen) < min(number, len(weights)):
        distance = torch.cdist(weights, weights[chosen], p=1).amin(1)
        chosen.append(int(distance.argmax()))
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_map(image: Image.Image, values: Tensor, top: float) -> Image.Image:
    """A map over an image's patches in colour, the image shining through in grey.

    Args:
        image: square.
        values: (N,), N a square number.
        top: the value that is brightest.
    """
    grid = math.isqrt(len(values))
    shown = Image.fromarray((values / max(top, 1e-12)).clamp(0, 1).reshape(grid, grid).numpy())
    smooth = np.asarray(shown.resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colour = colormaps["inferno"](smooth)[..., :3]
    grey = np.asarray(image.convert("L"))[..., None] / 255.0
    mixed = (1 - IMAGE_SHARE) * colour + IMAGE_SHARE * grey
    return Image.fromarray(np.uint8(np.rint(255 * mixed)))


def draw_sheet(image: Image.Image, stages: Sequence[SlimmedStage], tokens: int, title: str) -> Image.Image:
    """The image, and a row of maps for every stage.

    Args:
        image: square, as the network sees it.
        tokens: single tokens per row.
    """
    grid = math.isqrt(stages[0].weights.shape[1])
    side = grid * max(1, round(PANEL / grid))
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    columns = 2 + max(min(tokens, len(stage.weights)) for stage in stages)
    step = side + GAP
    row_height = side + 2 * LINE + GAP
    note = "Bright: a large share. Each map of a token is scaled to its own largest weight, which stands below it."
    title_font, font = ImageFont.load_default(20), ImageFont.load_default(14)
    width = max(2 * MARGIN + columns * step - GAP, 2 * MARGIN + math.ceil(font.getlength(note)))
    head = MARGIN + 30 + LINE + GAP
    sheet = Image.new("RGB", (width, head + len(stages) * row_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    draw.text((MARGIN, MARGIN + 30), note, FAINT, font)
    for index, stage in enumerate(stages):
        y = head + index * row_height
        largest = stage.taken.max().item()
        panels = [
            (small, f"after block {stage.block}", f"{stage.entering} to {len(stage.weights)} tokens"),
            (draw_map(small, stage.taken, largest), "all tokens", f"up to {largest:.1f} equal shares"),
        ]
        for token in choose_different(stage.weights, tokens):
            weights = stage.weights[token]
            panels.append(
                (draw_map(small, weights, weights.max().item()), f"token {token}", f"up to {weights.max():.2f}")
            )
        for column, (panel, label, caption) in enumerate(panels):
            x = MARGIN + column * step
            sheet.paste(panel, (x, y))
            draw.text((x, y + side + 3), label, INK, font)
            draw.text((x, y + side + 3 + LINE - 4), caption, FAINT, font)
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# The program


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Images and network."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="images, in any format Pillow reads")
    add("--model", default="sit_lvvit_tiny", choices=list(SIZES), metavar="NAME", help=f"one of {', '.join(SIZES)}")
    add("--weights", metavar="FILE", help="a trained student, stripped or not; without it the weights are random")
    add("--num-classes", type=positive_int, default=1000, metavar="K", help="classes of the file (default: 1000)")
    add("--keeping-ratio", type=float, metavar="R", help="of the file, if it is not the model's own")
    add("--input-size", type=positive_int, metavar="PIXELS", help="side of the image (default: the model's)")
    add("--tokens", type=positive_int, default=6, metavar="N", help="single tokens in each row (default: 6)")
    add("--output", type=Path, default=Path("output/visualize"), metavar="DIR", help="folder to write to")
    return parser.parse_args(argv)


def build_network(args: argparse.Namespace) -> LVViT:
    """The slimmed network of the flags, on the CPU, where one image takes less than a second."""
    options = {"keeping_ratio": args.keeping_ratio, "img_size": args.input_size}
    options = {name: value for name, value in options.items() if value is not None}
    model = build_lvvit(
        args.model, num_classes=args.num_classes, distillation_type="frd", logits_only=True, **options
    ).eval()
    if args.weights:
        load_for_evaluation(model, read_weights(args.weights))
    else:
        print("warning: the weights are random, so the maps mean little", file=sys.stderr)
    return model


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw every image; returns the files written."""
    args = parse_args(argv)
    model = build_network(args)
    transform = eval_transform(model.img_size)
    shown = Compose([Resize(448, InterpolationMode.BICUBIC), CenterCrop(448 if model.img_size <= 32 else 392)])
    args.output.mkdir(parents=True, exist_ok=True)
    files = []
    for path in args.images:
        image = load_picture(path)
        stages = trace_mixing(model, torch.as_tensor(transform(image))[None])
        for stage in stages:
            print(f"{path}: after block {stage.block}: {stage.entering} to {len(stage.weights)} tokens")
        random = "" if args.weights else ", random weights"
        title = f"{path.name} in {args.model}{random}: what the slimmed tokens are made of"
        file = args.output / f"{path.stem}_{args.model}.png"
        draw_sheet(shown(image), stages, args.tokens, title).save(file)
        print(f"written to {file}")
        files.append(file)
    return files


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
