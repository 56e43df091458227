"""Schedules of r on a SWAG Vision Transformer: constant, falling, rising, by hand; tokens left and throughput.

    python 3_schedules_swag.py --model vit_l16_in1k --resolution 512 -r 40

Takes the network from this checkout through torch.hub. For accuracy: hourglass_swag/imagenet_1k_eval.py.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false
# (timm exports by convention, and modules answer for any attribute)

import argparse
from pathlib import Path

import tome
import torch

HUB = Path(__file__).resolve().parents[4]  # hourglass_swag


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b16_in1k", help="a dense name of hourglass_swag/hubconf.py")
    parser.add_argument("--resolution", type=int, default=384, help="side of the input in pixels")
    parser.add_argument("-r", type=int, default=45, help="tokens merged per layer, on average")
    parser.add_argument("--batch-size", type=int, default=8, help="images per pass")
    parser.add_argument("--runs", type=int, default=8, help="passes, of which a quarter is warm-up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    model = torch.hub.load(str(HUB), args.model, source="local", pretrained=False, image_size=args.resolution)
    tome.patch.swag(model)
    schedules = {
        "dense": 0,
        "constant": args.r,
        "falling": (args.r, -1.0),
        "rising": (args.r, 1.0),
        "first layer alone": [4 * args.r],
    }
    for name, r in schedules.items():
        model.r = r
        size = (3, args.resolution, args.resolution)
        throughput = tome.benchmark(model, args.device, size, args.batch_size, args.runs)
        left = model.seq_length if model._tome_info["size"] is None else model._tome_info["size"].shape[1]
        print(f"{name}: {throughput:.2f} im/s, {left} of {model.seq_length} tokens left")


if __name__ == "__main__":
    main(parse_args())
