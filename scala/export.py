"""Write one width of a trained network as a stand-alone model: safetensors that timm's VisionTransformer loads.

    python scala/export.py --checkpoint CHECKPOINT --ratio 0.5 --output slice.safetensors
    python scala/export.py --checkpoint CHECKPOINT --ratio 0.5 --output slice.safetensors --torch-export --onnx

Writes F.safetensors (constructor arguments in its metadata), F.json (the same, readable), and on request F.pt2
(torch.export) and F.onnx. Every file is read back, run on random pictures, and compared with the slice inside the full
network; scala.standalone.load_standalone(F) is the way back in Python. The network and its slicing bound come from the
checkpoint's own arguments; flags win over them, and are needed for a file that holds weights only.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.measure.benchmark import random_images
from common.measure.flops import count_parameters, gmacs
from common.run import cli
from common.run.checkpoint import CheckpointError
from common.run.files import write_atomic
from common.run.program import get_logger, run
from scala.engine_scala import AtRatio
from scala.loading import load_trained
from scala.standalone import describe, load_standalone, save_standalone, standalone_state

logger = get_logger(__name__)

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, at which a written file counts as equal (float32)."""


class ExportError(RuntimeError):
    """A slice that cannot be written or does not compute what it should; the message says which and what to do."""


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="checkpoint of main_scala.py, a state dict, or its URL")
    add("--ratio", type=float, required=True, metavar="R", help="width ratio to export")
    add("--output", required=True, metavar="FILE", help="file to write; .safetensors is added if it has no suffix")
    add("--weights", choices=("model", "model_ema"), default="model",
        help="which weights of the checkpoint; the published numbers are those of model (default: model)")  # fmt: skip
    add("--model", default=None, metavar="NAME", help="the network's name (default: the checkpoint's)")
    add("--smallest_ratio", type=float, default=None, metavar="S",
        help="smallest trained ratio, cut from the other end (default: the checkpoint's, else 0.25)")  # fmt: skip
    add("--largest_ratio", type=float, default=None, metavar="L",
        help="largest trained ratio (default: the checkpoint's, else 1.0)")  # fmt: skip
    add("--granularity", type=float, default=None, metavar="G",
        help="step of the trained ratios (default: the checkpoint's, else any width passes)")  # fmt: skip
    add("--input-size", type=cli.positive_int, default=None, metavar="PIXELS",
        help="side of the pictures (default: the checkpoint's, else the network's)")  # fmt: skip
    add("--allow-untrained", action=cli.Switch, default=False,
        help="export a width that was not trained, whose accuracy is chance (default: off)")  # fmt: skip
    add("--official-layer-scale", action=cli.Switch, default=None,
        help="LayerScale does nothing, as in the official code (default: the checkpoint's, else off)")  # fmt: skip
    add("--torch-export", action=cli.Switch, default=False, help="also write a .pt2 of torch.export (default: off)")
    add("--onnx", action=cli.Switch, default=False, help="also write a .onnx, checked with onnxruntime (default: off)")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    if output.suffix not in ("", ".safetensors"):
        sys.exit(f"error: --output must end in .safetensors or have no suffix, got {output.name}")
    args.output = output.with_suffix(".safetensors")
    return args


def load_network(args: argparse.Namespace) -> nn.Module:
    """The full network of the checkpoint; a ratio that was not trained is refused, or warned of.

    Raises:
        CheckpointError: what the file lacks, or what does not fit.
        ExportError: an untrained ratio without ``--allow-untrained``.
    """
    trained = load_trained(
        args.checkpoint, weights=args.weights, model=args.model, smallest_ratio=args.smallest_ratio,
        largest_ratio=args.largest_ratio, granularity=args.granularity, input_size=args.input_size,
        official_layer_scale=args.official_layer_scale,
    )  # fmt: skip
    problem = trained.untrained(args.ratio)
    if problem and not args.allow_untrained:
        raise ExportError(f"{problem}. --allow-untrained exports it all the same")
    if problem:
        logger.warning("%s: expect the accuracy of chance", problem)
    elif trained.ratios is None:
        logger.warning("--granularity is not known: cannot tell whether ratio %g was trained", args.ratio)
    return trained.model


def difference(ours: Tensor | np.ndarray, expected: Tensor, what: str) -> float:
    """Largest difference relative to the largest entry of ``expected``.

    Raises:
        ExportError: above ``TOLERANCE``.
    """
    ours = torch.as_tensor(ours).detach()
    found = float((ours - expected).abs().max() / expected.abs().max())
    if not found <= TOLERANCE:
        raise ExportError(f"{what} gives other logits than the slice: largest relative difference {found:.3g}")
    return found


def write_torch_export(path: Path, model: nn.Module, images: Tensor, expected: Tensor) -> float:
    """torch.export with a free batch size; returns the difference after reading the file back."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        torch.export.save(program, Path(folder) / path.name)
        (Path(folder) / path.name).replace(path)
    again = torch.export.load(path).module()
    single = difference(again(images[:1]), expected[:1], path.name)
    return max(single, difference(again(images), expected, path.name))


def write_onnx(path: Path, model: nn.Module, images: Tensor, expected: Tensor) -> float:
    """ONNX with a free batch size in one file; returns the difference under onnxruntime."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--onnx needs {', '.join(missing)}: pip install 'leanvit[export]'")
    import onnxruntime  # only where it is asked for

    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter, about itself
        program = torch.onnx.export(
            model, (images,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["images"],
            output_names=["logits"], verbose=False,
        )  # fmt: skip
    assert program is not None
    write_atomic(path, program.model_proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (1, len(images)):
        (logits,) = session.run(None, {"images": images[:count].numpy()})
        worst = max(worst, difference(np.asarray(logits), expected[:count], path.name))
    return worst


@torch.no_grad()
def export(args: argparse.Namespace) -> dict[str, float]:
    """Write the files that the flags ask for; returns each file's largest relative difference, and sizes."""
    model = load_network(args)
    standalone = describe(model, args.ratio)
    images = random_images(2, standalone.input_size)
    expected = AtRatio(model, args.ratio)(images)
    save_standalone(args.output, standalone_state(model, args.ratio), standalone)
    alone = load_standalone(args.output)
    results = {args.output.name: difference(alone(images), expected, args.output.name)}
    for wanted, suffix, write in (
        (args.torch_export, ".pt2", write_torch_export),
        (args.onnx, ".onnx", write_onnx),
    ):
        if wanted:
            path = args.output.with_suffix(suffix)
            results[path.name] = write(path, alone, images, expected)
    for name, value in results.items():
        logger.info("%s: largest difference of the logits %.2g of the largest", name, value)
    results["params_m"] = count_parameters(alone) / 1e6
    results["gmacs"] = gmacs(model.count_ops(args.ratio), "fvcore")  # pyright: ignore[reportCallIssue] - all have it
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    try:
        results = export(args)
    except ValueError as error:  # of the slicing rule: a width that is none
        raise ExportError(str(error)) from error
    print(f"{args.output}: {results['params_m']:.6f} M parameters, {results['gmacs']:.4f} GMACs")
    return results


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(CheckpointError, ExportError))
