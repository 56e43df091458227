"""Images and mixing as both stages use them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import transforms

from common.data.build import Batches, build_mixup, build_train_transform, check_same_classes, open_split
from common.data.datasets import num_classes
from common.data.loaders import eval_loader, train_loader
from common.data.transforms import Pipeline, Transform, eval_transform
from common.run.errors import DataError
from common.run.settings import AugmentationSettings
from uvc.settings import Run

HALF = (0.5, 0.5, 0.5)

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_transforms(settings: Run, size: int) -> tuple[Transform, Transform]:
    """Transforms of training and validation images to (3, size, size); without augmentation they are the same.

    ImageNet: random resized crop and flip, bilinear, no further augmentation; validation resizes to 256/224 of the size
    and crops the centre. CIFAR: crops of at least 5 %, validation resizes. Digits and other images of up to 32
    pixels: padded random crops.
    """
    if settings.data.data_set in ("cifar10", "cifar100"):
        tail = [transforms.ToTensor(), transforms.Normalize(mean=HALF, std=HALF)]
        train = Pipeline([transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0)), *tail])
        held_out = Pipeline([transforms.Resize((size, size)), *tail])
    else:
        train = build_train_transform(size, settings.augmentation)
        held_out = eval_transform(size, interpolation="bilinear")
    return (train if settings.augment else held_out), held_out


def open_batches(settings: Run, *, size: int, data_rate: float = 1.0) -> Batches:
    """Training and validation batches; the first are None where only evaluation is wanted.

    Args:
        size: side of the images in pixels.
        data_rate: share of each class's training images to take, see ``first_of_each_class``.

    Raises:
        DataError: missing or unusable data, saying what to do.
    """
    data, batches = settings.data, None
    train, held_out = build_transforms(settings, size)
    kept = open_split(data, "val", held_out)
    if not settings.run.eval:
        images = open_split(data, "train", train)
        check_same_classes(data.data_set, images, kept)
        images = first_of_each_class(images, data_rate)
        batches = train_loader(images, batch_size=data.batch_size, workers=data.workers, seed=data.seed)
    test_batches = eval_loader(kept, batch_size=settings.eval_batch_size, workers=data.workers)
    return Batches(batches, test_batches, num_classes(kept))


def first_of_each_class(images: Dataset[Any], share: float) -> Dataset[Any]:
    """The first ``share`` of each class's images, rounded up, in the order of the data set; 1 takes all.

    Raises:
        DataError: the data set does not tell its labels without opening its images.
    """
    if share >= 1:
        return images
    labels = getattr(images, "targets", None)
    labels = getattr(getattr(images, "reader", None), "targets", None) if labels is None else labels
    if labels is None:
        raise DataError(f"{type(images).__name__} does not list its labels, so no share of each class can be taken")
    numbers = np.asarray(labels)
    chosen = [np.flatnonzero(numbers == label) for label in np.unique(numbers)]
    chosen = [places[: math.ceil(share * len(places))] for places in chosen]
    subset = Subset(images, sorted(np.concatenate(chosen).tolist()))
    subset.classes = getattr(images, "classes", None)  # pyright: ignore[reportAttributeAccessIssue] - as others have
    return subset


def build_mix(augmentation: AugmentationSettings, classes: int) -> Mix:
    """A function of images and labels (B,) to mixed images and class probabilities (B, classes).

    An odd last image is left out, since mixing pairs them. Without mixup and CutMix labels are smoothed alone.
    """
    mixup = build_mixup(augmentation, classes)

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if mixup is None:
            return images, mixup_target(targets, classes, 1.0, augmentation.smoothing)
        even = len(images) - len(images) % 2
        if even == 0:
            raise ValueError("mixup pairs images: --train_batch_size (after accumulation) must be at least 2")
        return mixup(images[:even].clone(), targets[:even])

    return mix
