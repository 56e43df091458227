"""Images of what was merged: every group of patches in its mean colour, with a rim in a colour of its own."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def generate_colormap(number: int, seed: int = 0) -> list[tuple[float, float, float]]:
    """``number`` random colours, red, green and blue from 0 to 1, the same for the same seed."""
    generator = random.Random(seed)
    return [(generator.random(), generator.random(), generator.random()) for _ in range(number)]


def group_of_patches(source: Tensor, prefix_tokens: int) -> np.ndarray:
    """The token that each patch ended in, (patches,), from the membership of one image (1, groups, tokens)."""
    if source.dim() != 3 or source.shape[0] != 1:
        raise ValueError(f"source must be that of one image, (1, groups, tokens), got {tuple(source.shape)}")
    return source[0, :, prefix_tokens:].argmax(dim=0).cpu().numpy()


def make_visualization(
    img: Image.Image,
    source: Tensor,
    patch_size: int = 16,
    class_token: bool = True,
    *,
    prefix_tokens: int | None = None,
) -> Image.Image:
    """Draw the groups that an image's patches were merged to.

    Args:
        img: the image, cut to what the network saw (resized to its input, not normalised).
        source: which patch is in which token, (1, groups, tokens): ``model._tome_info["source"]`` of a model patched
            with ``trace_source=True``.
        patch_size: side of a patch in pixels of ``img``.
        class_token: whether the first token is no patch.
        prefix_tokens: tokens at the beginning that are no patches (class, distillation, register tokens), where these
            are more than one.

    Returns:
        An image of the same size.

    Raises:
        ValueError: if the tokens do not fill the image.
    """
    pixels = np.asarray(img.convert("RGB")) / 255.0  # (height, width, 3)
    height, width, _ = pixels.shape
    grid = height // patch_size, width // patch_size
    patches = group_of_patches(source, int(class_token) if prefix_tokens is None else prefix_tokens)
    if len(patches) != grid[0] * grid[1]:
        raise ValueError(
            f"{len(patches)} patches do not fill an image of {height} x {width} pixels in patches of {patch_size}: "
            f"that takes {grid[0]} x {grid[1]}. Give the image at the network's resolution"
        )
    labels = enlarge(patches.reshape(grid), (height, width))
    number = int(patches.max()) + 1
    flat = labels.ravel()
    count = np.bincount(flat, minlength=number).clip(min=1)
    mean = np.stack([np.bincount(flat, pixels[..., i].ravel(), number) / count for i in range(3)], axis=1)
    rim = np.array(generate_colormap(number))
    painted = np.where(inside_group(labels)[..., None], mean[labels], rim[labels])
    return Image.fromarray((painted * 255).astype(np.uint8))


def enlarge(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of group numbers at the size of the image, by the nearest patch."""
    grid = torch.from_numpy(labels).double()[None, None]
    return F.interpolate(grid, size=size, mode="nearest")[0, 0].numpy().astype(np.int64)


def inside_group(labels: np.ndarray) -> np.ndarray:
    """Pixels all of whose four neighbours exist and are in the same group (a binary erosion of every group at once)."""
    inside = np.zeros(labels.shape, dtype=bool)
    middle = labels[1:-1, 1:-1]
    neighbours = labels[:-2, 1:-1], labels[2:, 1:-1], labels[1:-1, :-2], labels[1:-1, 2:]
    inside[1:-1, 1:-1] = np.logical_and.reduce([middle == neighbour for neighbour in neighbours])
    return inside
