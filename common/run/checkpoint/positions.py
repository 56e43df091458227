"""Position embeddings of files that were trained at another image size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run.errors import CheckpointError


def resize_pos_embed(table: Tensor, grid: tuple[int, int], *, prefix: int = 1, source: str = "checkpoint") -> Tensor:
    """The positions of a square grid of patches for another grid, bicubic; those of the tokens before them stay.

    Args:
        table: (1, prefix + side², D).
        grid: rows and columns wanted.
        prefix: tokens before the patches, such as the class token.
        source: the file's name, for messages.

    Returns:
        (1, prefix + rows · columns, D).

    Raises:
        CheckpointError: the patches of ``table`` are no square.
    """
    patches = table[:, prefix:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise CheckpointError(
            f"{source}: positions of {patches.shape[1]} patches cannot be resized to {grid[0]}x{grid[1]}: their grid "
            "is no square, and the file does not say how many rows it has"
        )
    if (side, side) == grid:
        return table
    exact = patches.to(torch.promote_types(table.dtype, torch.float32))
    planes = exact.transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
    planes = F.interpolate(planes, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix], planes.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
