"""Clips as a few frames each: UCF101, or any folder of clips, for linear probing (design: nothing official exists).

A clip is a folder of frames (numbered images), an animated image (GIF, WebP, TIFF, PNG), or a video file, for which
PyAV must be installed. Two layouts are read:

- UCF101's own: ``classInd.txt``, ``trainlist01.txt`` and ``testlist01.txt`` (folds 01 to 03) in the root or in
  ``ucfTrainTestlist/``; clips under the root, ``UCF-101/``, ``frames/`` or ``videos/``, with or without class folders;
- split folders: ``train/CLASS/CLIP`` and ``val/CLASS/CLIP`` (or ``test/``).

Legend: T frames of a clip, F frames it has.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from common.data.images import BadImageError, is_image, load_image, to_rgb
from common.run.errors import DataError

ANIMATED = (".gif", ".webp", ".tif", ".tiff", ".apng", ".png")
VIDEOS = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg")
LIST_FOLDERS = ("", "ucfTrainTestlist")
CLIP_FOLDERS = ("", "UCF-101", "frames", "videos")
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "test", "validation")}

ClipTransform = Callable[[Tensor], Tensor]


def frame_indices(available: int, frames: int, *, random: bool) -> list[int]:
    """T indices into F frames, one per equal segment of the clip: anywhere in it, or its middle.

    A clip of fewer than T frames repeats some. ``random`` draws from torch's generator.
    """
    if available < 1 or frames < 1:
        raise ValueError(f"need at least one frame, got {available} available and {frames} wanted")
    places = torch.rand(frames) if random else torch.full((frames,), 0.5)
    chosen = ((torch.arange(frames) + places) * (available / frames)).long()
    return chosen.clamp_(max=available - 1).tolist()


def clip_transform(
    size: int, *, train: bool, crop_ratio: float = 0.875, scale: tuple[float, float] = (0.08, 1.0)
) -> transforms.Compose:
    """Frames (T, 3, height, width), uint8, to a normalised clip (T, 3, size, size), all frames cut alike.

    Training: random resized crop and flip. Evaluation: shorter side to int(size / crop_ratio), centre crop.
    """
    resampling: dict[str, Any] = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    if train:
        place = [transforms.RandomResizedCrop(size, scale=scale, **resampling), transforms.RandomHorizontalFlip()]
    else:
        place = [transforms.Resize(int(size / crop_ratio), **resampling), transforms.CenterCrop(size)]
    tail = [
        transforms.ConvertImageDtype(torch.float32),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ]
    return transforms.Compose([*place, *tail])


class Clips(Dataset[tuple[Tensor, int]]):
    """One split of a folder of clips; yields a clip (T, 3, height, width) through ``transform``, and its class number.

    Args:
        root: see the layouts above.
        split: ``train`` or ``val`` (UCF101's test list).
        frames: T.
        transform: of uint8 frames (T, 3, height, width); None leaves them.
        fold: which of UCF101's three lists.

    Attributes:
        classes: class names in the order of their numbers.

    Raises:
        DataError: no such folder, list, clip or frame; names what was looked for.
    """

    def __init__(
        self, root: str | Path, split: str, *, frames: int = 8, transform: ClipTransform | None = None, fold: int = 1
    ) -> None:
        if split not in SPLIT_FOLDERS:
            raise DataError(f"clips have the splits train and val, not {split!r}")
        if not str(root) or not Path(root).is_dir():
            raise DataError(f"the folder of clips {str(root)!r} does not exist: give --data-path DIR")
        self.split, self.frames, self.transform = split, frames, transform
        root = Path(root)
        lists = next((root / name for name in LIST_FOLDERS if list((root / name).glob("trainlist0*.txt"))), None)
        self.classes, self.samples = (
            _from_lists(root, lists, split, fold) if lists is not None else _from_folders(root, split)
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        frames = read_frames(path, self.frames, random=self.split == "train")
        return (self.transform(frames) if self.transform else frames), label


# ---------------------------------------------------------------------------------------------------------------------
# Reading a clip


def read_frames(path: Path, frames: int, *, random: bool) -> Tensor:
    """T frames of a clip, (T, 3, height, width) in uint8; see :func:`frame_indices`.

    Raises:
        BadImageError: a clip or frame that cannot be decoded, or frames of different sizes.
        DataError: a folder without images, or a video without PyAV.
    """
    if path.is_dir():
        files = _frame_files(path)
        images = [load_image(files[index]) for index in frame_indices(len(files), frames, random=random)]
    elif not path.is_file():
        raise BadImageError(f"clip {path} is neither a folder nor a file; replace it")
    else:
        decode = _read_video if path.suffix.lower() in VIDEOS else _read_animation
        images = decode(path, partial(frame_indices, frames=frames, random=random))
    if len({image.size for image in images}) > 1:
        raise BadImageError(f"the frames of {path} have different sizes; extract them again")
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def _frame_files(folder: Path) -> list[Path]:
    """Frames of a folder in the order of their numbers: frame10 comes after frame9."""
    found = [path for path in folder.iterdir() if is_image(path.name)]
    if not found:
        raise DataError(f"{folder} holds no frames: expected images, numbered in order")
    parts = {path: re.split(r"(\d+)", path.stem) for path in found}
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in parts[path]])


def _read_animation(path: Path, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    try:
        with Image.open(path) as animation:
            frames = [to_rgb(frame) for frame in ImageSequence.Iterator(animation)]
    except (OSError, DataError) as error:
        raise BadImageError(f"cannot decode clip {path} ({error}); replace it") from error
    return [frames[index] for index in choose(len(frames))]


def _read_video(path: Path, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    try:
        av: Any = importlib.import_module("av")  # optional: folders of frames need no decoder
    except ImportError as error:
        raise DataError(
            f"{path} is a video file, which needs PyAV: pip install av; or extract its frames, for instance with "
            f"ffmpeg -i {path.name} {path.stem}/%05d.jpg, and name the folder that holds them"
        ) from error
    try:
        with av.open(str(path)) as container:  # all are decoded: the headers of AVI files do not count them reliably
            decoded = list(container.decode(video=0))
        return [decoded[index].to_image().convert("RGB") for index in choose(len(decoded))]
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise BadImageError(f"cannot decode video {path} ({error}); replace it") from error


# ---------------------------------------------------------------------------------------------------------------------
# Finding the clips


def _from_folders(root: Path, split: str) -> tuple[Sequence[str], list[tuple[Path, int]]]:
    found = {name: [root / folder for folder in folders if (root / folder).is_dir()]
             for name, folders in SPLIT_FOLDERS.items()}  # fmt: skip
    if not found[split]:
        raise DataError(
            f"{root} has neither UCF101's lists (trainlist01.txt, here or in ucfTrainTestlist/) nor a folder "
            f"{' or '.join(f'{name}/' for name in SPLIT_FOLDERS[split])} of class folders of clips"
        )
    folder = found[split][0]
    everywhere = (kind for folders in found.values() for place in folders for kind in place.iterdir())
    classes = sorted({kind.name for kind in everywhere if kind.is_dir()})  # of all splits, so that numbers agree
    clips = [
        (clip, classes.index(clip.parent.name))
        for clip in sorted(folder.glob("*/*"))
        if clip.is_dir() or clip.suffix.lower() in (*VIDEOS, *ANIMATED)
    ]
    if not clips:
        raise DataError(f"{folder} holds no clips: expected CLASS/CLIP, a folder of frames or a video file each")
    return classes, clips


def _from_lists(root: Path, lists: Path, split: str, fold: int) -> tuple[Sequence[str], list[tuple[Path, int]]]:
    files = {"train": lists / f"trainlist{fold:02d}.txt", "val": lists / f"testlist{fold:02d}.txt"}
    entries: dict[str, list[str]] = {}
    for name, file in files.items():
        if not file.is_file():
            raise DataError(f"{file} does not exist: fold {fold} needs it (--fold)")
        entries[name] = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    classes = _class_names(lists, [*entries["train"], *entries["val"]])
    number = {name: index for index, name in enumerate(classes)}
    clips = []
    for entry in entries[split]:
        kind, _, _ = entry.partition("/")
        if kind not in number:
            raise DataError(f"{lists / 'classInd.txt'} does not list the class of {entry!r}")
        clips.append((_locate_clip(root, entry), number[kind]))
    if not clips:
        raise DataError(f"{files[split]} lists no clips")
    return classes, clips


def _class_names(lists: Path, entries: Sequence[str]) -> Sequence[str]:
    index = lists / "classInd.txt"
    if not index.is_file():
        return sorted({entry.partition("/")[0] for entry in entries})
    pairs = [line.split() for line in index.read_text().splitlines() if line.strip()]
    if any(len(pair) != 2 or not pair[0].isdigit() for pair in pairs):
        raise DataError(f"{index} must hold lines of a number and a class name")
    return [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]


def _locate_clip(root: Path, entry: str) -> Path:
    """The clip of a list's entry: the file itself, or a folder of frames or an animation of its name."""
    for folder in CLIP_FOLDERS:
        for base in (root / folder / entry, root / folder / Path(entry).name):
            files = (base, *(base.with_suffix(suffix) for suffix in (*VIDEOS, *ANIMATED)))
            found = [base.with_suffix("")] if base.with_suffix("").is_dir() and not base.is_file() else []
            found += [path for path in files if path.is_file()]
            if found:
                return found[0]
    stem = Path(entry).with_suffix("")
    raise DataError(f"no clip {entry!r} under {root}: looked for it, and for {stem}/ with frames, also in "
                    f"{', '.join(f'{name}/' for name in CLIP_FOLDERS if name)}")  # fmt: skip
