"""Training pictures as timm makes them for DVT: options of its transforms that the other papers do not use.

Random erasing is not here: as published, it comes after mixup, see :class:`dvt.engine.CascadeStep`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from common.data.transforms import accept_zero_bits, eval_transform, train_transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class AugmentedViews:
    """Several views of a picture, the first of them clean: the split batches of ``--aug-splits``.

    Args:
        crop: picture -> cropped and flipped picture, shared by all views.
        augment: picture -> augmented picture, drawn anew for each view but the first.
        finish: picture -> tensor.
        views: number of them, at least 2.
    """

    def __init__(self, crop: Callable, augment: Callable, finish: Callable, views: int) -> None:
        self.crop, self.augment, self.finish, self.views = crop, augment, finish, views

    def __call__(self, picture: Any) -> list[Tensor]:
        base = self.crop(picture)
        return [self.finish(base)] + [self.finish(self.augment(base)) for _ in range(self.views - 1)]


def make_train_transform(
    size: int,
    *,
    no_aug: bool = False,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    interpolation: str = "random",
    scale: Sequence[float] | None = None,
    ratio: Sequence[float] | None = None,
    hflip: float = 0.5,
    vflip: float = 0.0,
    views: int = 0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Any], Any]:
    """Random resized crop, flips, RandAugment, normalisation: picture -> (3, size, size), or a list of ``views``.

    Args:
        no_aug: only resize the shorter side to ``size`` and crop the centre.
        views: 0, or at least 2 for :class:`AugmentedViews`.
        others: as in :func:`common.data.transforms.train_transform`.
    """
    if no_aug:
        mode = "bilinear" if interpolation == "random" else interpolation
        return eval_transform(size, crop_ratio=1.0, interpolation=mode, mean=mean, std=std)
    area = None if scale is None else (scale[0], scale[1])
    aspect = None if ratio is None else (ratio[0], ratio[1])
    if views:
        crop, augment, finish = create_transform(  # pyright: ignore[reportGeneralTypeIssues] - three with separate
            size, is_training=True, color_jitter=color_jitter, auto_augment=auto_augment, interpolation=interpolation,
            scale=area, ratio=aspect, hflip=hflip, vflip=vflip, re_prob=0.0, mean=tuple(mean), std=tuple(std),
            separate=True,
        )  # pyright: ignore[reportArgumentType] # fmt: skip
        return AugmentedViews(crop, accept_zero_bits(augment), finish, views)
    pipeline = train_transform(
        size, auto_augment=auto_augment, color_jitter=color_jitter, interpolation=interpolation, scale=area,
        ratio=aspect, hflip=hflip, erase_probability=0.0, mean=mean, std=std,
    )  # fmt: skip
    if vflip > 0:  # behind the horizontal flip, where timm has it
        place = 2 if hflip > 0 else 1
        pipeline.transforms.insert(place, transforms.RandomVerticalFlip(vflip))
    return pipeline


def make_erasing(
    probability: float,
    mode: str,
    count: int,
    *,
    device: torch.device | str = "cpu",
    views: int = 0,
    clean_first: bool = False,
) -> RandomErasing | None:
    """timm's random erasing of a normalised batch on its device; None if it never happens.

    Args:
        views: split batches; with ``clean_first`` the pictures of the first are left as they are.
    """
    if probability == 0:
        return None
    splits = views if clean_first else 0
    return RandomErasing(probability, mode=mode, max_count=count, num_splits=splits, device=str(device))
