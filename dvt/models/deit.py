"""DeiT at any token grid. Papers: arXiv:2012.12877 (DeiT), arXiv:2105.15075 (the grids)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.measure import flops
from common.measure.flops import OpCounts
from dvt.models.backbone import Backbone
from dvt.models.transformer_block import Norm

PADDING = {23: 3}
"""Patch size -> padding of the picture: 224 + 6 = 10 * 23."""

DeiTNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Patches as tokens by one convolution.

    Args:
        img_size: side of the picture in pixels.
        patch_size: side of a patch and distance of two; 32, 23 and 16 give 7x7, 10x10 and 14x14 tokens at 224.

    Raises:
        ValueError: if the picture is smaller than a patch.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        padding = PADDING.get(patch_size, 0)
        self.img_size = img_size
        self.side = (img_size + 2 * padding) // patch_size
        if self.side < 1:
            raise ValueError(f"img_size {img_size} is smaller than a patch of {patch_size}")
        self.num_patches = self.side**2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, padding=padding)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, N, D), row by row."""
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"this network takes pictures of {self.img_size}x{self.img_size} pixels, got "
                f"{images.shape[-2]}x{images.shape[-1]}"
            )
        return self.proj(images).flatten(2).transpose(1, 2)

    def count_ops(self) -> OpCounts:
        """Operations for one picture."""
        side, proj = self.side, self.proj
        return flops.conv2d(side, side, proj.in_channels, proj.out_channels, proj.kernel_size[0])


class VisionTransformer(Backbone):
    """DeiT without distillation: patches by a convolution, a learned position table, bias in qkv.

    Args:
        img_size, patch_size, in_chans: see :class:`PatchEmbed`.
        options: of :class:`~dvt.models.backbone.Backbone`.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        qkv_bias: bool = True,
        norm_layer: Norm = DeiTNorm,
        **options: Any,
    ) -> None:
        embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        super().__init__(
            embed=("patch_embed", embed),
            grid=embed.side,
            pos_embed=nn.Parameter(torch.zeros(1, embed.num_patches + 1, embed_dim)),
            embed_dim=embed_dim,
            qkv_bias=qkv_bias,
            norm_layer=norm_layer,
            **options,
        )
