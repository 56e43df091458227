"""T2T-ViT at any of three token grids. Papers: arXiv:2101.11986 (T2T-ViT), arXiv:2105.15075 (the grids)."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import Performer, sinusoid_table
from dvt.models.backbone import Backbone, Size, check_images, sides_of
from dvt.models.reuse import Grid
from dvt.models.token_transformer import Token_transformer


class Split(NamedTuple):
    """A soft split: patches of ``kernel`` pixels every ``stride`` pixels after ``padding``."""

    kernel: int
    stride: int
    padding: int

    def side(self, pixels: int) -> int:
        """Tokens per side of a square of ``pixels``."""
        return (pixels + 2 * self.padding - self.kernel) // self.stride + 1


LATER_SPLIT = Split(3, 2, 1)
"""Second and third split of every grid."""

GRIDS: dict[str, tuple[Split, Callable[[int], int]]] = {
    "": (Split(7, 4, 2), lambda side: side // 16),
    "_less_token": (Split(11, 6, 5), lambda side: 10),
    "_less_less_token": (Split(14, 8, 3), lambda side: side // 32),
    "_4x4": (Split(24, 14, 5), lambda side: side // 56),
}
"""End of a tokens_type -> first split, and tokens that the published position table has along a side of so many pixels.

The last one is ours: Table 1 of the paper has a row with 4x4 tokens at 0.21 G, whose split is in no published code.
This one covers 224 pixels exactly, and the network then costs 0.213 G."""

ENCODERS: dict[str, Callable[[int, int], nn.Module]] = {"performer": Performer, "transformer": Token_transformer}


class T2T_module(nn.Module):
    """Tokens of an image: three soft splits, a token encoder after the first two, a projection after the last.

    Args:
        img_size: side of the image in pixels, or (height, width).
        tokens_type: ``performer`` or ``transformer``, followed by nothing (14x14 tokens at 224 pixels),
            ``_less_token`` (10x10), ``_less_less_token`` (7x7) or ``_4x4``.
        token_dim: width of the token encoders.

    Attributes:
        grids: rows and columns after each split; ``grid``, of the tokens; ``num_patches``, N.

    Raises:
        ValueError: if the splits do not give as many tokens as the position table has; it names sizes that work.
    """

    def __init__(
        self,
        img_size: Size = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        embed_dim: int = 768,
        token_dim: int = 64,
    ) -> None:
        super().__init__()
        encoder, _, ending = tokens_type.partition("_")
        ending = ending and f"_{ending}"
        if encoder not in ENCODERS or ending not in GRIDS:
            known = ", ".join(name + end for name in ENCODERS for end in GRIDS)
            raise ValueError(f"unknown tokens_type {tokens_type!r}; the types are {known}")
        first, table_size = GRIDS[ending]
        self.splits = (first, LATER_SPLIT, LATER_SPLIT)
        self.img_size = sides_of(img_size)
        self.grids: list[Grid] = list(zip(*map(self._find_sides, self.img_size), strict=True))
        self.grid = self.grids[-1]
        self.num_patches = math.prod(map(table_size, self.img_size))
        if self.grid != tuple(map(table_size, self.img_size)):
            working = (size for size in range(32, 1025) if self._find_sides(size)[-1] == table_size(size))
            nearest = sorted(sorted(working, key=lambda size: abs(size - self.img_size[0]))[:8])
            raise ValueError(
                f"img_size {img_size} gives {self.grid[0]}x{self.grid[1]} tokens of type {tokens_type!r}, but its "
                f"position table has {self.num_patches}; sizes that work: {', '.join(map(str, nearest))}"
            )
        make = ENCODERS[encoder]
        self.attention1 = make(in_chans * first.kernel**2, token_dim)
        self.attention2 = make(token_dim * LATER_SPLIT.kernel**2, token_dim)
        self.project = nn.Linear(token_dim * LATER_SPLIT.kernel**2, embed_dim)

    def _find_sides(self, pixels: int) -> list[int]:
        """Tokens per side after each split."""
        return list(accumulate(self.splits, lambda side, split: split.side(side), initial=pixels))[1:]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, N, D)."""
        check_images(images, self.img_size)
        maps = images
        for split, encoder, grid in zip(self.splits, (self.attention1, self.attention2), self.grids, strict=False):
            maps = encoder(soft_split(maps, split)).transpose(1, 2).unflatten(2, grid)
        return self.project(soft_split(maps, self.splits[2]))


def soft_split(maps: Tensor, split: Split) -> Tensor:
    """Overlapping patches as tokens: (B, C, h, w) -> (B, T, C · kernel²).

    Without a gradient a view of windows is copied once, where F.unfold and its transpose copy twice.
    """
    kernel, stride, padding = split
    if maps.requires_grad:
        return F.unfold(maps, kernel, stride=stride, padding=padding).transpose(1, 2)
    windows = F.pad(maps, (padding,) * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)  # (B, C, y, x, k, k)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class T2T_ViT(Backbone):
    """T2T-ViT: tokens by soft splits, a fixed sinusoid position table.

    Args:
        img_size, tokens_type, in_chans, token_dim: see :class:`T2T_module`.
        options: of :class:`~dvt.models.backbone.Backbone`.
    """

    embed_name = "tokens_to_token"

    def __init__(
        self,
        img_size: Size = 224,
        tokens_type: str = "performer",
        in_chans: int = 3,
        embed_dim: int = 768,
        token_dim: int = 64,
        **options: Any,
    ) -> None:
        embed = T2T_module(img_size, tokens_type, in_chans, embed_dim, token_dim)
        table = sinusoid_table(embed.num_patches + 1, embed_dim).to(torch.get_default_device())
        super().__init__(embed, nn.Parameter(table, requires_grad=False), embed_dim=embed_dim, **options)
