"""Accuracy of a timm Vision Transformer for several r, without training.

    python 0_validate_timm.py DIR --model vit_base_patch16_224 -r 0 8 16

DIR holds one folder per class, in ImageNet's order of classes.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false
# (timm exports by convention, and modules answer for any attribute)

import argparse

import timm
import timm.data
import tome
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DIR", help="folder with one folder of images per class")
    parser.add_argument("--model", default="vit_base_patch16_224", help="name of a timm VisionTransformer")
    parser.add_argument("-r", type=int, nargs="+", default=[0, 8, 16], help="tokens merged in every layer")
    parser.add_argument("--batch-size", type=int, default=128, help="images per batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights, to try the script out")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    model = timm.create_model(args.model, pretrained=not args.no_pretrained).eval().to(args.device)
    config = timm.data.resolve_model_data_config(model)
    dataset = ImageFolder(args.data, timm.data.create_transform(**config))
    loader = DataLoader(dataset, batch_size=args.batch_size, num_workers=2)
    tome.patch.timm(model)
    for r in args.r:
        model.r = r
        correct = 0
        for images, targets in loader:
            with torch.inference_mode():
                correct += int((model(images.to(args.device)).argmax(1).cpu() == targets).sum())
        print(f"r = {r}: {100 * correct / len(dataset):.2f} % of {len(dataset)} images")


if __name__ == "__main__":
    main(parse_args())
