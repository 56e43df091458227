"""Small images that stay in memory as bytes, and loaders that augment them a batch at a time.

Fashion-MNIST: ``fashion`` is a part that ships inside, ``fashion_tune`` cuts a validation split from its training
images, ``fashion_full`` is all of it, from files of the user's. The 28x28 images get a black frame of 2 pixels.

Per image, torchvision's and timm's transforms take longer than a small network's whole training step, so a transform
whose every step is known here (padded crop, flip, normalisation) is applied to whole batches. What it draws for an
image is a function of seed, epoch, image and repeat, as it is for the loaders of images in files.
"""

import gzip
import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from common.data.paths import check_split
from common.run.checkpoint.fetching import BROKEN, persist
from common.run.errors import DataError
from common.run.files import read_file

FASHION = Path(__file__).parent / "fashion" / "fashion.npz"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FRAME = 2
TUNE_EVERY = 6
"""``fashion_tune`` holds out every sixth training image of a class."""
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the files of ``fashion_full``."""
IDX = {"train": "train", "val": "t10k"}
LARGEST = 16 + 60_000 * 28 * 28
"""Bytes of the largest of its files."""


class MemoryImages(Dataset[Any]):
    """Grey images, all in memory.

    Args:
        pixels: (N, height, width), uint8.
        labels: (N,).
        transform: of the RGB image; None yields the image itself.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, classes: Sequence[str], transform: Any = None) -> None:
        self.pixels, self.labels, self.classes, self.transform = pixels, labels, classes, transform

    @property
    def targets(self) -> list[int]:
        return self.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index].numpy()).convert("RGB")
        return (self.transform(image) if self.transform else image), int(self.labels[index])


def open_fashion(name: str, root: str | Path | None, split: str, transform: Any, *, download: bool) -> MemoryImages:
    """A split of ``fashion``, ``fashion_tune`` or ``fashion_full``.

    Raises:
        DataError: a split other than train and val, or files that are not there.
    """
    check_split(name, split)
    if name == "fashion_full":
        images, labels = read_idx(_folder_of_idx(root, download), split)
    else:
        source = "train" if name == "fashion_tune" else split
        images, labels = _shipped(FASHION, source)
    if name == "fashion_tune":
        order = np.argsort(labels, kind="stable")  # so that every sixth of a class is every sixth of all
        held_out = np.zeros(len(labels), bool)
        held_out[order[::TUNE_EVERY]] = True
        images, labels = (values[held_out == (split == "val")] for values in (images, labels))
    pixels = torch.from_numpy(np.pad(images, ((0, 0), (FRAME, FRAME), (FRAME, FRAME))))
    return MemoryImages(pixels, torch.from_numpy(labels.astype(np.int64)), CLASSES, transform)


@cache
def _shipped(file: Path, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Unpacked once a process: it takes as long as an epoch of a tiny network."""
    with np.load(file, allow_pickle=False) as content:
        return content[f"{source}_images"], content[f"{source}_labels"]


def read_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,), uint8, of two IDX files, compressed or not.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    found = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        path = folder / f"{IDX[split]}-{kind}-ubyte"
        path = path if path.is_file() else path.with_name(path.name + ".gz")
        try:
            content = read_file(path)
            if path.suffix == ".gz":  # never more than the set holds, whatever the file would inflate to
                content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LARGEST + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read {path} ({error}): expected the IDX files of Fashion-MNIST") from error
        shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, 4 + 4 * dimensions, 4)]
        values = np.frombuffer(content, np.uint8)[4 + 4 * dimensions :]
        if content[:4] != bytes((0, 0, 8, dimensions)) or not values.size == math.prod(shape) > 0:
            raise DataError(
                f"{path} is no IDX file of {dimensions} dimensions of bytes, is empty, too long or cut short"
            )
        found.append(values.reshape(shape))
    images, labels = found
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max(initial=0) >= len(CLASSES):
        raise DataError(f"{folder}: the {split} images and labels are not those of Fashion-MNIST: {images.shape}")
    return images, labels


def _folder_of_idx(root: str | Path | None, fetch: bool) -> Path:
    if not root:
        if DEBIAN.is_dir():
            return DEBIAN
        raise DataError(
            "fashion_full needs --data-path, a folder with train-images-idx3-ubyte.gz and its three companions "
            "(Debian: apt install dataset-fashion-mnist; elsewhere: torchvision.datasets.FashionMNIST(DIR, "
            "download=True)); the data set fashion, a part of it, needs none"
        )
    folder = Path(root).expanduser()
    if fetch:
        from torchvision.datasets import FashionMNIST

        download("Fashion-MNIST", folder, lambda: FashionMNIST(str(folder), download=True))
    inside = folder / "FashionMNIST" / "raw"  # where torchvision puts them
    return inside if inside.is_dir() else folder


def download(name: str, folder: Path, get: Callable[[], Any]) -> Any:
    """What torchvision's ``get()`` returns once it has fetched a data set into a folder.

    Raises:
        DataError: no connection, or one that broke three times; a file that is not what it should be.
    """
    try:
        return persist(get, name)
    except (*BROKEN, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"cannot download {name} to {folder} ({reason}); try again, or get its files elsewhere and put them there"
        ) from error


@dataclass(frozen=True)
class BatchTransform:
    """A padded crop, a flip and a normalisation of whole batches."""

    size: int
    padding: int
    flip: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def random(self) -> bool:
        return self.padding > 0 or self.flip > 0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3): row and column at which each crop begins, and whether it is flipped."""
        corners = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        return torch.cat([corners, (torch.rand(count, 1, generator=generator) < self.flip).long()], dim=1)

    def __call__(self, pixels: Tensor, drawn: Tensor | None) -> Tensor:
        """(B, 3, size, size), float32, of (B, size, size) bytes."""
        if drawn is not None:
            pixels = F.pad(pixels, (self.padding,) * 4)
            row, column, flipped = drawn.unbind(1)
            steps = torch.arange(self.size)
            columns = torch.where(flipped[:, None] == 1, self.size - 1 - steps, steps) + column[:, None]
            rows = row[:, None] + steps
            pixels = pixels[torch.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]
        grey = pixels[:, None].expand(-1, 3, -1, -1).float().div(255)  # divided as ToTensor divides
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return grey.sub_(mean).div_(std)


def batch_transform(transform: Any, size: tuple[int, int]) -> BatchTransform | None:
    """These steps of torchvision and timm on whole batches of images of ``size``; None if one is unknown."""
    padding, flip, normal = 0, 0.0, None
    for step in getattr(transform, "transforms", [transform]):
        if isinstance(step, transforms.RandomCrop) and isinstance(step.padding, int) and not step.fill:
            padding = step.padding
            known = tuple(step.size) == size and step.padding_mode == "constant"
        elif isinstance(step, transforms.RandomHorizontalFlip):
            flip, known = float(step.p), True
        elif isinstance(step, transforms.Resize):
            known = step.size == size[0] == size[1]
        elif isinstance(step, transforms.CenterCrop):
            known = tuple(step.size) == size
        elif isinstance(step, transforms.Normalize):
            normal, known = step, True
        elif isinstance(step, transforms.ColorJitter):  # timm appends one that changes nothing
            known = not any((step.brightness, step.contrast, step.saturation, step.hue))
        else:
            known = isinstance(step, (transforms.ToTensor, MaybeToTensor))
        if not known:
            return None
    if normal is None or size[0] != size[1]:
        return None
    mean, std = (tuple(torch.as_tensor(values).tolist()) for values in (normal.mean, normal.std))
    return BatchTransform(size[0], padding, flip, mean, std)
