"""Layers that the networks of more than one paper share.

Papers: T2T-ViT, arXiv:2101.11986; random features: Performer, arXiv:2009.14794.

Shapes: B batch, T tokens, N tokens of the last split, D width, e width inside, m random features.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.run.precision import without_autocast

EPSILON = 1e-8
"""Added to the denominator of linear attention."""


class Performer(nn.Module):
    """T2T-ViT's token encoder: attention whose cost is linear in the tokens, then an MLP of the same width.

    Its skip connection starts at the values, as input and output differ in width.

    Args:
        dim: width of the input.
        width: e, width of the output.
        kernel_ratio: m as a share of e.
        dropout: of the attention and of the MLP, on in training whatever the network's dropout is.
    """

    def __init__(self, dim: int, width: int, *, kernel_ratio: float = 0.5, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.features = int(width * kernel_ratio)
        self.w = nn.Parameter(torch.empty(self.features, width), requires_grad=False)
        nn.init.orthogonal_(self.w).mul_(math.sqrt(self.features))
        self.kqv = nn.Linear(dim, 3 * width)
        self.dp = nn.Dropout(dropout)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))

    def positive_features(self, x: Tensor) -> Tensor:
        """Positive random features ``exp(x w^T - |x|^2 / 2) / sqrt(m)``: (B, T, e) -> (B, T, m)."""
        norms = x.square().sum(dim=-1, keepdim=True) / 2
        return torch.exp(x @ self.w.to(x.dtype).T - norms) / math.sqrt(self.features)

    def attend(self, x: Tensor) -> Tensor:
        """Linear attention of normalised tokens, (B, T, dim) -> (B, T, e).

        From the features on in float32 at least, also under autocast and in a half-precision network: exp() reaches
        e^(m / 2), which float16 cannot hold, and neither can it the sums over the tokens.
        """
        k, q, v = self.kqv(x).split(self.width, dim=-1)  # in this order in the published weights
        exact = torch.promote_types(v.dtype, torch.float32)
        with without_autocast(x):
            k, q = self.positive_features(k.to(exact)), self.positive_features(q.to(exact))  # (B, T, m)
            denominator = q @ k.sum(dim=1)[..., None] + EPSILON  # (B, T, 1)
            summary = k.transpose(1, 2) @ v.to(exact)  # (B, m, e)
            attended = (q @ summary / denominator).to(v.dtype)
        return v + self.dp(self.proj(attended))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, e)."""
        x = self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def check_image_size(images: Tensor, size: tuple[int, int]) -> None:
    """Refuse images of another size than the network is made for, naming both (ValueError)."""
    if images.shape[-2:] != size:
        wanted, found = ("x".join(map(str, pair)) for pair in (size, images.shape[-2:]))
        raise ValueError(f"this network takes images of {wanted} pixels, got {found}")


def nearest_side(pixels: int, patch_size: int) -> int:
    """The side nearest to one of ``pixels`` that patches fill: itself, where they fill it."""
    return max(1, round(pixels / patch_size)) * patch_size


class Split(NamedTuple):
    """A soft split: patches of ``kernel`` pixels every ``stride`` pixels after ``padding``."""

    kernel: int
    stride: int
    padding: int

    def side(self, pixels: int) -> int:
        """Tokens per side of a square of ``pixels``."""
        return (pixels + 2 * self.padding - self.kernel) // self.stride + 1


FIRST_SPLIT, LATER_SPLIT = Split(7, 4, 2), Split(3, 2, 1)
"""T2T-ViT's own splits: the first one, and the second and third."""


def soft_split(maps: Tensor, split: Split) -> Tensor:
    """Overlapping patches as tokens: (B, C, h, w) -> (B, T, C · kernel²).

    Without a gradient a view of windows is copied once, where F.unfold and its transpose copy twice.
    """
    kernel, stride, padding = split
    if maps.requires_grad:
        return F.unfold(maps, kernel, stride=stride, padding=padding).transpose(1, 2)
    windows = F.pad(maps, (padding,) * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)  # (B, C, y, x, k, k)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class TokensToToken(nn.Module):
    """Tokens of an image: three soft splits, a token encoder after the first two, a projection after the last.

    Args:
        img_size: height and width of the image in pixels.
        token_dim: width of the token encoders.
        first: the first split.
        encoder: makes a token encoder from the widths of its input and output.

    Attributes:
        grids: rows and columns after each split; ``grid``, of the tokens; ``num_patches``, N.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        in_chans: int,
        token_dim: int,
        embed_dim: int,
        *,
        first: Split = FIRST_SPLIT,
        encoder: Callable[[int, int], nn.Module] = Performer,
    ) -> None:
        super().__init__()
        self.img_size, self.splits = img_size, (first, LATER_SPLIT, LATER_SPLIT)
        self.grids = list(zip(*map(self.find_sides, img_size), strict=True))
        self.grid = self.grids[-1]
        self.num_patches = math.prod(self.grid)
        self.attention1 = encoder(in_chans * first.kernel**2, token_dim)
        self.attention2 = encoder(token_dim * LATER_SPLIT.kernel**2, token_dim)
        self.project = nn.Linear(token_dim * LATER_SPLIT.kernel**2, embed_dim)

    def find_sides(self, pixels: int) -> list[int]:
        """Tokens per side after each split."""
        return list(accumulate(self.splits, lambda side, split: split.side(side), initial=pixels))[1:]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, N, D)."""
        check_image_size(images, self.img_size)
        maps = images
        for split, encoder, grid in zip(self.splits, (self.attention1, self.attention2), self.grids, strict=False):
            maps = encoder(soft_split(maps, split)).transpose(1, 2).unflatten(2, grid)
        return self.project(soft_split(maps, self.splits[2]))


def sinusoid_table(positions: int, width: int) -> Tensor:
    """Fixed position table: sin (even channels) and cos (odd ones) of ``p / 10000^(2 (j // 2) / width)``.

    Returns:
        (1, positions, width), computed in float64, stored in float32, as published.
    """
    channels = np.arange(width)
    angles = np.arange(positions)[:, None] / np.power(10000, 2 * (channels // 2) / width)
    table = np.where(channels % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.from_numpy(table.astype(np.float32))[None]


def init_linear(module: nn.Module) -> None:
    """For ``Module.apply``: weights of linear layers truncated normal of deviation 0.02, biases 0; the rest stays."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
