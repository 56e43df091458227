"""Images and mixing as both stages use them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import transforms

from common.data.loaders import DataError, build_dataset, eval_transform, train_transform
from common.data.transforms import Transform
from common.run.cli import DATASET_NAMES
from uvc.settings import Mixing

HALF = (0.5, 0.5, 0.5)

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_transforms(dataset: str, size: int) -> tuple[Transform, Transform]:
    """Transforms of training and validation images to (3, size, size).

    ImageNet: random resized crop and flip, bilinear, no further augmentation; validation resizes to 256/224 of the size
    and crops the centre. CIFAR: crops of at least 5 %, validation resizes. Digits and other images of up to 32
    pixels: padded random crops.
    """
    if dataset in ("cifar10", "cifar100"):
        tail = [transforms.ToTensor(), transforms.Normalize(mean=HALF, std=HALF)]
        crop = transforms.RandomResizedCrop((size, size), scale=(0.05, 1.0))
        return transforms.Compose([crop, *tail]), transforms.Compose([transforms.Resize((size, size)), *tail])
    train = train_transform(
        size, auto_augment=None, color_jitter=None, interpolation="bilinear", erase_probability=0.0,
        hflip=0.0 if dataset == "digits" else 0.5,
    )  # fmt: skip
    return train, eval_transform(size, interpolation="bilinear")


def open_datasets(
    name: str, folder: str | Path | None, size: int, *, only_evaluate: bool = False
) -> tuple[Dataset[Any] | None, Dataset[Any]]:
    """Training and validation split; the first is None where only evaluation is wanted.

    Raises:
        DataError: missing or unusable data, saying what to do.
    """
    name = DATASET_NAMES.get(name, name)
    train, test = build_transforms(name, size)
    held_out = build_dataset(name, folder or None, "val", test)
    return None if only_evaluate else build_dataset(name, folder or None, "train", train), held_out


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


def build_mix(classes: int, mixing: Mixing) -> Mix:
    """A function of images and labels (B,) to mixed images and class probabilities (B, classes).

    An odd last image is left out, since mixing pairs them. Without mixup and CutMix labels are smoothed alone.
    """
    if not (mixing.mixup > 0 or mixing.cutmix > 0 or mixing.cutmix_minmax):

        def smooth(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return images, mixup_target(targets, classes, 1.0, mixing.smoothing)

        return smooth
    mixer = Mixup(
        mixing.mixup, mixing.cutmix, mixing.cutmix_minmax, mixing.mixup_prob, mixing.mixup_switch_prob,
        mixing.mixup_mode, label_smoothing=mixing.smoothing, num_classes=classes,
    )  # fmt: skip

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) - len(images) % 2
        if even == 0:
            raise ValueError("mixup pairs images: --train_batch_size (after accumulation) must be at least 2")
        images, targets = mixer(images[:even].clone(), targets[:even])
        return images, targets

    return mix
