"""What thresholds are found on and judged by: confidence and correctness of every exit on every picture.

Shared by ``inference.py``, ``pack.py`` and the desk experiment. Pictures are taken as the official release takes them:
validation resized to 256 and cropped to 224, the search set 50,000 training pictures drawn at random, cropped and
flipped at random. CIFAR has its own transforms, see ``cifar.py``.

Letters: K exits, n pictures.
"""

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from common.data.datasets import DEIT_NAMES
from common.data.loaders import DataError, build_dataset, eval_loader, eval_transform, train_transform
from common.measure.flops import gmacs
from common.run.metrics import ProgressLine
from dvt import cifar
from dvt.exits import (
    Outcome,
    anytime_top1_percent,
    confidence_and_prediction,
    evaluate_thresholds,
    find_thresholds,
    published_shares,
)
from dvt.models import Cascade

SEARCH_PICTURES = 50_000
"""Training pictures on which thresholds are found, at most."""

PICTURES = ("imagenet", "cifar")
"""Transforms of pictures: the published ones of DVT, and those of T2T-ViT's transfer to CIFAR."""


@dataclass(frozen=True)
class Scores:
    """What the exits say about pictures."""

    confidence: Tensor
    """largest probability, (K, n), float32, on the CPU"""
    correct: Tensor
    """whether the answer is right, (K, n), bool, on the CPU"""

    @property
    def anytime(self) -> list[float]:
        """Top-1 of each exit in percent."""
        return anytime_top1_percent(self.correct)


def cascade_gflops(model: Cascade) -> list[float]:
    """Cumulative cost of the exits in GFLOPs (multiply-accumulates), counted as the authors did."""
    return [gmacs(counts, "fvcore") for counts in model.count_ops(published=True)]


@torch.no_grad()
def collect_scores(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, title: str, show: bool = True
) -> Scores:
    """Run all exits on every picture of a loader, in evaluation mode, without autocast.

    Args:
        model: gives the logits of K exits; its mode is restored.
        loader: (images, targets).
        title: of the progress line.

    Raises:
        ValueError: if there is no picture, or a label that the model has no class for.
    """
    confidence: list[Tensor] = []
    correct: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with ProgressLine(title, len(loader) if isinstance(loader, Sized) else None, show=show) as line:
            for images, targets in loader:
                logits = torch.stack(list(model(images.to(device, non_blocking=True))))
                check_targets(targets, logits.shape[-1])
                sure, answers = confidence_and_prediction(logits)
                confidence.append(sure.cpu())
                correct.append(answers.cpu() == targets.cpu())
                line.update(len(targets))
    finally:
        model.train(was_training)
    if not confidence:
        raise ValueError(f"{title}: no picture could be read; check the folder")
    return Scores(torch.cat(confidence, dim=1), torch.cat(correct, dim=1))


def check_targets(targets: Tensor, classes: int) -> None:
    """Refuse labels that the network has no class for.

    Raises:
        ValueError: naming label and classes.
    """
    if len(targets) and int(targets.max()) >= classes:
        raise ValueError(
            f"the data has a label {int(targets.max())}, the network only {classes} classes: check --num-classes and "
            "that the checkpoint belongs to this data set"
        )


def search_thresholds(search: Scores, shares: Tensor | None = None) -> Tensor:
    """Thresholds of the published budgets, or of given ``shares``, (P, K)."""
    return find_thresholds(search.confidence, published_shares(len(search.confidence)) if shares is None else shares)


def budgeted(held_out: Scores, gflops: Sequence[float], thresholds: Tensor) -> Outcome:
    """Accuracy and mean cost on held-out pictures under thresholds found elsewhere."""
    return evaluate_thresholds(held_out.confidence, held_out.correct, gflops, thresholds)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def open_pictures(
    dataset: str,
    root: str | None,
    split: str,
    *,
    size: int,
    augment: bool,
    pictures: str | None = None,
    on_bad_image: str = "raise",
) -> Dataset[Any]:
    """One split of a data set as the evaluation of DVT sees it.

    Args:
        dataset: ``imagenet``, ``cifar10``, ``cifar100``, ``digits``, or any name of ``build_dataset``.
        root: its folder; not needed for the digits.
        split: ``train`` or ``val``.
        size: side of the pictures in pixels.
        augment: crop and flip at random, as published for the pictures that thresholds are found on. Digits are not
            flipped.
        pictures: ``imagenet`` or ``cifar``, the transforms that the network was trained with; None: CIFAR's for CIFAR,
            ImageNet's for all else.
        on_bad_image: ``raise`` or ``skip``.

    Raises:
        ValueError: if ``pictures`` is neither.
    """
    dataset = DEIT_NAMES.get(dataset, dataset)
    pictures = pictures or ("cifar" if dataset.startswith("cifar") else "imagenet")
    if pictures not in PICTURES:
        raise ValueError(f"pictures must be one of {', '.join(PICTURES)}, got {pictures!r}")
    flip = 0.0 if dataset == "digits" else 0.5
    if pictures == "cifar":
        picture = cifar.train_picture(size, hflip=flip) if augment else cifar.test_picture(size)
    elif augment:
        picture = train_transform(
            size, auto_augment=None, color_jitter=None, interpolation="bilinear", hflip=flip, erase_probability=0.0
        )
    else:
        picture = eval_transform(size)
    return build_dataset(dataset, None if dataset == "digits" else root, split, picture, on_bad_image=on_bad_image)


def draw_search_set(dataset: Dataset[Any], *, count: int = SEARCH_PICTURES, seed: int = 0) -> Dataset[Any]:
    """At most ``count`` pictures drawn at random, in random order, the same for the same seed."""
    if isinstance(dataset, IterableDataset):
        raise DataError(
            "thresholds are found on pictures drawn at random, which a stream cannot give: use a data set with an "
            "index, such as class folders or hfds/, or a packed checkpoint with --eval_mode 1"
        )
    total = len(dataset)  # pyright: ignore[reportArgumentType]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[-count:].tolist())


def search_loader(
    dataset: str,
    root: str | None,
    *,
    size: int,
    batch_size: int,
    workers: int = 0,
    augment: bool = True,
    count: int = SEARCH_PICTURES,
    seed: int = 0,
    pictures: str | None = None,
) -> Any:
    """Batches of the pictures that thresholds are found on; see :func:`open_pictures`."""
    split = open_pictures(dataset, root, "train", size=size, augment=augment, pictures=pictures)
    drawn = draw_search_set(split, count=count, seed=seed)
    return eval_loader(drawn, batch_size=batch_size, workers=workers, seed=seed)


def held_out_loader(
    dataset: str, root: str | None, *, size: int, batch_size: int, workers: int = 0, pictures: str | None = None
) -> Any:
    """Batches of the validation pictures in their order; see :func:`open_pictures`."""
    split = open_pictures(dataset, root, "val", size=size, augment=False, pictures=pictures)
    return eval_loader(split, batch_size=batch_size, workers=workers)
