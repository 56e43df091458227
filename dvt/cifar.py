"""Transfer to CIFAR-10 and CIFAR-100: T2T-ViT's recipe, extended to cascades.

T2T-ViT (arXiv:2101.11986) fine-tunes with SGD, the backbone at a hundredth of the head's rate. DVT names this recipe
for its CIFAR results and released no code. What is ours: the loss is the sum of the exits' cross entropies, the groups
span all stages, and the networks that mix reused relations belong to the backbone.
"""

from typing import Any

import torch
from torch import nn
from torchvision import transforms

from common.data.transforms import Transform

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Of T2T-ViT's transfer script."""

TO_TENSOR = (transforms.ToTensor(), transforms.Normalize(MEAN, STD))

BACKBONE = ("tokens_to_token", "patch_embed", "blocks", "relation_reuse_conv")
"""Parts that are tuned at the small rate."""


def train_transform(size: int, *, hflip: float = 0.5) -> Transform:
    """Resize, random crop of the image padded by an eighth (28 pixels at 224), flip: (3, size, size)."""
    crop = transforms.RandomCrop(size, padding=size // 8)
    return transforms.Compose([transforms.Resize(size), crop, transforms.RandomHorizontalFlip(hflip), *TO_TENSOR])


def test_transform(size: int) -> Transform:
    """Resize, bilinear, without a crop where images are square: (3, size, size)."""
    return transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), *TO_TENSOR])


def parameter_groups(model: nn.Module, *, lr: float, ratio: float) -> list[dict[str, Any]]:
    """Backbone at ``ratio * lr``, heads at ``lr``; the rest stays as it is, as in T2T-ViT's script.

    What stays: class tokens, final normalisations, position tables. Their gradients are switched off.
    """
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "head": []}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if not parameter.requires_grad:
            continue
        if "head" in parts:
            groups["head"].append(parameter)
        elif any(part in parts for part in BACKBONE):
            groups["backbone"].append(parameter)
        else:
            parameter.requires_grad_(False)
    return [{"params": groups["backbone"], "lr": ratio * lr}, {"params": groups["head"], "lr": lr}]


def build_optimizer(
    model: nn.Module, *, lr: float, ratio: float = 0.01, weight_decay: float = 5e-4
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 over :func:`parameter_groups`; every tuned parameter is decayed."""
    return torch.optim.SGD(parameter_groups(model, lr=lr, ratio=ratio), lr=lr, momentum=0.9, weight_decay=weight_decay)


def build_schedule(
    optimizer: torch.optim.Optimizer, *, epochs: int = 60, min_lr: float = 2e-4
) -> torch.optim.lr_scheduler.CosineAnnealingLR:
    """Cosine to ``min_lr``, one step per epoch; the same end for both groups.

    At lr 0.01 the backbone's rate begins below that end, and rises.
    """
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=min_lr)
