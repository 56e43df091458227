"""A segmentation head on ``fast.features``: fewer tokens inside, the full grid outside, nothing of the head changed.

    python docs/dense.py                     # half a minute on one core

The two photographs that scikit-learn ships, cut into crops; a pixel's label is what a rule on its colour says (petals,
sky). A head of two 1 x 1 convolutions is trained on the dense network's features, then read on the lean networks'
features as it is, and once more trained on these. See docs/dense.md for what to expect.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import leanvit

SIDE = 224
METHODS = {"ToMe": leanvit.ToMe(r=8), "Hourglass": leanvit.Hourglass(layer=6, clusters=(10, 10))}


def crops() -> tuple[Tensor, Tensor]:
    """Crops (30, 3, 224, 224) in [-1, 1], and labels (30, 224, 224): 0 the rest, 1 petals, 2 sky."""
    images, labels = [], []
    china, flower = (torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in load_sample_images().images)
    for image, kind in ((china, 2), (flower, 1)):
        red, green, blue = image.float()
        rule = (blue > 150) & (blue >= red) if kind == 2 else (red > 1.4 * green) & (red > 90)
        for top in (0, 101, 203):
            for left in range(0, 417, 104):
                images.append(image[:, top : top + SIDE, left : left + SIDE] / 127.5 - 1)
                labels.append(rule[top : top + SIDE, left : left + SIDE].long() * kind)
    return torch.stack(images), torch.stack(labels)


def train_head(features: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """A head that makes (B, 3, rows, columns) of features (B, C, rows, columns)."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.BatchNorm2d(features.shape[1]), nn.Conv2d(features.shape[1], 64, 1), nn.GELU(),
                         nn.Conv2d(64, 3, 1))  # fmt: skip
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = F.cross_entropy(enlarge(head(features)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def enlarge(logits: Tensor) -> Tensor:
    """To the pixels, at half of the images' resolution for speed."""
    return F.interpolate(logits, (SIDE // 2, SIDE // 2), mode="bilinear")


@torch.no_grad()
def mean_iou(head: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Mean over the classes of intersection over union."""
    found = enlarge(head(features)).argmax(1)
    overlaps = [((found == k) & (labels == k)).sum() / ((found == k) | (labels == k)).sum() for k in range(3)]
    return float(torch.stack(overlaps).mean())


def main(network: str = "vit_tiny_patch16_224", steps: int = 60) -> dict[str, dict[str, float]]:
    """One row for the dense network and for each method."""
    torch.manual_seed(0)
    net = timm.create_model(network, img_size=SIDE, num_classes=0).eval()  # pretrained=True where there is a connection
    images, labels = crops()
    labels = labels[:, ::2, ::2]
    held_out = torch.arange(len(images)) % 5 == 4  # crops of the right edge: they overlap with the others
    networks: dict[str, Any] = {"dense": leanvit.lean(net)}
    networks |= {name: leanvit.lean(net, method) for name, method in METHODS.items()}
    rows: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        features = {
            name: torch.cat([fast.features(part) for part in images.split(6)]) for name, fast in networks.items()
        }
    dense_head = train_head(features["dense"][~held_out], labels[~held_out], steps)
    for name, fast in networks.items():
        own_head = train_head(features[name][~held_out], labels[~held_out], steps)
        rows[name] = {
            "gmacs": fast.gmacs(),
            "dense_head_iou": mean_iou(dense_head, features[name][held_out], labels[held_out]),
            "own_head_iou": mean_iou(own_head, features[name][held_out], labels[held_out]),
        }
        print(f"{name:10} {rows[name]['gmacs']:6.3f} GMACs, mean IoU {rows[name]['dense_head_iou']:.3f} with the dense "
              f"network's head, {rows[name]['own_head_iou']:.3f} with its own")  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
