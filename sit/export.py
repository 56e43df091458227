"""Export a trained network for inference: ONNX, torch.export's archive, or TorchScript, checked against its logits.

    python sit/export.py --model sit_lvvit_small --weights checkpoint.pth --output sit_s.onnx

The network gives logits alone, has no reverse modules, and its batch norms are folded into the stem. The batch is free;
the picture is of the size that the network was built for.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.measure.benchmark import random_images
from common.run.checkpoint import CheckpointError
from common.run.cli import make_parser, positive_int
from sit.losses import TYPES
from sit.models import SIZES, LVViT
from sit.models.weights import load_for_evaluation, read_weights

BATCH = torch.export.Dim("batch", min=1, max=65536)


def export_onnx(model: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    """Write ``path`` with input ``images`` and output ``logits``; returns what runs it."""
    import onnxruntime  # an extra: leanvit[export]

    images = example(model)
    torch.onnx.export(
        model, (images,), str(path), input_names=["images"], output_names=["logits"], dynamo=True,
        dynamic_shapes=({0: BATCH},), external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def export_program(model: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    """Write ``path`` for torch.export.load; returns what runs it."""
    torch.export.save(torch.export.export(model, (example(model),), dynamic_shapes=({0: BATCH},)), path)
    return torch.export.load(path).module()


def export_script(model: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    """Write ``path`` for torch.jit.load; returns what runs it."""
    torch.jit.save(torch.jit.trace(model, example(model)), str(path))
    return torch.jit.load(str(path))


FORMS = {".onnx": export_onnx, ".pt2": export_program, ".pt": export_script}
"""Suffix of --output -> how it is written."""


def example(model: nn.Module) -> Tensor:
    return random_images(2, int(model.img_size))  # pyright: ignore[reportArgumentType]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Network, weights and output."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="sit_lvvit_tiny", choices=list(SIZES), metavar="NAME", help=f"one of {', '.join(SIZES)}")
    add("--distillation-type", default="frd", choices=TYPES, help="none: a teacher, without slimming (default: frd)")
    add("--weights", metavar="FILE", help="what training wrote, stripped or not; without it random weights")
    add("--allow-stripped", action="store_true", help="take a file without rtsm.* that does not say it was stripped")
    add("--num-classes", type=positive_int, default=1000, metavar="K", help="classes (default: 1000)")
    add("--input-size", type=positive_int, metavar="PIXELS", help="side of the picture (default: the model's)")
    add(
        "--output", type=Path, required=True, metavar="FILE", help="NAME.onnx, NAME.pt2 (torch.export) or NAME.pt (jit)"
    )
    args = parser.parse_args(argv)
    if args.output.suffix not in FORMS:
        parser.error(f"--output {args.output}: its suffix must be one of {', '.join(FORMS)}")
    return args


def build_network(args: argparse.Namespace) -> LVViT:
    """The deployed network of the flags.

    Raises:
        CheckpointError: if the weights do not fit.
    """
    from sit.models.lvvit import build_lvvit

    options = {"img_size": args.input_size} if args.input_size else {}
    model = build_lvvit(
        args.model, num_classes=args.num_classes, distillation_type=args.distillation_type, **options
    ).eval()
    if args.weights:
        load_for_evaluation(model, read_weights(args.weights), allow_stripped=args.allow_stripped)
    else:
        print("warning: no --weights, so the weights are random", file=sys.stderr)
    return model.deployed()


def main(argv: Sequence[str] | None = None) -> float:
    """Export and compare; returns the largest difference of the logits over their largest magnitude.

    Raises:
        RuntimeError: if the exported network gives other logits.
    """
    args = parse_args(argv)
    model = build_network(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        exported = FORMS[args.output.suffix](model, args.output)
        images = random_images(3, model.img_size, seed=1)
        expected, found = model(images), exported(images)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"written to {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")
    print(f"largest difference of the logits: {error:.1e} of the largest")
    if not error < 1e-4:
        raise RuntimeError(f"{args.output}: the exported network gives other logits, off by {error:.1e}")
    return error


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
