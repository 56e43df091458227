"""From settings to images: splits, transforms, loaders, mixup, and how many classes the network gets.

batches = build_loaders(DataSettings.of(args), AugmentationSettings.of(args), classes=args.num_classes)
batches.train, batches.held_out, batches.classes
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.data.mixup import Mixup
from torch.utils.data import Dataset

from common.data.datasets import NUM_CLASSES, build_dataset, compare_classes, default_num_classes
from common.data.loaders import Loader, eval_loader, train_loader
from common.data.transforms import Transform, eval_transform, train_transform
from common.run import cli
from common.run.errors import UsageError
from common.run.program import get_logger
from common.run.settings import AugmentationSettings, DataSettings

logger = get_logger(__name__)


def open_split(data: DataSettings, split: str, transform: Transform | None, *, download: bool = False) -> Dataset[Any]:
    """One split of ``--data-set``, the other need not exist."""
    return build_dataset(
        cli.dataset_name(data.data_set), data.data_path, split, transform, download=download,
        on_bad_image="skip" if data.skip_bad_images else "raise", inat_category=data.inat_category,
        batch_size=data.batch_size, seed=data.seed,
        keep_decoded=data.cache_decoded if split == "val" and transform else None,
    )  # fmt: skip


def build_train_transform(size: int, augmentation: AugmentationSettings, **more: Any) -> Transform:
    """What the augmentation flags say; ``more`` goes to ``train_transform``."""
    return train_transform(
        size, auto_augment=augmentation.aa, color_jitter=augmentation.color_jitter, hflip=augmentation.hflip,
        interpolation=augmentation.train_interpolation, erase_probability=augmentation.reprob,
        erase_mode=augmentation.remode, erase_count=augmentation.recount, **more,
    )  # fmt: skip


def build_mixup(augmentation: AugmentationSettings, classes: int) -> Mixup | None:
    """Mixup and CutMix with label smoothing, or None where both are off."""
    if not augmentation.mixes:
        return None
    return Mixup(
        augmentation.mixup, augmentation.cutmix, augmentation.cutmix_minmax, augmentation.mixup_prob,
        augmentation.mixup_switch_prob, augmentation.mixup_mode, label_smoothing=augmentation.smoothing,
        num_classes=classes,
    )  # fmt: skip


def count_classes(data_set: str, dataset: Dataset[Any], wanted: int | None = None) -> int:
    """Classes of the network: ``--num-classes``, else as many as the data has, which is said where it surprises.

    Args:
        data_set: value of ``--data-set``.
        dataset: an open split.
        wanted: value of ``--num-classes``.

    Raises:
        UsageError: the data set has more classes than wanted.
        DataError: neither is known.
    """
    name = cli.dataset_name(data_set)
    inside = len(getattr(dataset, "classes", None) or ()) or wanted or default_num_classes(name)
    if wanted is None:
        if (usual := NUM_CLASSES.get(name, inside)) != inside:
            logger.warning(
                "the data set has %d classes, not %s's %d: so has the network (--num-classes %d to keep those)",
                inside, name, usual, usual,
            )  # fmt: skip
        return inside
    if inside > wanted:
        raise UsageError(f"the data set has {inside} classes and the network {wanted}; see --num-classes")
    if inside < wanted:
        logger.warning(
            "the data set has %d classes and the network %d: --num-classes %d was probably meant", inside, wanted,
            inside,
        )  # fmt: skip
    return wanted


def check_same_classes(data_set: str, train: Dataset[Any], held_out: Dataset[Any]) -> None:
    """Refuse splits that number their classes differently, see ``compare_classes``; splits without names pass."""
    names: list[list[str]] = [list(getattr(split, "classes", None) or ()) for split in (train, held_out)]
    if all(names):
        compare_classes(names[0], names[1], f"--data-set {data_set}: held out are not the classes of training")


def check_trained_classes(content: Any, images: Loader, source: str | os.PathLike[str]) -> None:
    """Compare the classes of images to evaluate on with those that a checkpoint of ours says it was trained on.

    Files and images that do not name their classes pass. All names may be others, such as numbers in place of synsets:
    that is said, and passes, too.

    Args:
        content: of a file.
        images: of a data set.
        source: of ``content``, for messages.

    Raises:
        DataError: classes of the same names have other numbers, or some are missing.
    """
    data = content.get("data") if isinstance(content, Mapping) else None
    before = data.get("classes") if isinstance(data, Mapping) else None
    now = class_names(images)
    if not isinstance(before, str) or now is None or before == now:
        return
    trained, found = before.split("\n"), now.split("\n")
    if set(trained) & set(found):
        compare_classes(trained, found, f"{source}: these are not the classes that it was trained on")
    logger.warning(
        "%s was trained on classes of other names (%s, ...) than the images have (%s, ...): the accuracy means nothing "
        "unless they are the same in the same order", source, trained[0], found[0],
    )  # fmt: skip


def class_names(images: Loader) -> str | None:
    """Names of the classes of a loader's images, a line each in their order, as files have them; None without any."""
    found = images.about().get("classes") if hasattr(images, "about") else None
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class Batches:
    """Loaders of a run, and the number of classes; ``train`` is None where only evaluation is wanted."""

    train: Loader | None
    held_out: Loader
    classes: int


def build_loaders(
    data: DataSettings,
    augmentation: AugmentationSettings | None = None,
    *,
    classes: int | None = None,
    eval_batch_size: int | None = None,
    train: Transform | None = None,
    held_out: Transform | None = None,
) -> Batches:
    """Images to train on and to evaluate on.

    Args:
        augmentation: None opens the held-out split alone.
        classes: value of ``--num-classes``; see :func:`count_classes`.
        eval_batch_size: images per evaluation batch; the training's by default.
        train, held_out: transforms in place of those that the settings describe.
    """
    kept = open_split(data, "val", held_out or eval_transform(data.input_size, crop_ratio=data.eval_crop_ratio))
    loading: dict[str, Any] = {"workers": data.workers, "pin_memory": data.pin_mem, "seed": data.seed}
    held_out_batches = eval_loader(kept, batch_size=eval_batch_size or data.batch_size, **loading)
    batches = None
    if augmentation is not None:
        images = open_split(data, "train", train or build_train_transform(data.input_size, augmentation))
        check_same_classes(data.data_set, images, kept)
        batches = train_loader(images, batch_size=data.batch_size, repeated_aug=augmentation.repeated_aug, **loading)
    return Batches(batches, held_out_batches, count_classes(data.data_set, kept, classes))
