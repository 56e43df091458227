"""Token labeling: training a teacher with a label for every patch, where maps of such labels exist.

Paper: All Tokens Matter, arXiv:2104.10858 (LV-ViT); the published teachers of SiT were trained this way.
Written from the paper; SiT's own code does not contain it. ``aux_head`` classifies the patch tokens and is trained
here; everywhere else it is frozen.

Form of the maps: for the image ``train/CLASS/NAME.jpg`` the file ``DIR/CLASS/NAME.pt``, a tensor (2, k, H, W) of
torch.save: ``[0]`` the scores of the k best classes of each cell, ``[1]`` their numbers, H x W cells over the whole
image. A random crop takes its part of the map, a flip flips it; RandAugment's small shifts and rotations leave it.

Letters: B batch, C width, K classes, k classes of a cell, S x S patches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import roi_align
from torchvision.transforms import RandomHorizontalFlip

from common.data.loaders import DataError
from common.run.checkpoint import CheckpointError, load_safely
from common.run.wrapping import within
from sit.models import LVViT

Box = tuple[int, int, int, int]
"""Rows from, to, columns from, to, in patches."""


class LabelledImages(Dataset[Any]):
    """Images with their label maps and what the random crop took of them.

    Args:
        dataset: class folders, without a transform.
        root: the data folder, for messages.
        maps: folder of the label maps.
        transform: of training, whose first two steps are a random resized crop and perhaps a flip.

    Raises:
        DataError: if the data set has no image files, or ``maps`` is no folder.
    """

    def __init__(self, dataset: Dataset[Any], root: str | Path, maps: str | Path, size: int, transform: Any) -> None:
        self.samples: list[tuple[str, int]] | None = getattr(dataset, "samples", None)
        if self.samples is None:
            raise DataError(f"token labeling needs class folders of images under {root}, not {type(dataset).__name__}")
        self.maps = Path(maps)
        if not self.maps.is_dir():
            raise DataError(f"--token-label-data {maps}: no such folder; it holds CLASS/NAME.pt for every image")
        self.dataset = dataset
        self.classes = getattr(dataset, "classes", None)
        self.crop, *rest = transform.transforms
        if not isinstance(self.crop, RandomResizedCropAndInterpolation):
            raise DataError(f"token labeling needs random resized crops, which an --input-size of {size} does not have")
        flips = [step for step in rest if isinstance(step, RandomHorizontalFlip)]
        self.flip = flips[0].p if flips else 0.0
        self.rest = [step for step in rest if not isinstance(step, RandomHorizontalFlip)]

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Image (3, size, size); ``label``, ``scores`` and ``classes`` (k, H, W), ``box`` (left, top, right, bottom
        as shares of the image), ``flip``."""
        assert self.samples is not None
        image, label = self.dataset[index]
        scores, classes = self.read_map(Path(self.samples[index][0]))
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        box = torch.tensor(
            [
                left / image.width,
                top / image.height,
                (left + width) / image.width,
                (top + height) / image.height,
            ]
        )
        image = image.crop((left, top, left + width, top + height)).resize(self.crop.size[::-1], resample=3)
        flip = random.random() < self.flip
        if flip:
            image = image.transpose(0)  # left to right
        for step in self.rest:
            image = step(image)
        return image, {"label": label, "scores": scores, "classes": classes, "box": box, "flip": flip}

    def read_map(self, image: Path) -> tuple[Tensor, Tensor]:
        """Scores and class numbers of an image's cells, (k, H, W) each.

        Raises:
            DataError: naming the file.
        """
        path = self.maps / image.parent.name / f"{image.stem}.pt"
        try:
            content = load_safely(path)
        except CheckpointError as error:
            raise DataError(f"label map of {image}: {error}") from error
        if not isinstance(content, Tensor) or content.ndim != 4 or content.shape[0] != 2:
            shape = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
            raise DataError(f"{path}: expected a tensor (2, k, H, W) of scores and class numbers, found {shape}")
        return content[0].float(), content[1].long()


def token_targets(labels: Mapping[str, Tensor], num_classes: int, side: int) -> Tensor:
    """Class probabilities of every patch of a batch, (B, side * side, K).

    Args:
        labels: a batch of what :class:`LabelledImages` gives.

    Source: LV-ViT, arXiv:2104.10858, token labeling: the label of a patch from the cells under the crop, by RoIAlign.
    """
    scores, classes = labels["scores"], labels["classes"]
    batch, _, height, width = scores.shape
    dense = scores.new_zeros(batch, num_classes, height, width).scatter_(1, classes, scores)
    cells = labels["box"].to(scores) * scores.new_tensor([width, height, width, height])
    numbers = torch.arange(batch, device=scores.device, dtype=scores.dtype)[:, None]
    cropped = roi_align(dense, torch.cat((numbers, cells), 1), side, aligned=True)
    cropped = torch.where(labels["flip"][:, None, None, None], cropped.flip(3), cropped)
    probabilities = cropped.flatten(2).transpose(1, 2)
    total = probabilities.sum(-1, keepdim=True)
    return torch.where(total > 0, probabilities / total.clamp_min(1e-12), 1 / num_classes)


def draw_box(side: int) -> Box:
    """Region of MixToken: its share of the area is uniform, its centre anywhere.

    Source: LV-ViT, arXiv:2104.10858, MixToken: a box of patches, after CutMix's.
    """
    share = np.sqrt(1 - np.random.beta(1.0, 1.0))
    half = round(side * share / 2)
    row, column = np.random.randint(side), np.random.randint(side)
    rows, columns = np.clip([row - half, row + half], 0, side), np.clip([column - half, column + half], 0, side)
    return int(rows[0]), int(rows[1]), int(columns[0]), int(columns[1])


def mix_box(grid: Tensor, box: Box) -> Tensor:
    """Swap a region between each image of a batch and its mirror in the batch's order.

    Args:
        grid: (B, C, S, S); the first two axes may hold anything.
    """
    top, bottom, left, right = box
    mixed = grid.clone()
    mixed[:, :, top:bottom, left:right] = grid.flip(0)[:, :, top:bottom, left:right]
    return mixed


class DenseNetwork(nn.Module):
    """An LV-ViT that answers for the class token and for every patch, of images mixed behind the stem."""

    def __init__(self, model: LVViT) -> None:
        super().__init__()
        if model.slimmed:
            raise ValueError("token labeling needs a token for every patch: train the network without slimming")
        self.model = model

    def forward(self, images: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """Logits (B, K) of the class token and (B, N, K) of the patches."""
        return within(self.model, self._answer, images, box)

    def _answer(self, images: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        x, _ = self.model.run_blocks(self.model.embed(images, mix=lambda grid: mix_box(grid, box)), keep=False)
        x = self.model.norm(x)
        return self.model.head(x[:, 0]), self.model.aux_head(x[:, 1:])


def make_step(
    network: nn.Module, side: int, num_classes: int, *, smoothing: float, dense_weight: float
) -> Callable[[tuple[Tensor, Mapping[str, Tensor]]], dict[str, Tensor]]:
    """The training step: cross entropy of the class token plus ``dense_weight`` times that of the patches.

    Args:
        network: :class:`DenseNetwork`, perhaps under DistributedDataParallel.
        side: patches per row.

    Source: LV-ViT, arXiv:2104.10858, token labeling: CE of the class token + beta CE of the patches, beta = 0.5.
    """
    soft = SoftTargetCrossEntropy()  # mean over all but the classes

    def step(batch: tuple[Tensor, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        images, labels = batch
        with torch.no_grad():
            targets = token_targets(labels, num_classes, side)  # (B, N, K)
            classes = F.one_hot(labels["label"], num_classes).to(targets)
            box = draw_box(side)
            share = (box[1] - box[0]) * (box[3] - box[2]) / side**2
            classes = (1 - share) * classes + share * classes.flip(0)
            grid = targets.transpose(1, 2).unflatten(2, (side, side))
            targets = mix_box(grid, box).flatten(2).transpose(1, 2)
            classes, targets = ((1 - smoothing) * chosen + smoothing / num_classes for chosen in (classes, targets))
        logits, dense = network(images, box)
        cls, token = soft(logits.float(), classes), dense_weight * soft(dense.float(), targets)
        return {"loss": cls + token, "loss_cls": cls, "loss_dense": token}

    return step
