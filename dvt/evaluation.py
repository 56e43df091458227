"""What thresholds are found on and judged by: confidence and correctness of every exit on every image.

Shared by ``inference.py``, ``pack.py`` and the desk experiment. Images are taken as the official release takes them:
validation resized to 256 and cropped to 224, the search set 50,000 training images drawn at random, cropped and
flipped at random. CIFAR has its own transforms, see ``cifar.py``.

Letters: K exits, n images.
"""

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from common.data.loaders import DataError, Loader, build_dataset, eval_loader, eval_transform, train_transform
from common.run.cli import dataset_name
from common.run.metrics import ProgressLine
from dvt import SEARCH_IMAGES, TRANSFORMS, cifar
from dvt.costs import exit_gflops
from dvt.engine import check_labels
from dvt.exits import (
    Outcome,
    anytime_top1_percent,
    confidence_and_prediction,
    evaluate_thresholds,
    find_thresholds,
    published_shares,
)
from dvt.losses import exit_logits


@dataclass(frozen=True)
class Scores:
    """What the exits say about images."""

    confidence: Tensor
    """largest probability, (K, n), float32, on the CPU"""
    correct: Tensor
    """whether the answer is right, (K, n), bool, on the CPU"""

    @property
    def anytime(self) -> list[float]:
        """Top-1 of each exit in percent."""
        return anytime_top1_percent(self.correct)


@torch.no_grad()
def collect_scores(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, title: str, show: bool = True
) -> Scores:
    """Run all exits on every image of a loader, in evaluation mode, without autocast.

    Args:
        model: gives the logits of K exits; its mode is restored.
        loader: (images, targets).
        title: of the progress line.

    Raises:
        ValueError: if there is no image, or a label that the model has no class for.
    """
    confidence: list[Tensor] = []
    correct: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with ProgressLine(title, len(loader) if isinstance(loader, Sized) else None, show=show) as line:
            for images, targets in loader:
                logits = torch.stack(exit_logits(model(images.to(device, non_blocking=True))))
                check_labels(targets, logits.shape[-1])
                sure, answers = confidence_and_prediction(logits)
                confidence.append(sure.cpu())
                correct.append(answers.cpu() == targets.cpu())
                line.update(len(targets))
    finally:
        model.train(was_training)
    if not confidence:
        raise ValueError(f"{title}: no image could be read; check the folder")
    return Scores(torch.cat(confidence, dim=1), torch.cat(correct, dim=1))


def search_thresholds(search: Scores, shares: Tensor | None = None) -> Tensor:
    """Thresholds of the published budgets, or of given ``shares``, (P, K)."""
    return find_thresholds(search.confidence, published_shares(len(search.confidence)) if shares is None else shares)


def budgeted(held_out: Scores, gflops: Sequence[float], thresholds: Tensor) -> Outcome:
    """Accuracy and mean cost on held-out images under thresholds found elsewhere."""
    return evaluate_thresholds(held_out.confidence, held_out.correct, gflops, thresholds)


def pack_checkpoint(model: nn.Module, search: Scores, held_out: Scores) -> dict[str, Any]:
    """The five entries of the published format.

    Args:
        model: a trained cascade.
        search: scores on the images that thresholds are found on.
        held_out: scores on the images that accuracies are reported on.

    Returns:
        ``model_state_dict``; ``flops``, cumulative GFLOPs per exit; ``anytime_classification``, top-1 in percent per
        exit; ``dynamic_threshold`` (59, 3); ``budgeted_batch_classification``, [59 costs, 59 accuracies].
    """
    gflops = exit_gflops(model)
    thresholds = search_thresholds(search)
    return {
        "model_state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
        "flops": gflops,
        "anytime_classification": held_out.anytime,
        "dynamic_threshold": thresholds,
        "budgeted_batch_classification": budgeted(held_out, gflops, thresholds).as_lists(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class ImageSource:
    """The images that a checkpoint is run on, as the evaluation of DVT sees them.

    Attributes:
        dataset: ``imagenet``, ``cifar10``, ``cifar100``, ``digits``, or any name of ``build_dataset``.
        root: its folder; not needed for the digits.
        size: side of the images in pixels.
        batch_size: images at once.
        workers: loading processes.
        transforms: one of ``TRANSFORMS``, those that the network was trained with; None: CIFAR's for CIFAR, ImageNet's
            for all else.
    """

    dataset: str
    root: str | None
    size: int
    batch_size: int = 64
    workers: int = 0
    transforms: str | None = None

    def open(self, split: str, *, augment: bool = False) -> Dataset[Any]:
        """One split.

        Args:
            split: ``train`` or ``val``.
            augment: crop and flip at random, as published for the images that thresholds are found on. Digits are not
                flipped.

        Raises:
            ValueError: if ``transforms`` is none that is known.
        """
        dataset = dataset_name(self.dataset)
        transforms = self.transforms or ("cifar" if dataset.startswith("cifar") else "imagenet")
        if transforms not in TRANSFORMS:
            raise ValueError(f"transforms must be one of {', '.join(TRANSFORMS)}, got {transforms!r}")
        flip = 0.0 if dataset == "digits" else 0.5
        if transforms == "cifar":
            transform = cifar.train_transform(self.size, hflip=flip) if augment else cifar.test_transform(self.size)
        elif augment:
            transform = train_transform(
                self.size, auto_augment=None, color_jitter=None, interpolation="bilinear", hflip=flip,
                erase_probability=0.0,
            )  # fmt: skip
        else:
            transform = eval_transform(self.size)
        return build_dataset(dataset, None if dataset == "digits" else self.root, split, transform)

    def held_out(self) -> Loader:
        """Batches of the validation images in their order."""
        return eval_loader(self.open("val"), batch_size=self.batch_size, workers=self.workers)

    def search(self, *, augment: bool = True, count: int = SEARCH_IMAGES, seed: int = 0) -> Loader:
        """Batches of the training images that thresholds are found on, at most ``count``, drawn at random."""
        drawn = draw_search_set(self.open("train", augment=augment), count=count, seed=seed)
        return eval_loader(drawn, batch_size=self.batch_size, workers=self.workers, seed=seed)


def draw_search_set(dataset: Dataset[Any], *, count: int = SEARCH_IMAGES, seed: int = 0) -> Subset[Any]:
    """At most ``count`` images drawn at random, in random order, the same for the same seed."""
    if isinstance(dataset, IterableDataset):
        raise DataError(
            "thresholds are found on images drawn at random, which a stream cannot give: use a data set with an "
            "index, such as class folders or hfds/, or a packed checkpoint with --eval_mode 1"
        )
    total = len(dataset)  # pyright: ignore[reportArgumentType]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[-count:].tolist())
