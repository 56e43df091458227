"""Export a trained network for inference: ONNX, torch.export's archive, or TorchScript, checked against its logits.

    python sit/export.py --model sit_lvvit_small --weights checkpoint.pth --output sit_s.onnx
    python sit/export.py --model timm:NAME --weights checkpoint.pth --output own.safetensors  # for leanvit.load

The network gives logits alone, has no reverse modules, and its batch norms are folded into the stem. The batch is free;
the image is of the size that the network was built for. A file for leanvit.load keeps the last reverse module, by which
its ``features`` are restored, and the number of classes of timm:NAME is that of the weights.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.run.cli import make_parser, positive_int
from common.run.files import check_files, check_output, write_atomic
from common.run.flags import add_flags
from common.run.program import run
from common.sizes import TIMM
from sit.arguments import NetworkSettings, SiTSettings, network_options
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
        content = io.BytesIO()  # torch's writer of files ends the process where the disk is full
        torch.jit.save(traced, content)
        write_atomic(path, content.getvalue())
        return difference(torch.jit.load(str(path)), images, model(images), path)


def export_lean(model: nn.Module, images: Tensor, path: Path) -> float:
    """Write ``path`` for leanvit.load; the largest difference of its logits."""
    from common.hosts.files import load, save
    from common.run.export import difference

    save(model, path)
    return difference(load(path), images, model(images), path)


LEAN = ".safetensors"
SUFFIXES = (".onnx", ".pt2", ".pt", LEAN)
"""Of --output: ONNX, torch.export, TorchScript, leanvit.load."""


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
        "--output", type=Path, required=True, metavar="FILE",
        help=f"NAME.onnx, NAME.pt2 (torch.export) or NAME.pt (jit); of {TIMM}NAME also NAME{LEAN} (leanvit.load)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.output.suffix not in SUFFIXES:
        parser.error(f"--output {args.output}: its suffix must be one of {', '.join(SUFFIXES)}")
    if args.output.suffix == LEAN and not args.model.startswith(TIMM):
        parser.error(f"--output {args.output}: leanvit.load opens networks of {TIMM}NAME, which --model {args.model} "
                     "is not")  # fmt: skip
    return args


def main(argv: Sequence[str] | None = None) -> float:
    """Export and compare; returns the largest difference of the logits over their largest magnitude.

    Raises:
        CheckpointError: if the weights do not fit.
        ExportError: if the exported network gives other logits.
    """
    args = parse_args(argv)
    check_files(args.weights)
    check_output(args.output, inputs=[args.weights])
    from common.measure.benchmark import random_images
    from common.run.export import export_onnx, export_program
    from sit.build import build_student, deployed
    from sit.loading import read_weights

    file = read_weights(args.weights) if args.weights else None
    if file is None:
        print("warning: no --weights, so the weights are random", file=sys.stderr)
    own = SiTSettings.of(args, options=network_options(args), drop_path=0.0)
    classes = (file and own.of_timm and file.classes) or args.num_classes
    model = deployed(build_student(own, classes, file, evaluates=True).eval())
    exports = dict(zip(SUFFIXES, (export_onnx, export_program, export_script, export_lean), strict=True))
    shape = model.image_shape if own.of_timm is None else model.plan.host.facts.image_size
    images = random_images(3, shape[0])
    error = exports[args.output.suffix](model, images, args.output)
    print(f"written to {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")
    print(f"largest difference of the logits: {error:.1e} of the largest")
    return error


if __name__ == "__main__":
    run(main, expected=(ValueError,))
