"""Transfer to CIFAR-10 and CIFAR-100: T2T-ViT's recipe, extended to cascades.

T2T-ViT (arXiv:2101.11986) fine-tunes with SGD, the backbone at a hundredth of the head's rate. DVT names this recipe
for its CIFAR results and released no code. What is ours: the loss is the sum of the exits' cross entropies, the groups
span all stages, and the networks that mix reused relations belong to the backbone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms

from common.data.transforms import Transform
from common.run.checkpoint import CheckpointError, load_strict

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Of T2T-ViT's transfer script."""

BACKBONE = ("tokens_to_token", "patch_embed", "blocks", "relation_reuse_conv")
"""Parts that are tuned at the small rate."""

HEAD = "head"


def train_picture(size: int, *, hflip: float = 0.5) -> Transform:
    """Resize, random crop of the picture padded by an eighth (28 pixels at 224), flip: (3, size, size)."""
    return transforms.Compose(
        [
            transforms.Resize(size),
            transforms.RandomCrop(size, padding=size // 8),
            transforms.RandomHorizontalFlip(hflip),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def test_picture(size: int) -> Transform:
    """Resize, bilinear, without a crop where pictures are square: (3, size, size)."""
    return transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def parameter_groups(model: nn.Module, *, lr: float, ratio: float) -> list[dict[str, Any]]:
    """Backbone at ``ratio * lr``, heads at ``lr``; the rest stays as it is, as in T2T-ViT's script.

    What stays: class tokens, final normalisations, position tables. Their gradients are switched off.
    """
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "head": []}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if not parameter.requires_grad:
            continue
        if HEAD in parts:
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


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> Sequence[str]:
    """Load pretrained weights into a network with other classes: heads whose shape differs start afresh.

    Position tables of another resolution are resized, bicubic.

    Args:
        model: network to fill.
        state: weights by published names.
        source: the file, for messages.

    Returns:
        Names of the weights that were not taken over.

    Raises:
        CheckpointError: if anything else does not fit.
    """
    own = model.state_dict()
    merged: dict[str, Tensor] = {}
    fresh: list[str] = []
    for name, value in state.items():
        parts = name.split(".")
        if name in own and HEAD in parts and own[name].shape != value.shape:
            fresh.append(name)
            continue
        if name in own and parts[-1] == "pos_embed" and own[name].shape != value.shape:
            value = resize_table(value, own[name].shape[1], where=f"{source}: {name}")
        merged[name] = value
    load_strict(model, {**{name: own[name] for name in fresh}, **merged}, source=source)
    return fresh


def resize_table(table: Tensor, tokens: int, *, where: str) -> Tensor:
    """Resize a position table (1, M+1, D) to ``tokens`` rows, the class token's kept; bicubic over the grid.

    Raises:
        CheckpointError: if either number of patches is no square.
    """
    source, target = round((table.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if source**2 + 1 != table.shape[1] or target**2 + 1 != tokens:
        raise CheckpointError(
            f"{where} has {table.shape[1]} positions, the network {tokens}: not squares with a class token, so the "
            "table cannot be resized; give the --img-size that the checkpoint was trained at"
        )
    grid = table[:, 1:].transpose(1, 2).unflatten(2, (source, source))
    grid = nn.functional.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
