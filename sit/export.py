"""Export a trained network for inference: ONNX, torch.export's archive, or TorchScript, checked against its logits.

    python sit/export.py --model sit_lvvit_small --weights checkpoint.pth --output sit_s.onnx

The network gives logits alone, has no reverse modules, and its batch norms are folded into the stem. The batch is free;
the image is of the size that the network was built for.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.run.cli import make_parser, positive_int
from common.run.files import check_files
from common.run.flags import add_flags
from common.run.program import run
from sit.arguments import NetworkSettings, network_options
from sit.sizes import TYPES

if TYPE_CHECKING:
    from torch import Tensor, nn

    Runs = Callable[[Tensor], Tensor]


def export_onnx(model: nn.Module, images: Tensor, batch: Any, path: Path) -> Runs:
    """Write ``path`` with input ``images`` and output ``logits``; returns what runs it."""
    import onnxruntime  # an extra: leanvit[export]
    import torch

    torch.onnx.export(
        model, (images,), str(path), input_names=["images"], output_names=["logits"], dynamo=True,
        dynamic_shapes=({0: batch},), external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda given: torch.from_numpy(session.run(None, {"images": given.numpy()})[0])


def export_program(model: nn.Module, images: Tensor, batch: Any, path: Path) -> Runs:
    """Write ``path`` for torch.export.load; returns what runs it."""
    import torch

    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), path)
    return torch.export.load(path).module()


def export_script(model: nn.Module, images: Tensor, batch: Any, path: Path) -> Runs:
    """Write ``path`` for torch.jit.load; returns what runs it."""
    import torch

    del batch  # a trace is free in it
    torch.jit.save(torch.jit.trace(model, images), str(path))
    return torch.jit.load(str(path))


FORMS = {".onnx": export_onnx, ".pt2": export_program, ".pt": export_script}
"""Suffix of --output -> how it is written."""


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
    if args.output.suffix not in FORMS:
        parser.error(f"--output {args.output}: its suffix must be one of {', '.join(FORMS)}")
    return args


def main(argv: Sequence[str] | None = None) -> float:
    """Export and compare; returns the largest difference of the logits over their largest magnitude.

    Raises:
        CheckpointError: if the weights do not fit.
        RuntimeError: if the exported network gives other logits.
    """
    args = parse_args(argv)
    check_files(args.weights)
    import torch

    from common.measure.benchmark import random_images
    from sit.loading import load_for_evaluation, read_weights
    from sit.models.lvvit import build_lvvit

    options = {"num_classes": args.num_classes, "distillation_type": args.distillation_type, **network_options(args)}
    model = build_lvvit(args.model, **options).eval()
    if args.weights:
        load_for_evaluation(model, read_weights(args.weights), allow_stripped=args.allow_stripped)
    else:
        print("warning: no --weights, so the weights are random", file=sys.stderr)
    model = model.deployed()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        exported = FORMS[args.output.suffix](model, random_images(2, model.image_shape[0]), batch, args.output)
        images = random_images(3, model.image_shape[0], seed=1)
        expected, found = model(images), exported(images)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"written to {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")
    print(f"largest difference of the logits: {error:.1e} of the largest")
    if not error < 1e-4:
        raise RuntimeError(f"{args.output}: the exported network gives other logits, off by {error:.1e}")
    return error


if __name__ == "__main__":
    run(main, expected=(RuntimeError, ValueError, ModuleNotFoundError))
