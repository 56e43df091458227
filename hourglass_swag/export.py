"""Write any classifier of hubconf.py as ONNX or as a program of torch.export, checked against its logits.

    python hourglass_swag/export.py -m vit_l16_in1k --onnx vit_l16.onnx
    python hourglass_swag/export.py -m hourglass_vit_l16_in1k -l 8 -n 256 --weights FILE --onnx small.onnx
    python hourglass_swag/export.py -m act_vit_l16_in1k --no-pretrained -r 224 --torch-export act.pt2

Any number of images, of the size given by -r. The file is read back and compared before it takes its place. ACT is
written with the random projections of one draw. What a file cannot say is refused: ATS that drops tokens, whose number
depends on the images; the published form of SMYRF, in which the images of a batch couple; and in ONNX the shifts
of bits of ACT.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.run.files import check_files, check_output
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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Network, weights and outputs."""
    parser = make_parser(__doc__, formatter_class=HelpFormatter)
    add_any_network_args(parser)
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="ONNX; weights of more than 2 GB lie beside it")
    parser.add_argument("--torch-export", type=Path, metavar="FILE", help="for torch.export.load, by habit .pt2")
    add_model_args(parser)
    args = parse_any_network(parser, argv)
    if not (args.onnx or args.torch_export):
        parser.error("give --onnx FILE or --torch-export FILE")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Write and compare; returns the largest difference of every file."""
    args = parse_args(argv)
    check_method_flags(args)
    check_files(args.weights)
    check_output(args.onnx, args.torch_export, inputs=[args.weights])
    from common.hosts import Lean
    from common.hosts import export as of_hosts
    from common.measure.benchmark import random_images
    from common.run.export import export_onnx, export_program

    model = create(
        args.model, pretrained=not args.no_pretrained, weights=args.weights, image_size=args.resolution,
        **get_model_args(args),
    ).eval()  # fmt: skip
    if args.no_pretrained and not args.weights:
        print("warning: the weights are random", file=sys.stderr)
    dense, lean = (export_onnx, export_program), (of_hosts.export_onnx, of_hosts.export_torch)
    errors = {}
    for path, of_dense, of_lean in zip((args.onnx, args.torch_export), dense, lean, strict=True):
        if path:
            if isinstance(model, Lean):
                errors[str(path)] = of_lean(model, path)
            else:
                errors[str(path)] = of_dense(model, random_images(3, args.resolution), path)
            print(f"written to {path}, {path.stat().st_size / 1e6:.1f} MB")
            print(f"largest difference of the logits: {errors[str(path)]:.1e} of the largest")
    return errors


if __name__ == "__main__":
    run(main, expected=(ValueError,))
