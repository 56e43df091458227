"""What a method does to the tokens of images: one PNG per image, the image and its merged or dropped patches.

    python hourglass_swag/visualize.py -m hourglass_vit_l16_in1k -l 12 -n 529 photo.jpg
    python hourglass_swag/visualize.py -m e_vit_l16_in1k --base_keep_rate 0.7 --drop_loc 6 12 18 a.jpg b.png
    python hourglass_swag/visualize.py -m tome_vit_l16_in1k -r 224 --tome_r 8 --layers 5 11 23 --no-pretrained photo.jpg

Hourglass and ToMe: patches that share a token have one rim and their mean colour. EViT, ATS, Evo-ViT: one panel per
layer that drops; patches dropped there are red, those dropped before it grey. ACT: the groups of queries of one head.
Layers count from 0, as in the flags. Token counts include the class token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.run.files import check_files, check_output, output_files, replacing
from common.run.flags import make_parser
from common.run.program import run
from hourglass_swag.models import create
from hourglass_swag.tools.parser import (
    HelpFormatter,
    add_any_network_args,
    add_model_args,
    check_method_flags,
    get_model_args,
    parse_any_network,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from hourglass_swag.tools.tracing import Stage

FEW = 4  # panels of groups, unless --layers says which

LEGENDS = {
    "hourglass_vit": "Patches of one cluster (the nearest centroid) share a rim and their mean colour.",
    "tome": "Patches merged into one token share a rim and their mean colour.",
    "e_vit": "Red: dropped in this layer. Grey: dropped before.",
    "ats": "Red: dropped in this layer. Grey: dropped before.",
    "evo": "Red: skip this layer, carried over unchanged.",
    "act": "Patches of one group, which share their attention weights, share a rim and their mean colour.",
}
"""Part of a model's name -> what its panels show; the first that occurs, as in ``get_model_args``."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Images, network, and the flags of its method."""
    parser = make_parser(__doc__, formatter_class=HelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, in any format Pillow reads")
    group = parser.add_argument_group("network")
    add_any_network_args(group)
    group.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    group.add_argument("--seed", type=int, default=0, help="seed of random weights and of ACT's random projections")
    add_model_args(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="I",
        help=f"indices of the layers to show (default: all that drop tokens, {FEW} of those that group them)",
    )
    group.add_argument("--head", type=int, default=0, help="attention head, for ACT")
    group.add_argument(
        "--output", type=Path, default=Path("output/visualize"), metavar="DIR", help="folder to write to"
    )
    return parse_any_network(parser, argv)


def build_model(args: argparse.Namespace) -> nn.Module:
    """The network that the flags describe, in evaluation mode on its device.

    Raises:
        ValueError: naming network and resolution, if they or a flag do not fit; and as ``create``.
    """
    import torch

    from common.run.launch import choose_device

    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    options = {"image_size": args.resolution, **get_model_args(args)}
    try:
        check_method_flags(args)
        model = create(args.model, pretrained=not args.no_pretrained, weights=args.weights, **options)
    except ValueError as error:
        raise ValueError(f"{args.model} at -r {args.resolution}: {error}") from error
    return model.eval().to(device)


def choose_stages(stages: Sequence[Stage], layers: Sequence[int] | None) -> list[Stage]:
    """The stages to show: those of ``layers``, or else all that drop tokens, a few of those that group them.

    Raises:
        ValueError: for a layer in which nothing happened.
    """
    if layers:
        found = {stage.layer: stage for stage in stages}
        if missing := sorted(set(layers) - found.keys()):
            raise ValueError(f"--layers: nothing happens to the tokens in {missing}; it does in {sorted(found)}")
        return [found[layer] for layer in sorted(set(layers))]
    if len(stages) <= FEW or not hasattr(stages[0], "labels"):  # selections are few, and each matters
        return list(stages)
    return [stages[(i + 1) * len(stages) // FEW - 1] for i in range(FEW)]


def draw(image: Image.Image, stages: Sequence[Stage], title: str, notes: Sequence[str]) -> Image.Image:
    """The image, then a panel per stage."""
    from hourglass_swag.tools import drawing
    from hourglass_swag.tools.tracing import Grouping

    patches = [stage.labels if isinstance(stage, Grouping) else stage.states for stage in stages]
    grid = round(len(patches[0]) ** 0.5)
    image = drawing.cut_image(image, grid * drawing.patch_side(grid))
    panels: list[drawing.Panel] = [(image, "image", f"{grid} x {grid} patches")]
    for stage, shown in zip(stages, patches, strict=True):
        paint = drawing.draw_groups if isinstance(stage, Grouping) else drawing.draw_selection
        panels.append((paint(image, shown), f"layer {stage.layer}", stage.caption))
    return drawing.draw_sheet(title, notes, panels)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the images of a command line; returns the files written."""
    args = parse_args(argv)
    check_files(args.weights)
    check_output(args.output, folder=True)
    import torch

    from common.data.images import load_image
    from hourglass_swag.evaluation import transform_image
    from hourglass_swag.tools.tracing import trace

    images = [load_image(path, skippable=False) for path in args.images]
    model = build_model(args)
    notes = [legend for part, legend in LEGENDS.items() if part in args.model][:1]
    if args.no_pretrained and not args.weights:
        print("warning: the weights are random, so what is grouped or dropped means little", file=sys.stderr)
        notes.append("Random weights: what is grouped or dropped means little.")
    files = output_files(args.images, args.model, args.output)
    device = next(model.parameters()).device
    for path, image, file in zip(args.images, images, files, strict=True):
        torch.manual_seed(args.seed)
        stages = trace(model, transform_image(image, args.resolution).to(device), head=args.head)
        stages = choose_stages(stages, args.layers)
        for stage in stages:
            print(f"{path}: layer {stage.layer}: {stage.caption}")
        title = f"{path.name} in {args.model} at {args.resolution} x {args.resolution}"
        with replacing(file) as target:
            draw(image, stages, title, notes).save(target, "png")
        print(f"written to {file}")
    return files


if __name__ == "__main__":
    run(main, expected=(OSError, ValueError))
