"""Images of what a method did to patches: groups and selections drawn onto the image, panels side by side.

Plain functions on Pillow images and arrays; nothing here knows a network.

Letters: P = G x G patches, in an image of S x S pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from hourglass_swag.models.ops.tome import make_visualization
from hourglass_swag.tools.tracing import DROPPED, GONE

PANEL = 448  # pixels that the side of a panel aims at
SMALLEST_PATCH = 20  # pixels of a patch below which its rim, of one pixel, would stand out too much

PAPER, INK, FAINT = (255, 255, 255), (24, 24, 27), (96, 96, 104)
MARGIN, GAP = 24, 18  # around the sheet, between panels
TITLE_SIZE, LABEL_SIZE, SMALL_SIZE = 24, 20, 17

TINT = {DROPPED: (214, 40, 57), GONE: (120, 120, 130)}
"""Colour over a patch that does not go on: red in the layer that drops it, grey ever after."""
TINT_SHARE = {DROPPED: 0.62, GONE: 0.9}
LUMINANCE = np.array([0.299, 0.587, 0.114])

Panel = tuple[Image.Image, str, str]
"""An image, its label, and a second line."""


def patch_side(grid: int) -> int:
    """Pixels of a patch in a panel of ``grid`` x ``grid`` patches."""
    return max(round(PANEL / grid), SMALLEST_PATCH)


def cut_image(image: Image.Image, side: int) -> Image.Image:
    """What the network sees of an image, at another size: shorter side to ``side`` pixels, centre square."""
    cut = Compose([Resize(side, interpolation=InterpolationMode.BICUBIC), CenterCrop(side)])
    return cut(image)  # pyright: ignore[reportReturnType]


def draw_groups(image: Image.Image, labels: Tensor) -> Image.Image:
    """Every group of patches in its mean colour, with a rim in a colour of its own.

    Args:
        image: S x S pixels, S a multiple of G.
        labels: group of each patch, (P,), row by row.
    """
    source = torch.nn.functional.one_hot(labels).T[None]  # (1, K, P)
    return make_visualization(image, source, patch_side_of(image, labels), class_token=False)


def draw_selection(image: Image.Image, states: Tensor) -> Image.Image:
    """The patches that go on as they are, the others without colour under a tint, see ``TINT``.

    Args:
        image: S x S pixels, S a multiple of G.
        states: of each patch, (P,), row by row; see ``tracing.Selection``.
    """
    pixels = np.asarray(image.convert("RGB")) / 255.0
    side = patch_side_of(image, states)
    grid = math.isqrt(len(states))
    map_of_states = np.kron(states.numpy().reshape(grid, grid), np.ones((side, side), dtype=np.int64))
    grey = (pixels @ LUMINANCE)[..., None]
    for state, colour in TINT.items():
        share = TINT_SHARE[state]
        tinted = (1 - share) * grey + share * np.array(colour) / 255
        pixels = np.where((map_of_states == state)[..., None], tinted, pixels)
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def patch_side_of(image: Image.Image, patches: Tensor) -> int:
    """Pixels of a patch in a square image of P patches.

    Raises:
        ValueError: if the patches do not fill the image.
    """
    grid = math.isqrt(len(patches))
    if grid * grid != len(patches) or image.width != image.height or image.width % grid:
        raise ValueError(f"{len(patches)} patches do not fill an image of {image.width} x {image.height} pixels")
    return image.width // grid


def draw_sheet(title: str, notes: Sequence[str], panels: Sequence[Panel]) -> Image.Image:
    """Panels of one size side by side, in rows where there are many, each above its label.

    Args:
        title: first line of the sheet.
        notes: smaller lines below it.
        panels: at least one.
    """
    title_font, label_font, small_font = map(ImageFont.load_default, (TITLE_SIZE, LABEL_SIZE, SMALL_SIZE))
    title_line, label_line, small_line = (1.35 * size for size in (TITLE_SIZE, LABEL_SIZE, SMALL_SIZE))
    columns = count_columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = panels[0][0].size
    head = MARGIN + title_line + small_line * len(notes) + GAP
    step = width + GAP, height + 8 + label_line + small_line + GAP
    text_width = max([title_font.getlength(title), *(small_font.getlength(note) for note in notes)])
    size = (
        math.ceil(2 * MARGIN + max(columns * step[0] - GAP, text_width)),
        math.ceil(head + rows * step[1] - GAP + MARGIN),
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    for i, note in enumerate(notes):
        draw.text((MARGIN, MARGIN + title_line + i * small_line), note, FAINT, small_font)
    for i, (image, label, caption) in enumerate(panels):
        x, y = MARGIN + i % columns * step[0], round(head + i // columns * step[1])
        sheet.paste(image, (x, y))
        draw.text((x, y + height + 8), label, INK, label_font)
        draw.text((x, y + height + 8 + label_line), caption, FAINT, small_font)
    return sheet


def count_columns(number: int) -> int:
    """Panels in a row: all of up to five, else about one and a half times as many as rows."""
    return number if number <= 5 else math.ceil(math.sqrt(1.5 * number))
