"""Training with merging: some steps on a network pre-trained as a masked auto-encoder, which wants no proportional
attention.

    python 4_train_mae.py DIR --model vit_base_patch16_224.mae -r 13

DIR holds one folder of images per class. A sketch of one epoch, not a recipe.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false
# (timm exports by convention, and modules answer for any attribute)

import argparse

import timm
import timm.data
import tome
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DIR", help="folder with one folder of images per class")
    parser.add_argument("--model", default="vit_base_patch16_224.mae", help="name of a timm VisionTransformer")
    parser.add_argument("-r", type=int, default=13, help="tokens merged in every layer")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights, to try the script out")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    data = ImageFolder(args.data)
    model = timm.create_model(args.model, pretrained=not args.no_pretrained, num_classes=len(data.classes))
    data.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=True)
    model = tome.patch.timm(model.to(args.device), prop_attn=False).train()
    model.r = args.r
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for images, targets in DataLoader(data, batch_size=args.batch_size, shuffle=True, num_workers=2):
        loss = F.cross_entropy(model(images.to(args.device)), targets.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.4f}")


if __name__ == "__main__":
    main(parse_args())
