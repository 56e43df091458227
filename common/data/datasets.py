"""Datasets by name: class folders, tar files, iNaturalist, CIFAR, digits, Fashion-MNIST, all that timm's factory opens.

Every dataset of images yields (image through ``transform``, class number) and has ``classes``, the class names in
the order of their numbers. Nothing is skipped or replaced in silence: timm's own ``ImageDataset`` would return the next
image in place of one that does not decode, so its readers are used without it.
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.readers import reader_wds, set_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.transforms import Compose

from common.data.decoded import DecodedImages
from common.data.images import SUFFIXES, UnknownRange, bad_image, decode_image, images_below, to_rgb
from common.data.images import BadImageError as BadImageError
from common.data.images import load_image as load_image
from common.data.memory import MemoryImages, download, open_fashion
from common.data.paths import FETCHED, check_split, contents, existing_folder
from common.data.transforms import Transform
from common.run.cli import dataset_name
from common.run.errors import DataError as DataError
from common.run.files import read_file
from common.run.settings import INAT_CATEGORIES

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "img_val", "validation", "valid")}
FASHION = ("fashion", "fashion_tune", "fashion_full")
NUM_CLASSES = {"imagenet": 1000, "inat18": 8142, "inat19": 1010, "cifar10": 10, "cifar100": 100, "digits": 10} | (
    dict.fromkeys(FASHION, 10)
)


def build_dataset(
    name: str,
    root: str | Path | None,
    split: str,
    transform: Transform | None,
    *,
    on_bad_image: str = "raise",
    download: bool = False,
    inat_category: str = "name",
    batch_size: int = 1,
    seed: int = 0,
    keep_decoded: str | Path | None = None,
) -> Dataset[Any]:
    """Open one split of a dataset.

    Args:
        name: ``imagenet`` (``root`` holds train/ and val/ or img_val/), ``folder`` (any class folders; without splits
            they serve only to evaluate), ``tar`` (a tar file or a folder of them, which the two above find too),
            ``inat18``, ``inat19``, ``cifar10``, ``cifar100``, ``fashion_full``; without a root ``digits``, ``fashion``
            and ``fashion_tune``; or a name for timm's ``create_dataset`` with its prefix (``hfds/``, ``hfids/``,
            ``tfds/``, ``wds/``, ``torch/``). DeiT's names
            (``IMNET``, ``CIFAR`` for CIFAR-100, ``INAT``, ``INAT19``) are understood.
        split: ``train`` or ``val``; for timm's names whatever split the dataset has.
        on_bad_image: ``raise`` stops at the first image that cannot be decoded; ``skip`` yields None in its place,
            which the loaders of ``common.data.loaders`` leave out and count. ``hfids/`` and ``tfds/`` decode in
            their own libraries, where a bad image stops the run in any case.
        download: let CIFAR and timm's names fetch what ``root`` lacks.
        inat_category: level of the taxonomy that makes the classes of ``inat18`` and ``inat19``.
        batch_size, seed: passed on to streams, which shuffle and count by them.
        keep_decoded: folder where evaluation images are kept decoded, see ``common.data.decoded``.

    Raises:
        DataError: wrong path, missing split, class folders without images, a name that nothing knows.
    """
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image must be 'raise' or 'skip', got {on_bad_image!r}")
    name = dataset_name(name)
    split = next((main for main, names in SPLIT_NAMES.items() if split in names), split)
    if name == "digits":
        dataset: Dataset[Any] = Digits(split, transform)
    elif name in FASHION:
        dataset = open_fashion(name, root, split, transform, download=download)
    elif name.lower() in ("torch/image_folder", "torch/folder"):
        folder = existing_folder(name, root)
        inside = (folder / part for part in SPLIT_NAMES.get(split, (split,)))
        dataset = _open_classes(next((path for path in inside if path.is_dir()), folder), transform)
    elif name.lower().startswith(FETCHED):
        stream = {"batch_size": batch_size, "seed": seed}
        dataset = _open_with_timm(name, root, split, transform, download=download, **stream)
        if isinstance(dataset, IterableImageDataset) and isinstance(dataset.reader, reader_wds.ReaderWds):
            dataset = ShardStream(dataset, skip=on_bad_image == "skip")
    elif name in ("imagenet", "folder", "tar"):
        dataset = _open_folder(name, existing_folder(name, root), split, transform)
    elif name in ("inat18", "inat19"):
        dataset = INaturalist(
            existing_folder(name, root), split, transform, year=2000 + int(name[-2:]), category=inat_category
        )
    elif name in ("cifar10", "cifar100"):
        dataset = _open_cifar(name, root, split, transform, download)
    else:
        known = ", ".join([*NUM_CLASSES, "folder", "tar"])
        raise DataError(f"unknown dataset {name!r}: give one of {known}, or a timm name such as hfds/NAME or wds/NAME")
    if keep_decoded:
        dataset = DecodedImages(dataset, keep_decoded)
    return SkipBadImages(dataset) if on_bad_image == "skip" and not isinstance(dataset, IterableDataset) else dataset


def default_num_classes(name: str) -> int:
    """Classes of a dataset known by name, for building a model before (or without) its images."""
    name = dataset_name(name)
    if name not in NUM_CLASSES:
        raise DataError(f"the number of classes of {name!r} is known only once it is open: give --num-classes")
    return NUM_CLASSES[name]


def num_classes(dataset: Dataset[Any]) -> int:
    """Number of classes of an open dataset."""
    classes = getattr(dataset, "classes", None)
    if not classes:
        raise DataError(f"{type(dataset).__name__} does not say its classes: give --num-classes")
    return len(classes)


class SkipBadImages(Dataset[Any]):
    """``dataset`` with None where an image cannot be decoded; the collate functions of the loaders count these."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.classes: Sequence[str] | None = getattr(dataset, "classes", None)

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except BadImageError:
            return None


class Digits(MemoryImages):
    """The 1,797 handwritten digits inside scikit-learn: 8x8 grey levels 0 to 16, here 32x32 RGB images.

    80 % train and 20 % val, stratified by digit, the same on every machine.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """

    def __init__(self, split: str, transform: Transform | None = None, *, size: int = 32) -> None:
        from sklearn.datasets import load_digits  # slow to import, and needed by this dataset only
        from sklearn.model_selection import train_test_split

        check_split("digits", split)
        grey, labels = load_digits(return_X_y=True)
        chosen = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        self.indices: list[int] = np.asarray(chosen[0 if split == "train" else 1]).tolist()
        small = np.rint(grey[self.indices].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        large = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in small]
        pixels, labels = torch.from_numpy(np.stack(large)), torch.from_numpy(labels[self.indices])
        super().__init__(pixels, labels, tuple("0123456789"), transform)


class INaturalist(Dataset[Any]):
    """iNaturalist 2018 or 2019 from its JSON lists: train{year}.json, val{year}.json, categories.json.

    Classes are numbered in the order in which they first appear among the *train* annotations. The path of an image is
    its file name without its second part (the supercategory); its category id is the third part.
    """

    def __init__(self, root: Path, split: str, transform: Transform | None, *, year: int, category: str) -> None:
        if category not in INAT_CATEGORIES:
            raise DataError(f"--inat-category must be one of {', '.join(INAT_CATEGORIES)}, got {category!r}")
        check_split(f"inat{year % 100}", split)
        categories, listed = _read_json(root / "categories.json"), root / f"{split}{year}.json"
        annotations = _entries(root / f"train{year}.json", "annotations")
        try:
            names = [categories[int(entry["category_id"])][category] for entry in annotations]
            self.classes: Sequence[str] = tuple(dict.fromkeys(names))
            number = {name: position for position, name in enumerate(self.classes)}
            self.samples: list[tuple[str, int]] = []
            for entry in _entries(listed, "images"):
                parts = entry["file_name"].split("/")
                if len(parts) < 4:
                    raise DataError(f"{listed}: file_name {entry['file_name']!r} is not of the form a/b/category/file")
                name = categories[int(parts[2])][category]
                if name not in number:
                    raise DataError(f"{listed}: {category} {name!r} of {entry['file_name']} has no train annotation")
                self.samples.append((str(root / parts[0] / parts[2] / parts[3]), number[name]))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{listed}, train{year}.json or categories.json is no list of iNaturalist's, or they do not fit each "
                f"other ({type(error).__name__}: {error})"
            ) from error
        self.transform, self.loader = transform, load_image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        image = self.loader(path)
        return (self.transform(image) if self.transform else image), target


class ClassFolders(ImageFolder):
    """torchvision's, of every image of a class once: links that lead round in circles add nothing."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        root = Path(directory)
        for entry in root.iterdir():
            if entry.is_symlink() and (not entry.exists() or root.resolve().is_relative_to(entry.resolve())):
                raise DataError(f"{entry} is a link that leads nowhere or to a folder that it lies in; remove it")
        return super().find_classes(directory)

    @staticmethod
    def make_dataset(
        directory: str | Path, class_to_idx: dict[str, int], *unused: Any, **named: Any
    ) -> list[tuple[str, int]]:
        files = {name: images_below(Path(directory, name)) for name in class_to_idx}
        if empty := [name for name, found in files.items() if not found]:
            raise FileNotFoundError(f"no image in the class folders {', '.join(empty)}")
        return [(file, class_to_idx[name]) for name, found in files.items() for file in found]


class ReaderImages(Dataset[Any]):
    """Images of a timm reader (tar files, Hugging Face datasets), decoded here so that a bad one is named."""

    def __init__(self, reader: Reader, transform: Transform | None, *, source: str) -> None:
        self.reader = reader
        self.transform = transform
        self.source = source
        number = getattr(reader, "class_name_to_idx", None) or getattr(reader, "class_to_idx", None) or {}
        self.classes: Sequence[str] = tuple(sorted(number, key=number.__getitem__))

    def __len__(self) -> int:
        return len(self.reader)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, target = self.reader[index][:2]  # pyright: ignore[reportIndexIssue]
        with file:
            image = decode_image(file, f"{self.source}: {self.reader.filename(index) or f'image {index}'}")
        return (self.transform(image) if self.transform else image), int(target)


class ShardStream(IterableDataset[Any]):
    """WebDataset shards through timm, with None for each image left out, or the error that names it.

    timm's reader logs a warning and goes on, so that accuracy would be of an unknown part of the images. Its error
    handler is a name in its module, looked up once, when the reader builds its pipeline in the process that iterates;
    the name stands for ``handle`` during that moment only, and that of its decoder for :func:`_decode_exactly`.
    """

    def __init__(self, stream: IterableImageDataset, *, skip: bool) -> None:
        self.stream = stream
        self.reader: Any = stream.reader
        self.skip = skip
        self.left_out = 0

    def __len__(self) -> int:
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        self.stream.set_loader_cfg(num_workers=num_workers)

    def handle(self, error: Exception) -> bool:
        frames = (frame for frame, _ in walk_tb(error.__traceback__))
        sample = next((frame.f_locals["sample"] for frame in frames if "sample" in frame.f_locals), None)
        if not sample or "__key__" not in sample:
            raise DataError(f"cannot read a shard of {self.reader.root} ({type(error).__name__}: {error})") from error
        if not isinstance(error, (OSError, SyntaxError, Image.DecompressionBombError, UnknownRange)):
            raise DataError(
                f"cannot use sample {sample['__key__']} of {sample.get('__url__')} ({type(error).__name__}: {error})"
            ) from error
        if not self.skip:
            raise bad_image(f"{sample.get('__url__')}: {sample['__key__']}", error) from error
        self.left_out += 1
        return True

    def __iter__(self) -> Iterator[Any]:
        if self.reader.ds is None:
            wds: Any = reader_wds
            timms = wds.log_and_continue, wds._decode
            wds.log_and_continue, wds._decode = self.handle, partial(_decode_exactly, timms[1])
            try:
                self.reader._lazy_init()
            finally:
                wds.log_and_continue, wds._decode = timms
        self.left_out = reported = 0
        for sample in chain(self.stream, (None,)):  # the last round is for what was left out at the end
            yield from repeat(None, self.left_out - reported)
            reported = self.left_out
            if sample is not None:
                yield sample


def _decode_exactly(decode: Callable[..., Any], sample: Any, **options: Any) -> Any:
    """timm's decoding of a sample, without its conversion to RGB, which cuts 16 bits at 255."""
    found = decode(sample, **{**options, "image_mode": ""})
    return found and {**found, "jpg": to_rgb(found["jpg"])}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_file(path).decode())
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): iNaturalist's JSON lists belong there") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _entries(path: Path, key: str) -> list[dict[str, Any]]:
    content = _read_json(path)
    entries = content.get(key) if isinstance(content, dict) else None
    if not entries:
        raise DataError(f"{path} lists no {key}")
    return entries


def _find_split(name: str, root: Path, split: str) -> Path:
    """The folder or tar file of a split, or ``root`` itself where it is not divided: enough to evaluate on."""
    wanted = SPLIT_NAMES.get(split, (split,))
    found = _first_of(root, wanted)
    if found:
        return found
    divided = _first_of(root, tuple(chain(*SPLIT_NAMES.values())))
    if split != "train" and not divided and (name != "imagenet" or _holds_tars(root)):
        return root
    looked_for = ", ".join(f"{entry}/" for entry in wanted)
    holds = contents(root) if root.is_dir() else "is a file"
    raise DataError(f"{root} has no {split} split: looked for {looked_for} (or .tar) in it; it {holds}")


def _first_of(root: Path, names: Sequence[str]) -> Path | None:
    candidates = [root / f"{name}{suffix}" for name in names for suffix in ("", ".tar")]
    return next((path for path in candidates if path.is_dir() or path.is_file()), None)


def _holds_tars(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".tar"
    return any(path.glob("*.tar")) and not any(entry.is_dir() for entry in path.iterdir())


def _open_folder(name: str, root: Path, split: str, transform: Transform | None) -> Dataset[Any]:
    path = _find_split(name, root, split)
    if name == "tar" or _holds_tars(path):
        if pipes := [str(file) for file in path.glob("*.tar") if not file.is_file()]:
            raise DataError(f"not a regular file: {', '.join(pipes)}; expected tar files alone")
        set_img_extensions(SUFFIXES)  # timm's own are three
        try:  # a handle kept open would be shared by the workers, who would move its position under each other
            reader = ReaderImageInTar(str(path), cache_tarfiles=False)
        except (tarfile.TarError, AssertionError, ValueError) as error:
            raise DataError(f"cannot use {path} as tar files of images ({type(error).__name__}: {error})") from error
        return ReaderImages(reader, transform, source=str(path))
    if path.is_file():
        raise DataError(f"{path} is neither a folder of class folders nor a .tar file")
    dataset = _open_classes(path, transform)
    _check_same_classes(root, path, dataset.classes)
    return dataset


def _open_classes(path: Path, transform: Transform | None) -> ClassFolders:
    try:
        return ClassFolders(str(path), transform=transform, loader=load_image)
    except FileNotFoundError as error:
        raise DataError(f"{path}: {error}; it {contents(path)}") from error


def _check_same_classes(root: Path, path: Path, classes: Sequence[str]) -> None:
    train = next((root / entry for entry in SPLIT_NAMES["train"] if (root / entry).is_dir()), path)
    expected = {entry.name for entry in train.iterdir() if entry.is_dir()} if train != path else set(classes)
    if expected:
        compare_classes(sorted(expected), sorted(classes), f"{path} does not have the class folders of {train}")


def compare_classes(expected: Sequence[str], found: Sequence[str], what: str) -> None:
    """Class numbers follow the order of names, so a class missing from one split shifts those after it.

    Args:
        expected, found: names in the order of their numbers.
        what: begins the message.

    Raises:
        DataError: they differ.
    """
    if list(expected) != list(found):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise DataError(
            f"{what}: missing {missing[:5]} ({len(missing)} in all), "
            f"unexpected {extra[:5]} ({len(extra)} in all); class numbers would not agree"
        )


def _open_cifar(
    name: str, root: str | Path | None, split: str, transform: Transform | None, fetch: bool
) -> Dataset[Any]:
    check_split(name, split)
    path = Path(root).expanduser() if root and fetch else existing_folder(name, root)
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    if fetch:
        download(name, path, lambda: kind(str(path), download=True))
    try:
        return kind(str(path), train=split == "train", transform=transform)
    except RuntimeError as error:
        raise DataError(
            f"{name} is not (or not completely) under {path}: expected {path / kind.base_folder}/, "
            f"unpacked from {kind.filename}; put it there, or fetch it: python -c 'from torchvision.datasets import "
            f'{kind.__name__}; {kind.__name__}("{path}", download=True)\'; {path} {contents(path)}'
        ) from error


def _open_with_timm(
    name: str, root: str | Path | None, split: str, transform: Transform | None, **options: Any
) -> Dataset[Any]:
    options |= {"root": None if root is None else str(root), "split": "validation" if split == "val" else split}
    try:
        dataset: Any = create_dataset(name, is_training=split == "train", transform=transform, **options)
    except (ImportError, AssertionError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise DataError(
            f"timm cannot open dataset {name!r} (root {root}, split {options['split']!r}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(dataset, ImageDataset):
        return ReaderImages(dataset.reader, transform, source=name)
    if isinstance(dataset, ImageFolder):
        dataset.loader = load_image
    elif name.lower().startswith("hfids/"):
        dataset.reader.input_img_mode = ""  # timm's conversion cuts 16 bits at 255
        dataset.transform = to_rgb if transform is None else Compose([to_rgb, transform])
    return dataset
