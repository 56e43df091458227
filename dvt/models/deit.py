"""DeiT at any token grid. Papers: arXiv:2012.12877 (DeiT), arXiv:2105.15075 (the grids)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.layers import check_image_size
from dvt.models import padding_of
from dvt.models.backbone import Backbone, Size, sides_of

DeiTNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Patches as tokens by one convolution.

    Args:
        patch_size: side of a patch and distance of two; 32, 23 and 16 give 7x7, 10x10 and 14x14 tokens at 224.
        padding: pixels added to each side of the image; None: 3 for patches of 23, as published, else 0.
        stem: channels of a convolution of 3x3 with stride 2 that comes before the patches, ours; 0 for none.
            Patches and padding must be even then.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        padding: int | None = None,
        stem: int = 0,
    ) -> None:
        super().__init__()
        padding = padding_of(patch_size, padding)
        self.img_size = sides_of(img_size)
        rows, columns = (int(side + 2 * padding) // patch_size for side in self.img_size)
        if rows < 1 or columns < 1:
            raise ValueError(f"img_size {img_size} is smaller than a patch of {patch_size}")
        self.grid = rows, columns
        self.num_patches = rows * columns
        step = 2 if stem else 1
        if patch_size % step or padding % step:
            raise ValueError(f"behind a stem patch_size and padding must be even, got {patch_size} and {padding}")
        first = [nn.Conv2d(in_chans, stem, 3, stride=2, padding=1), nn.GELU()] if stem else []
        self.stem = nn.Sequential(*first)
        patch = patch_size // step
        self.proj = nn.Conv2d(stem or in_chans, embed_dim, patch, stride=patch, padding=padding // step)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, N, D), row by row."""
        check_image_size(images, self.img_size)
        return self.proj(self.stem(images)).flatten(2).transpose(1, 2)


class VisionTransformer(Backbone):
    """DeiT without distillation: patches by a convolution, a learned position table, bias in qkv.

    Args:
        img_size, patch_size, in_chans, padding, stem: see :class:`PatchEmbed`.
        options: of :class:`~dvt.models.backbone.Backbone`.
    """

    embed_name = "patch_embed"

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        padding: int | None = None,
        stem: int = 0,
        **options: Any,
    ) -> None:
        embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, padding, stem)
        table = nn.Parameter(torch.zeros(1, embed.num_patches + 1, embed_dim))
        defaults: dict[str, Any] = {"qkv_bias": True, "norm_layer": DeiTNorm}
        super().__init__(embed, table, embed_dim=embed_dim, **defaults | options)
