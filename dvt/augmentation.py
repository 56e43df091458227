"""Training images as timm makes them for DVT: options of its transforms that the other papers do not use.

Random erasing is not here: as published, it comes after mixup, see :class:`dvt.engine.CascadeStep`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from common.data.build import build_train_transform
from common.data.transforms import accept_zero_bits, eval_transform
from common.run.settings import AugmentationSettings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class AugmentedViews:
    """Several views of an image, the first of them clean: the split batches of ``--aug-splits``.

    Args:
        crop: image -> cropped and flipped image, shared by all views.
        augment: image -> augmented image, drawn anew for each view but the first.
        finish: image -> tensor.
        views: number of them, at least 2.
    """

    def __init__(self, crop: Callable, augment: Callable, finish: Callable, views: int) -> None:
        self.crop, self.augment, self.finish, self.views = crop, augment, finish, views

    def __call__(self, image: Any) -> list[Tensor]:
        base = self.crop(image)
        return [self.finish(base)] + [self.finish(self.augment(base)) for _ in range(self.views - 1)]


def make_train_transform(
    size: int,
    augmentation: AugmentationSettings,
    *,
    no_aug: bool = False,
    scale: Sequence[float] | None = None,
    ratio: Sequence[float] | None = None,
    vflip: float = 0.0,
    views: int = 0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Any], Any]:
    """Random resized crop, flips, RandAugment, normalisation: image -> (3, size, size), or a list of ``views``.

    Args:
        no_aug: only resize the shorter side to ``size`` and crop the centre.
        views: 0, or at least 2 for :class:`AugmentedViews`.
        others: as in :func:`common.data.transforms.train_transform`.
    """
    flags = augmentation
    if no_aug:
        mode = "bilinear" if flags.train_interpolation == "random" else flags.train_interpolation
        return eval_transform(size, crop_ratio=1.0, interpolation=mode, mean=mean, std=std)
    area = None if scale is None else (scale[0], scale[1])
    aspect = None if ratio is None else (ratio[0], ratio[1])
    if views:
        crop, augment, finish = create_transform(  # pyright: ignore[reportGeneralTypeIssues] - three with separate
            size, is_training=True, color_jitter=flags.color_jitter or 0.0, auto_augment=flags.aa,
            interpolation=flags.train_interpolation, scale=area, ratio=aspect, hflip=flags.hflip, vflip=vflip,
            re_prob=0.0, mean=tuple(mean), std=tuple(std), separate=True,
        )  # pyright: ignore[reportArgumentType] # fmt: skip
        return AugmentedViews(crop, accept_zero_bits(augment), finish, views)
    pipeline = build_train_transform(size, replace(flags, reprob=0.0), scale=area, ratio=aspect, mean=mean, std=std)
    if vflip > 0:  # behind the horizontal flip, where timm has it
        pipeline.transforms.insert(2 if flags.hflip > 0 else 1, transforms.RandomVerticalFlip(vflip))  # pyright: ignore
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
        views: split batches; with ``clean_first`` the images of the first are left as they are.
    """
    if probability == 0:
        return None
    splits = views if clean_first else 0
    return RandomErasing(probability, mode=mode, max_count=count, num_splits=splits, device=str(device))
