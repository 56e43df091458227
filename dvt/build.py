"""What ``main.py`` is built of besides what all trainers share: training images, optimiser, record."""

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.data.transforms_factory import create_transform
from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from torch import Tensor, nn
from torchvision import transforms

from common.data.build import build_train_transform
from common.data.transforms import accept_zero_bits, eval_transform
from common.run import build
from common.run.settings import AugmentationSettings, OptimizerSettings


@dataclass(frozen=True)
class AugmentedViews:
    """Several views of an image, the first of them clean: the split batches of ``--aug-splits``."""

    crop: Callable[[Any], Any]  # image -> cropped and flipped image, shared by all views
    augment: Callable[[Any], Any]  # image -> augmented image, drawn anew for each view but the first
    finish: Callable[[Any], Any]  # image -> tensor
    views: int  # at least 2

    def __call__(self, image: Any) -> list[Tensor]:
        base = self.crop(image)
        return [self.finish(base)] + [self.finish(self.augment(base)) for _ in range(self.views - 1)]


@dataclass(frozen=True)
class TrainingImages(AugmentationSettings):
    """Augmentation with what the other papers do not use, by the names of the flags."""

    no_aug: bool = False  # only resize the shorter side and crop the centre
    scale: Sequence[float] | None = None
    ratio: Sequence[float] | None = None
    vflip: float = 0.0
    aug_splits: int = 0  # views of an image, at least 2; 0 for the image itself

    def transform(self, size: int, **colours: Sequence[float]) -> Callable[[Any], Any]:
        """Random resized crop, flips, RandAugment, normalisation: image -> (3, size, size), or a list of views.

        No random erasing: as published, it comes after mixup, see :class:`dvt.engine.CascadeStep`. ``colours`` are mean
        and std.
        """
        if self.no_aug:
            mode = "bilinear" if self.train_interpolation == "random" else self.train_interpolation
            return eval_transform(size, crop_ratio=1.0, interpolation=mode, **colours)
        crop: Any = {"scale": self.scale, "ratio": self.ratio, **colours}
        if self.aug_splits:
            parts: Any = create_transform(
                size, is_training=True, color_jitter=self.color_jitter or 0.0, auto_augment=self.aa, hflip=self.hflip,
                interpolation=self.train_interpolation, vflip=self.vflip, re_prob=0.0, separate=True, **crop,
            )  # fmt: skip
            return AugmentedViews(parts[0], accept_zero_bits(parts[1]), parts[2], self.aug_splits)
        pipeline: Any = build_train_transform(size, replace(self, reprob=0.0), **crop)
        if self.vflip > 0:  # behind the horizontal flip, where timm has it
            pipeline.transforms.insert(2 if self.hflip > 0 else 1, transforms.RandomVerticalFlip(self.vflip))
        return pipeline


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, *, decay_tokens: bool = True
) -> torch.optim.Optimizer:
    """timm's optimiser. The published cascades decay their class tokens and position tables; so does this one."""
    groups = None
    if not decay_tokens:
        tokens = [name for name, _ in model.named_parameters() if name.endswith(("cls_token", "pos_embed"))]
        groups = partial(param_groups_weight_decay, weight_decay=settings.weight_decay, no_weight_decay_list=tokens)
    return build.build_optimizer(model, settings, group_fn=groups)


def published_summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """``summary.csv`` in the published columns, from the rows of ``log.jsonl``."""
    epochs = [row for row in rows if row["event"] == "epoch"]
    names = [name for name in epochs[-1] if re.fullmatch("test_(loss|exit._top.)", name)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator=os.linesep)
    table.writerow(["epoch", "train_loss", *(name.replace("test_", "eval_") for name in names)])
    table.writerows([row.get(name) for name in ("epoch", "train_loss", *names)] for row in epochs)
    return text.getvalue()
