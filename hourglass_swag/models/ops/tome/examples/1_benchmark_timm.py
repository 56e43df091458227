"""Throughput of a timm Vision Transformer for several r.

python 1_benchmark_timm.py --model vit_base_patch16_224 -r 0 8 16
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false
# (timm exports by convention, and modules answer for any attribute)

import argparse

import timm
import timm.data
import tome
import torch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="name of a timm VisionTransformer")
    parser.add_argument("-r", type=int, nargs="+", default=[0, 8, 16], help="tokens merged in every layer")
    parser.add_argument("--batch-size", type=int, default=64, help="images per pass")
    parser.add_argument("--runs", type=int, default=40, help="passes, of which a quarter is warm-up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    model = timm.create_model(args.model)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    dense = tome.benchmark(model, args.device, size, args.batch_size, args.runs)
    print(f"dense: {dense:.2f} im/s on {args.device}, batch {args.batch_size}, float32, {size[1]} pixels")
    tome.patch.timm(model)
    for r in args.r:
        model.r = r
        merged = tome.benchmark(model, args.device, size, args.batch_size, args.runs)
        print(f"r = {r}: {merged:.2f} im/s, {merged / dense:.2f} times dense")


if __name__ == "__main__":
    main(parse_args())
