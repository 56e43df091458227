"""Images in files: which files are images, where they lie in folders, and what is in them as 8-bit RGB."""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.run.errors import DataError
from common.run.files import NotAFile, read_file

SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm",
    ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".tga", ".tif", ".tiff", ".webp",
    # which Pillow does not read: images that are named when they are opened, not passed over
    ".arw", ".cr2", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jxl", ".nef", ".svg",
)  # fmt: skip
"""Ends of the names of images, in small letters."""
KNOWN_RANGE = ("JPEG2000", "PNG", "PPM", "TIFF")
"""Formats, as Pillow calls them, whose whole numbers of 16 bits count from black to white."""
WHITE_IS_ZERO, PHOTOMETRIC, BITS = 0, 262, 258  # of TIFF


class BadImageError(DataError):
    """An image that cannot be decoded; the only error that ``on_bad_image="skip"`` passes over."""


class UnknownRange(DataError):
    """Grey values of which nobody knows what is black and what is white."""


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image, of an animation its first frame.

    Pillow by itself cuts grey images of more than 8 bits at 255. Here 16 bits (of a TIFF, what it has) and
    floating-point values from 0 to 1 are scaled from black to white.

    Raises:
        UnknownRange: naming the values.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    values, tags = np.asarray(image).astype(np.float64), getattr(image, "tag_v2", {})
    white = 1.0 if image.mode == "F" else 2.0 ** tags.get(BITS, (16,))[0] - 1
    known = image.mode == "F" or image.format in KNOWN_RANGE
    signed_or_wide = image.mode == "I" and image.format == "TIFF"
    if not known or signed_or_wide or not (values.min() >= 0 and values.max() <= white):
        raise UnknownRange(
            f"grey values from {values.min():g} to {values.max():g} in mode {image.mode}, whose range is "
            "unknown; expected 8 bits, 16 bits without sign, or floating point from 0 to 1"
        )
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)).convert("RGB")


def decode_image(file: IO[bytes], name: str, *, skippable: bool = True) -> Image.Image:
    """Decode a whole image to RGB, see :func:`to_rgb`.

    Args:
        name: for messages.
        skippable: the program has ``--skip-bad-images``, which messages then mention.

    Raises:
        BadImageError: naming the image, whatever its decoder raised.
    """
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except Exception as error:  # damaged data makes Pillow's decoders raise nearly any type
        raise bad_image(name, error, skippable=skippable) from error


def bad_image(name: str, error: Exception, *, skippable: bool = True) -> BadImageError:
    """What to raise for an image that made its decoder raise ``error``."""
    unknown = isinstance(error, UnidentifiedImageError)  # whose text names a buffer in memory
    reason = "not in a format that Pillow knows" if unknown else f"{type(error).__name__}: {error}"
    skip = ", or leave such images out and count them with --skip-bad-images" if skippable else ""
    return BadImageError(f"cannot decode image {name} ({reason}); replace it{skip}")


def load_image(path: str | Path, *, skippable: bool = True) -> Image.Image:
    """Read and decode an image file.

    Raises:
        BadImageError: it cannot be decoded, or is a pipe, a device or a folder.
        DataError: it cannot be read at all, which is never skipped.
    """
    try:
        content = read_file(path)
    except NotAFile as error:
        raise bad_image(str(path), error, skippable=skippable) from error
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror}") from error
    return decode_image(BytesIO(content), str(path), skippable=skippable)


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def images_below(folder: Path) -> list[str]:
    """The images in a folder and in those inside it, by folder and name, each folder once however many links lead to
    it; none of the folders above, to which a link may lead, is entered.

    Raises:
        DataError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}") from error

    def identity(place: str | Path) -> tuple[int, int]:
        found = os.stat(place)
        return found.st_dev, found.st_ino

    seen = {identity(above) for above in folder.resolve().parents}
    entered: list[tuple[str, Sequence[str]]] = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort()  # so that everywhere the same of several ways is taken
        if identity(place) in seen:
            folders.clear()
            continue
        seen.add(identity(place))
        entered.append((place, names))
    return [os.path.join(place, name) for place, names in sorted(entered) for name in sorted(names) if is_image(name)]
