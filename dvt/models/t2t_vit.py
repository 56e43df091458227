"""T2T-ViT at any of three token grids. Papers: arXiv:2101.11986 (T2T-ViT), arXiv:2105.15075 (the grids)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common.layers import FIRST_SPLIT, Performer, Split, TokensToToken, sinusoid_table
from dvt.models.backbone import Backbone, Size, sides_of
from dvt.models.token_transformer import Token_transformer

GRIDS: dict[str, tuple[Split, Callable[[int], int]]] = {
    "": (FIRST_SPLIT, lambda side: side // 16),
    "_less_token": (Split(11, 6, 5), lambda side: 10),
    "_less_less_token": (Split(14, 8, 3), lambda side: side // 32),
    "_4x4": (Split(24, 14, 5), lambda side: side // 56),
}
"""End of a tokens_type -> first split, and tokens that the published position table has along a side of so many pixels.

The last one is ours: Table 1 of the paper has a row with 4x4 tokens at 0.21 G, whose split is in no published code.
This one covers 224 pixels exactly, and the network then costs 0.213 G."""

ENCODERS: dict[str, Callable[[int, int], nn.Module]] = {"performer": Performer, "transformer": Token_transformer}


class T2T_module(TokensToToken):
    """T2T-ViT's tokens at one of the token grids.

    Args:
        img_size: side of the image in pixels, or (height, width).
        tokens_type: ``performer`` or ``transformer``, followed by nothing (14x14 tokens at 224 pixels),
            ``_less_token`` (10x10), ``_less_less_token`` (7x7) or ``_4x4``.
        token_dim: width of the token encoders.

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
        encoder, _, ending = tokens_type.partition("_")
        ending = ending and f"_{ending}"
        if encoder not in ENCODERS or ending not in GRIDS:
            known = ", ".join(name + end for name in ENCODERS for end in GRIDS)
            raise ValueError(f"unknown tokens_type {tokens_type!r}; the types are {known}")
        first, table_size = GRIDS[ending]
        sides = sides_of(img_size)
        super().__init__(sides, in_chans, token_dim, embed_dim, first=first, encoder=ENCODERS[encoder])
        if self.grid != (table := tuple(map(table_size, sides))):
            working = (size for size in range(32, 1025) if self.find_sides(size)[-1] == table_size(size))
            nearest = sorted(sorted(working, key=lambda size: abs(size - sides[0]))[:8])
            raise ValueError(
                f"img_size {img_size} gives {self.grid[0]}x{self.grid[1]} tokens of type {tokens_type!r}, but its "
                f"position table has {math.prod(table)}; sizes that work: {', '.join(map(str, nearest))}"
            )


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
