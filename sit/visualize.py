"""Which input tokens each slimmed token mixes: the weights of the slimming modules over the image, one PNG each.

    python sit/visualize.py --model sit_lvvit_small --weights checkpoint.pth photo.jpg

A row per slimming module. First what all its tokens together take from each patch (1 is an equal share), then single
tokens, chosen to be as different as possible. From the second module on the weights are multiplied back through the
modules before, so that every map is over the patches of the image; what attention mixes in between is not in them.
Besides files, IMAGE may be china.jpg, flower.jpg or digit-N (the N-th held-out one), which are inside scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.run.cli import make_parser, positive_int
from common.run.errors import DataError
from common.run.files import check_files, check_output, output_files, replacing
from common.run.flags import add_flags
from common.run.program import run
from common.sizes import TIMM
from sit.arguments import NetworkSettings, network_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

    from sit.models import LVViT

SAMPLES = ("china.jpg", "flower.jpg")
PANEL = 150  # pixels of a column
IMAGE_SHARE = 0.35  # how much of the grey image shines through a map
NOTE = "Dark to bright: the smallest to the largest share in that map, which stand above it."


class SlimmedStage(NamedTuple):
    """One slimming module on one image; ``weights`` (M, N) are over the patches of the image."""

    block: int
    entering: int
    weights: Tensor

    @property
    def taken(self) -> Tensor:
        """What all tokens together take from each patch, (N,); 1 is an equal share."""
        return self.weights.mean(0) * self.weights.shape[1]


def trace_mixing(model: LVViT, images: Tensor) -> list[SlimmedStage]:
    """The mixing weights of every slimming module for one image (1, 3, height, width), in order.

    Raises:
        ValueError: if the network does not slim.
    """
    import torch

    if not model.slimmed:
        raise ValueError("this network does not slim its tokens; give a slimmed one (--distillation-type frd)")
    seen: list[Tensor] = []

    def remember(module: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        seen.append(module.mixing_weights(inputs[0])[0].float().cpu())

    handles = [module.register_forward_hook(remember) for module in model.tsm]
    try:
        with torch.no_grad():
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
        distance = (weights[:, None] - weights[chosen]).abs().sum(2).amin(1)
        chosen.append(int(distance.argmax()))
    return chosen


def draw_map(axes: Any, image: Image.Image, values: Tensor, grid: tuple[int, int]) -> None:
    """A map over an image's patches in colour, the image shining through in grey.

    Args:
        values: (N,), row by row of the grid; the smallest is darkest, the largest brightest.
    """
    axes.imshow(image.convert("L"), cmap="gray")
    axes.imshow(
        values.reshape(grid).numpy(), cmap="inferno", alpha=1 - IMAGE_SHARE,
        interpolation="nearest", extent=(0, image.width, image.height, 0),
    )  # fmt: skip


def draw_sheet(
    image: Image.Image, stages: Sequence[SlimmedStage], grid: tuple[int, int], tokens: int, title: str
) -> Figure:
    """The image, and a row of maps for every stage.

    Args:
        image: as the network sees it.
        grid: rows and columns of patches.
        tokens: single tokens per row.
    """
    from matplotlib.figure import Figure

    columns = 2 + max(min(tokens, len(stage.weights)) for stage in stages)
    size = (columns * PANEL / 100, len(stages) * 1.25 * PANEL / 100 + 0.5)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(f"{title}\n{NOTE}", fontsize=8)
    for axes, stage in zip(figure.subplots(len(stages), columns, squeeze=False), stages, strict=True):
        axes[0].imshow(image)
        labels = [f"after block {stage.block}\n{stage.entering} to {len(stage.weights)} tokens"]
        draw_map(axes[1], image, stage.taken, grid)
        labels.append(f"all tokens\n{stage.taken.min():.2f} to {stage.taken.max():.2f} equal shares")
        for panel, token in zip(axes[2:], choose_different(stage.weights, tokens), strict=False):
            weights = stage.weights[token]
            draw_map(panel, image, weights, grid)
            labels.append(f"token {token}\n{weights.min():.3f} to {weights.max():.3f}")
        for panel, label in zip(axes, labels, strict=False):
            panel.set_title(label, fontsize=8)
        for panel in axes:
            panel.axis("off")
    return figure


def open_image(name: Path) -> Image.Image:
    """A file, or where there is none of that name, an image inside scikit-learn.

    Raises:
        DataError: if it is neither.
    """
    from common.data.images import load_image
    from common.data.loaders import build_dataset

    kind, _, number = name.name.partition("-")
    if not name.exists() and kind == "digit" and number.isdigit():
        digits: Any = build_dataset("digits", None, "val", None)
        return digits[int(number) % len(digits)][0]
    if not name.exists() and str(name) in SAMPLES:
        from PIL import Image
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(str(name)))
    return load_image(name, skippable=False)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Images and network."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="files, or images inside scikit-learn, see above")
    add_flags(parser, "network", NetworkSettings, num_classes=1000)
    add("--weights", metavar="FILE", help="a trained student, stripped or not; without it the weights are random")
    add("--input-size", type=positive_int, metavar="PIXELS", help="side of the image (default: the model's)")
    add("--tokens", type=positive_int, default=6, metavar="N", help="single tokens in each row (default: 6)")
    add("--output", type=Path, default=Path("output/visualize"), metavar="DIR",
        help="folder to write to, or with one IMAGE the file to write, NAME.png")  # fmt: skip
    args = parser.parse_args(argv)
    if args.model.startswith(TIMM):
        parser.error(f"--model {args.model}: only slimmed tokens of LV-ViT are drawn here")
    return args


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw every image, on the CPU, where one takes less than a second; returns the files written."""
    args = parse_args(argv)
    single = args.output.suffix == ".png" and len(args.images) == 1
    check_files(args.weights)
    check_output(args.output, folder=not single, inputs=[args.weights, *args.images])
    for path in args.images:
        if not path.exists() and not path.name.startswith("digit-") and str(path) not in SAMPLES:
            raise DataError(f"{path}: no such file, and no image inside scikit-learn: {', '.join(SAMPLES)}, digit-N")
    import torch
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    from common.data.loaders import eval_transform
    from sit.loading import load_for_evaluation, read_weights
    from sit.models.lvvit import build_lvvit

    options = {"num_classes": args.num_classes, "distillation_type": "frd", **network_options(args)}
    model = build_lvvit(args.model, logits_only=True, **options).eval()
    if args.weights:
        load_for_evaluation(model, read_weights(args.weights))
    else:
        print("warning: the weights are random, so the maps mean little", file=sys.stderr)
    side = model.image_shape[0]
    transform = eval_transform(side)
    shown = Compose([Resize(448, InterpolationMode.BICUBIC), CenterCrop(448 if side <= 32 else 392)])
    files = [args.output] if single else output_files(args.images, args.model, args.output)
    for path, file in zip(args.images, files, strict=True):
        image = open_image(path)
        stages = trace_mixing(model, torch.as_tensor(transform(image))[None])
        for stage in stages:
            print(f"{path}: after block {stage.block}: {stage.entering} to {len(stage.weights)} tokens")
        weights = "/".join(Path(args.weights).parts[-2:]) if args.weights else "random weights"
        title = f"{path.name} in {args.model}, {weights}: what the slimmed tokens are made of."
        with replacing(file) as target:
            draw_sheet(shown(image), stages, model.grid, args.tokens, title).savefig(target, format="png")
        print(f"written to {file}")
    return files


if __name__ == "__main__":
    run(main, expected=(OSError, ValueError))
