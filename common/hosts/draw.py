"""An image as a network sees it: the tokens that are left of it, and features in three colours.

A token has the mean colour of its patches, and a line around it. Features are shown by the three principal components
of the dense network's patches of the same image, so that equal colours are equal features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

MARGIN, CAPTION, TITLE = 4, 14, 18
"""Pixels between panels, of the words below one, and of the words above a row of them."""


@dataclass(frozen=True)
class Strip:
    """What a network makes of one image: panels with a word each, (3, H, W) in [0, 1]."""

    name: str
    panels: Sequence[tuple[str, Tensor]]


def mosaic(image: Tensor, labels: Tensor) -> Tensor:
    """(3, H, W) in [0, 1], of an image and the token of each of its patches (rows, columns)."""
    height, width = image.shape[1:]
    token = spread(labels, height, width).flatten()
    number = int(token.max()) + 1
    total = torch.zeros(3, number).index_add(1, token, image.flatten(1))
    colours = total / torch.bincount(token, minlength=number).clamp_min(1)
    drawn = colours[:, token].view(3, height, width)
    token = token.view(height, width)
    edge = torch.zeros(height, width, dtype=torch.bool)
    edge[1:] |= token[1:] != token[:-1]
    edge[:, 1:] |= token[:, 1:] != token[:, :-1]
    return torch.where(edge, 0.0, drawn)


def spread(patches: Tensor, height: int, width: int) -> Tensor:
    """What patches (..., rows, columns) have, at every pixel (..., height, width)."""
    rows = torch.arange(height) * patches.shape[-2] // height
    columns = torch.arange(width) * patches.shape[-1] // width
    return patches[..., rows, :][..., columns]


class Principal:
    """Three colours of features: the principal components of some patches, and the range that they span.

    Args:
        features: of one image's patches, (C, rows, columns).
    """

    def __init__(self, features: Tensor) -> None:
        points = features.flatten(1).T.double()
        self.mean = points.mean(0)
        _, _, axes = torch.linalg.svd(points - self.mean, full_matrices=False)
        axes = axes[:3]
        signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
        self.axes = axes * signs  # the largest entry is positive: an axis has no sign of its own
        places = (points - self.mean) @ self.axes.T
        self.low, self.high = (places.quantile(share, dim=0) for share in (0.01, 0.99))

    def colours(self, features: Tensor) -> Tensor:
        """(3, rows, columns) in [0, 1] of features (C, rows, columns)."""
        places = (features.flatten(1).T.double() - self.mean) @ self.axes.T
        found = ((places - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1).float().T
        lacking = torch.full((3 - len(found), found.shape[1]), 0.5)  # of features with fewer than three channels
        return torch.cat([found, lacking]).unflatten(1, features.shape[1:])


def to_image(panel: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] for Pillow."""
    return Image.fromarray((panel.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def draw_sheet(strips: Sequence[Strip]) -> Image.Image:
    """A row of panels for each network, its name above them and their words below."""
    height = max(panel.shape[1] for strip in strips for _, panel in strip.panels)
    width = max(panel.shape[2] for strip in strips for _, panel in strip.panels)
    columns, step = max(len(strip.panels) for strip in strips), TITLE + height + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * (width + MARGIN) - MARGIN, len(strips) * step - MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for row, strip in enumerate(strips):
        top = row * step
        draw.text((0, top + 3), strip.name[: sheet.width // 6], fill="black")
        for column, (word, panel) in enumerate(strip.panels):
            left = column * (width + MARGIN)
            sheet.paste(to_image(panel), (left, top + TITLE))
            draw.text((left, top + TITLE + height + 1), word[: width // 6], fill="#555555")
    return sheet
