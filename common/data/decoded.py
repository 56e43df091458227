"""Evaluation images kept as they are before they become tensors: resized, cropped, three bytes a pixel.

Evaluating at several settings decodes and resizes the same images again and again; read from here they cost a tenth.
One file for each set of images and crop: record i is of image i, found and checked by itself, so that any number of
processes may fill the file at once, and one that was stopped, or a damaged record, is made again.
"""

import hashlib
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from torch.utils.data import Dataset
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from common.data.transforms import Pipeline
from common.run.errors import DataError
from common.run.files import make_folder, writing

MARK = b"RGB1"
HEADER = struct.Struct("<4sI")
"""Mark and CRC-32 of what follows."""


def _state(path: str) -> tuple[int, int, int]:
    """Size and times of an image. The second time, of any change at all, is one that no copy takes over."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class DecodedImages(Dataset[Any]):
    """``dataset`` with what its resize and crop give kept under ``folder``; the tensors are the same to the last bit.

    Args:
        dataset: of image files, with ``samples`` (path, class number) and an evaluation transform.
        folder: where; made if it is not there.

    Raises:
        DataError: other data, or a transform that is random.
    """

    def __init__(self, dataset: Any, folder: str | Path) -> None:
        steps: list[Any] = list(getattr(getattr(dataset, "transform", None), "transforms", ()))
        crop = next((i for i, step in enumerate(steps) if isinstance(step, CenterCrop)), -1)
        fixed = crop >= 0 and all(isinstance(step, Resize) for step in steps[:crop])
        if not hasattr(dataset, "samples") or not fixed or not isinstance(steps[crop + 1], ToTensor):
            raise DataError(
                "--cache-decoded keeps image files behind a resize and a centre crop, and these data are no such; "
                "leave it out"
            )
        self.dataset, self.classes, self.samples = dataset, dataset.classes, dataset.samples
        self.geometry, self.rest = Compose(steps[: crop + 1]), Pipeline(steps[crop + 1 :])
        height, width = steps[crop].size
        self.shape, self.length = (height, width, 3), HEADER.size + 3 * height * width
        self.states = [_state(path) for path, _ in self.samples]
        files = [(os.path.abspath(path), *state) for (path, _), state in zip(self.samples, self.states, strict=True)]
        key = hashlib.sha256(json.dumps([files, repr(self.geometry), PIL.__version__]).encode()).hexdigest()
        make_folder(Path(folder))
        self.file = Path(folder, f"{width}x{height}-{key[:16]}.rgb").absolute()
        self.start = int(key[:8], 16)
        self.descriptor = self._open()

    def _open(self) -> int:
        with writing(self.file):
            return os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.descriptor = self._open()  # in a process that was not forked the number may be of another file

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = self._kept(index)
        if pixels is None:
            path = self.samples[index][0]
            pixels = np.array(self.geometry(self.dataset.loader(path)))
            if _state(path) == self.states[index]:  # else it was replaced since, and the file's name does not say so
                self._keep(index, pixels.tobytes())
        return self.rest(pixels), self.samples[index][1]

    def _kept(self, index: int) -> np.ndarray | None:
        record = bytearray(self.length)
        with writing(self.file):
            found = os.preadv(self.descriptor, [record], index * self.length)
        pixels = memoryview(record)[HEADER.size :]
        if found < self.length or HEADER.unpack_from(record) != (MARK, self._checksum(index, pixels)):
            return None
        return np.frombuffer(pixels, np.uint8).reshape(self.shape)

    def _checksum(self, index: int, pixels: bytes | memoryview) -> int:
        return zlib.crc32(pixels, self.start ^ index)  # a record of another image, or of a renamed file, is none

    def _keep(self, index: int, pixels: bytes) -> None:
        record, written = memoryview(HEADER.pack(MARK, self._checksum(index, pixels)) + pixels), 0
        with writing(self.file):
            while written < self.length:
                written += os.pwrite(self.descriptor, record[written:], index * self.length + written)
