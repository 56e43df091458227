"""Training images as timm makes them for DVT: options of its transforms that the other papers do not use.

Random erasing is not here: as published, it comes after mixup, see :class:`dvt.engine.CascadeStep`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from common.data.build import build_train_transform
from common.data.transforms import accept_zero_bits, eval_transform
from common.run.settings import AugmentationSettings


@dataclass(frozen=True)
class AugmentedViews:
    """Several views of an image, the first of them clean: the split batches of ``--aug-splits``.

    Args:
        crop: image -> cropped and flipped image, shared by all views.
        augment: image -> augmented image, drawn anew for each view but the first.
        finish: image -> tensor.
        views: number of them, at least 2.
    """

    crop: Callable
    augment: Callable
    finish: Callable
    views: int

    def __call__(self, image: Any) -> list[Tensor]:
        base = self.crop(image)
        return [self.finish(base)] + [self.finish(self.augment(base)) for _ in range(self.views - 1)]


def make_train_transform(
    size: int,
    augmentation: AugmentationSettings,
    *,
    no_aug: bool = False,
    scale: tuple[float, float] | None = None,
    ratio: tuple[float, float] | None = None,
    vflip: float = 0.0,
    views: int = 0,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Callable[[Any], Any]:
    """Random resized crop, flips, RandAugment, normalisation: image -> (3, size, size), or a list of ``views``.

    Args:
        no_aug: only resize the shorter side to ``size`` and crop the centre.
        views: 0, or at least 2 for :class:`AugmentedViews`.
        others: as in :func:`common.data.transforms.train_transform`.
    """
    flags = augmentation
    colours: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std)}
    if no_aug:
        mode = "bilinear" if flags.train_interpolation == "random" else flags.train_interpolation
        return eval_transform(size, crop_ratio=1.0, interpolation=mode, **colours)
    if views:
        crop, augment, finish = create_transform(  # pyright: ignore[reportGeneralTypeIssues] - three with separate
            size, is_training=True, color_jitter=flags.color_jitter or 0.0, auto_augment=flags.aa, scale=scale,
            interpolation=flags.train_interpolation, ratio=ratio, hflip=flags.hflip, vflip=vflip, re_prob=0.0,
            separate=True, **colours,
        )  # pyright: ignore[reportArgumentType] # fmt: skip
        return AugmentedViews(crop, accept_zero_bits(augment), finish, views)
    pipeline = build_train_transform(size, replace(flags, reprob=0.0), scale=scale, ratio=ratio, **colours)
    if vflip > 0:  # behind the horizontal flip, where timm has it
        pipeline.transforms.insert(2 if flags.hflip > 0 else 1, transforms.RandomVerticalFlip(vflip))  # pyright: ignore
    return pipeline
