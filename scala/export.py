"""Write one width of a trained network as a stand-alone model: safetensors that timm's VisionTransformer loads.

    python scala/export.py --checkpoint CHECKPOINT --ratio 0.5 --output slice.safetensors
    python scala/export.py --checkpoint CHECKPOINT --ratio 0.5 --output slice.safetensors --torch-export --onnx

Writes F.safetensors (constructor arguments in its metadata), F.json (the same, readable), and on request F.pt2
(torch.export) and F.onnx. Every file is read back, run on random images, and compared with the slice inside the full
network; scala.standalone.load_standalone(F) is the way back in Python. The network and its slicing bound come from the
checkpoint's own arguments; flags win over them, and are needed for a file that holds weights only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.run import cli
from common.run.files import check_files, check_output
from common.run.flags import add_flags
from common.run.program import run
from scala import arguments


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    group = add_flags(parser, "network", arguments.CheckpointSettings)
    arguments.add_width_args(group)
    add = parser.add_argument
    add("--ratio", type=float, required=True, metavar="R", help="width ratio to export")
    add("--output", required=True, metavar="FILE", help="file to write; .safetensors is added if it has no suffix")
    add("--input-size", type=cli.positive_int, metavar="PIXELS",
        help="side of the images (default: the checkpoint's, else the network's)")  # fmt: skip
    add("--official-layer-scale", action=cli.Switch,
        help="LayerScale does nothing, as in the official code (default: the checkpoint's, else off)")  # fmt: skip
    add("--torch-export", action=cli.Switch, default=False, help="also write a .pt2 of torch.export (default: off)")
    add("--onnx", action=cli.Switch, default=False, help="also write a .onnx, checked with onnxruntime (default: off)")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    if not output.name or output.suffix not in ("", ".safetensors"):
        sys.exit(f"error: --output must end in .safetensors or have no suffix, got {output.name}")
    args.output = output.with_suffix(".safetensors")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    check_files(args.checkpoint)
    check_output(args.output, inputs=[args.checkpoint])
    from common.run.checkpoint import read_checkpoint
    from scala.loading import load_trained
    from scala.standalone import export_slice

    trained = load_trained(
        read_checkpoint(args.checkpoint), args.checkpoint, weights=args.weights, flags=arguments.given(args)
    )
    (ratio,) = trained.choose([args.ratio], allow_untrained=args.allow_untrained, flag="--ratio")
    results = export_slice(trained.model, ratio, args.output, torch_export=args.torch_export, onnx=args.onnx)
    print(f"{args.output}: {results['params_m']:.6f} M parameters, {results['gmacs']:.4f} GMACs")
    return results


if __name__ == "__main__":
    run(main)
