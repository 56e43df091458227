"""Export a trained network for inference: ONNX, torch.export's archive, or TorchScript, checked against its logits.

    python sit/export.py --model sit_lvvit_small --weights checkpoint.pth --output sit_s.onnx

The network gives logits alone, has no reverse modules, and its batch norms are folded into the stem. The batch is free;
the image is of the size that the network was built for.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.run.cli import make_parser, positive_int
from common.run.files import check_files, check_output, replacing
from common.run.flags import add_flags
from common.run.program import run
from sit.arguments import NetworkSettings, network_options
from sit.sizes import TYPES

if TYPE_CHECKING:
    from torch import Tensor, nn


def export_script(model: nn.Module, images: Tensor, path: Path) -> float:
    """Write ``path`` for torch.jit.load; the largest difference of its logits."""
    import torch

    from common.run.export import difference

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about sizes that are fixed in it
        traced = torch.jit.trace(model, images[:2])
        with replacing(path) as file:
            torch.jit.save(traced, file)
        return difference(torch.jit.load(str(path)), images, model(images), path)


SUFFIXES = (".onnx", ".pt2", ".pt")
"""Of --output: ONNX, torch.export, TorchScript."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Network, weights and output."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_flags(parser, "network", NetworkSettings, num_classes=1000)
    add("--distillation-type", default="frd", choices=TYPES, help="none: a teacher, without slimming (default: frd)")
    add("--weights", metavar="FILE", help="what training wrote, stripped or not; without it random weights")
    add("--allow-stripped", action="store_true", help="take a file without rtsm.* that does not say it was stripped")
    add("--input-size", type=positive_int, metavar="PIXELS", help="side of the image (default: the model's)")
    add(
        "--output", type=Path, required=True, metavar="FILE", help="NAME.onnx, NAME.pt2 (torch.export) or NAME.pt (jit)"
    )
    args = parser.parse_args(argv)
    if args.output.suffix not in SUFFIXES:
        parser.error(f"--output {args.output}: its suffix must be one of {', '.join(SUFFIXES)}")
    return args


def main(argv: Sequence[str] | None = None) -> float:
    """Export and compare; returns the largest difference of the logits over their largest magnitude.

    Raises:
        CheckpointError: if the weights do not fit.
        ExportError: if the exported network gives other logits.
    """
    args = parse_args(argv)
    check_files(args.weights)
    check_output(args.output)
    from common.measure.benchmark import random_images
    from common.run.export import export_onnx, export_program
    from sit.loading import load_for_evaluation, read_weights
    from sit.models.lvvit import build_lvvit

    options = {"num_classes": args.num_classes, "distillation_type": args.distillation_type, **network_options(args)}
    model = build_lvvit(args.model, **options).eval()
    if args.weights:
        load_for_evaluation(model, read_weights(args.weights), allow_stripped=args.allow_stripped)
    else:
        print("warning: no --weights, so the weights are random", file=sys.stderr)
    model = model.deployed()
    exports = dict(zip(SUFFIXES, (export_onnx, export_program, export_script), strict=True))
    images = random_images(3, model.image_shape[0])
    error = exports[args.output.suffix](model, images, args.output)
    print(f"written to {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")
    print(f"largest difference of the logits: {error:.1e} of the largest")
    return error


if __name__ == "__main__":
    run(main, expected=(ValueError,))
