"""An image as the tokens that are left of it: every token in the mean colour of its patches, with a line around it."""

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor

MARGIN, CAPTION = 4, 16


def mosaic(image: Tensor, labels: Tensor) -> Tensor:
    """(3, H, W) in [0, 1], of an image and the token of each of its patches (rows, columns)."""
    height, width = image.shape[1:]
    rows = torch.arange(height) * labels.shape[0] // height
    columns = torch.arange(width) * labels.shape[1] // width
    token = labels[rows][:, columns].flatten()
    number = int(token.max()) + 1
    total = torch.zeros(3, number).index_add(1, token, image.flatten(1))
    colours = total / torch.bincount(token, minlength=number).clamp_min(1)
    drawn = colours[:, token].view(3, height, width)
    token = token.view(height, width)
    edge = torch.zeros(height, width, dtype=torch.bool)
    edge[1:] |= token[1:] != token[:-1]
    edge[:, 1:] |= token[:, 1:] != token[:, :-1]
    return torch.where(edge, 0.0, drawn)


def draw_tokens(image: Tensor, labels: Mapping[str, Tensor]) -> Image.Image:
    """The image and, beside it, what each method leaves of it, with the method's name below.

    Args:
        image: (3, H, W) in [0, 1].
        labels: name -> token of each patch, (rows, columns).
    """
    height, width = image.shape[1:]
    panels = {"image": image, **{name: mosaic(image, each) for name, each in labels.items()}}
    sheet = Image.new("RGB", (len(panels) * (width + MARGIN) - MARGIN, height + CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, panel) in enumerate(panels.items()):
        left = index * (width + MARGIN)
        pixels = (panel.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels), (left, 0))
        draw.text((left, height + 2), name[: max(width // 6, 4)], fill="black")
    return sheet
