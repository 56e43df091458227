"""What thresholds are found on and judged by: confidence and correctness of every exit on every image.

Shared by ``inference.py``, ``pack.py`` and ``evidence.py``. Images are taken as the official release takes them:
validation resized to 256 and cropped to 224, the search set 50,000 training images drawn at random, cropped and
flipped at random. CIFAR has its own transforms, see ``cifar.py``.

Letters: K exits, n images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from common.data.loaders import DataError, Loader, build_dataset, eval_loader, eval_transform, train_transform
from common.run.cli import dataset_name
from common.run.settings import Settings
from dvt import SEARCH_IMAGES, TRANSFORMS, cifar
from dvt.engine import run_exits
from dvt.exits import Outcome, anytime_top1_percent, confidence_and_prediction, evaluate_thresholds


@dataclass(frozen=True)
class Scores:
    """What the exits say about images, on the CPU."""

    confidence: Tensor  # largest probability, (K, n), float32
    correct: Tensor  # whether the answer is right, (K, n), bool

    @property
    def anytime(self) -> list[float]:
        """Top-1 of each exit in percent."""
        return anytime_top1_percent(self.correct)

    def leave(self, gflops: Sequence[float], thresholds: Tensor) -> Outcome:
        """Accuracy and mean cost under thresholds, which were found elsewhere."""
        return evaluate_thresholds(self.confidence, self.correct, gflops, thresholds)


def collect_scores(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, title: str, show: bool = True
) -> Scores:
    """Run all exits on every image of a loader, without autocast; arguments as in :func:`~dvt.engine.run_exits`.

    Raises:
        ValueError: if there is no image, or a label that the model has no class for.
    """
    confidence: list[Tensor] = []
    correct: list[Tensor] = []
    for logits, targets in run_exits(model, loader, device=device, title=title, show=show):
        sure, answers = confidence_and_prediction(torch.stack(logits))
        confidence.append(sure.cpu())
        correct.append((answers == targets).cpu())
    if not confidence:
        raise ValueError(f"{title}: no image could be read; check the folder")
    return Scores(torch.cat(confidence, dim=1), torch.cat(correct, dim=1))


# ---------------------------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class ImageSource(Settings):
    """The images that a checkpoint is run on, as the evaluation of DVT sees them."""

    dataset: str  # imagenet, cifar10, cifar100, digits, fashion, or any name of build_dataset
    root: str | None  # its folder; not needed for what ships inside
    size: int  # side of the images in pixels
    batch_size: int = 64
    workers: int = 0
    transforms: str | None = None  # of TRANSFORMS, as in training; None: CIFAR's for CIFAR, ImageNet's for all else
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    crop_ratio: float = 0.875

    def open(self, split: str, *, augment: bool = False, plain: bool = False) -> Dataset[Any]:
        """One split, ``train`` or ``val``.

        Args:
            augment: crop at random and, but for digits, flip, as published for images that thresholds are found on.
            plain: images as they are, without any transform.
        """
        dataset = dataset_name(self.dataset)
        transforms = self.transforms or ("cifar" if dataset.startswith("cifar") else "imagenet")
        if transforms not in TRANSFORMS:
            raise ValueError(f"transforms must be one of {', '.join(TRANSFORMS)}, got {transforms!r}")
        colours: dict[str, Any] = {"mean": self.mean, "std": self.std}
        flip = 0.0 if dataset == "digits" else 0.5
        if plain:
            transform = None
        elif transforms == "cifar":
            transform = cifar.train_transform(self.size, hflip=flip) if augment else cifar.test_transform(self.size)
        elif augment:
            plainly: dict[str, Any] = {"auto_augment": None, "color_jitter": None, "erase_probability": 0.0}
            transform = train_transform(self.size, interpolation="bilinear", hflip=flip, **plainly, **colours)
        else:
            transform = eval_transform(self.size, crop_ratio=self.crop_ratio, **colours)
        return build_dataset(dataset, self.root, split, transform)

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
