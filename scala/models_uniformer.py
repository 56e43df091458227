"""Sliceable UniFormer-S: Scala on a hybrid of convolution and attention (design: the official release has none).

UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning, arXiv:2201.04676; Scala,
arXiv:2412.04786, whose figures show UniFormer-S with 13 widths. Written from the papers. Two stages of local blocks
(depthwise 5x5 affinity, batch normalisation) and two of attention blocks, each with a depthwise 3x3 convolution as
dynamic position embedding. All stage widths are cut by r; a stage keeps its number of heads, and its attention scale is
that of the full head, as in the ViT (``models_scala.py``).

Legend: B batch, C channels of a stage, c = int(r C), h, w its grid, r width ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from scala.layers import (
    SlicedBatchNorm2d,
    SlicedConv2d,
    SlicedLayerNorm,
    SlicedLinear,
    SlicedNetwork,
    register,
)
from scala.models_scala import Block
from scala.slicing import Ratio, SliceRule, Width, check_ratio, exact, make_grid

WIDTHS = (64, 128, 320, 512)
STRIDES = (4, 2, 2, 2)
HEAD_DIM = 64


class PatchMerge(nn.Module):
    """Non-overlapping patches of the stage before, normalised per position."""

    def __init__(self, rule: SliceRule, channels: int, out: int, stride: int, *, from_image: bool) -> None:
        super().__init__()
        self.proj = SlicedConv2d(
            rule, channels, out, stride, stride=stride, padding=0, from_image=from_image, bias=True
        )
        self.norm = SlicedLayerNorm(rule, out)

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(B, c, h, w) to (B, c', h / stride, w / stride)."""
        return self.norm(self.proj(x, ratio).permute(0, 2, 3, 1), ratio).permute(0, 3, 1, 2).contiguous()


class OverlappingMerge(nn.Module):
    """Overlapping patches (the paper's variants marked with a dagger): a 3x3 convolution of stride 2, or two for 4."""

    def __init__(
        self, rule: SliceRule, widths: Sequence[float], channels: int, out: int, stride: int, *, from_image: bool
    ) -> None:
        super().__init__()
        first = out // 2 if stride == 4 else out
        self.conv1 = SlicedConv2d(rule, channels, first, 3, stride=2, from_image=from_image, bias=True)
        self.norm1 = SlicedBatchNorm2d(rule, first, widths)
        self.conv2 = SlicedConv2d(rule, first, out, 3, stride=2, bias=True) if stride == 4 else None
        self.norm2 = SlicedBatchNorm2d(rule, out, widths) if stride == 4 else None

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(B, c, h, w) to (B, c', h / stride, w / stride)."""
        x = self.norm1(self.conv1(x, ratio), ratio)
        if self.conv2 is None or self.norm2 is None:
            return x
        return self.norm2(self.conv2(F.gelu(x), ratio), ratio)


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with a GELU between."""

    def __init__(self, rule: SliceRule, channels: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = SlicedConv2d(rule, channels, hidden, 1, bias=True)
        self.fc2 = SlicedConv2d(rule, hidden, channels, 1, bias=True)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x, ratio))), ratio))


class LocalBlock(nn.Module):
    """Position embedding, local affinity (a depthwise 5x5 between 1x1s), MLP; each with a shortcut."""

    def __init__(
        self, rule: SliceRule, widths: Sequence[float], channels: int, mlp_ratio: float, drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.pos_embed = SlicedConv2d(rule, channels, channels, 3, depthwise=True, bias=True)
        self.norm1 = SlicedBatchNorm2d(rule, channels, widths)
        self.conv1 = SlicedConv2d(rule, channels, channels, 1, bias=True)
        self.attn = SlicedConv2d(rule, channels, channels, 5, depthwise=True, bias=True)
        self.conv2 = SlicedConv2d(rule, channels, channels, 1, bias=True)
        self.norm2 = SlicedBatchNorm2d(rule, channels, widths)
        self.mlp = ConvMlp(rule, channels, int(channels * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(B, c, h, w) to the same."""
        x = x + self.pos_embed(x, ratio)
        affinity = self.attn(self.conv1(self.norm1(x, ratio), ratio), ratio)
        x = x + self.drop_path(self.conv2(affinity, ratio))
        return x + self.drop_path(self.mlp(self.norm2(x, ratio), ratio))


class GlobalBlock(Block):
    """Position embedding, then a pre-norm transformer block over all positions."""

    def __init__(
        self, rule: SliceRule, channels: int, heads: int, mlp_ratio: float, drop: float, drop_path: float
    ) -> None:
        super().__init__(*rule, channels, heads, mlp_ratio=mlp_ratio, qkv_bias=True, drop=drop, drop_path=drop_path)
        self.pos_embed = SlicedConv2d(rule, channels, channels, 3, depthwise=True, bias=True)

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(B, c, h, w) to the same."""
        x = x + self.pos_embed(x, ratio)
        tokens = super().forward(x.flatten(2).transpose(1, 2), ratio)  # (B, h w, c)
        return tokens.transpose(1, 2).reshape(x.shape)


class UniFormer_scala(SlicedNetwork, nn.Module):
    """UniFormer whose every forward pass takes a width ratio.

    Args:
        img_size: side of the input in pixels, a multiple of 32; the count of operations goes by it.
        smallest_ratio, largest_ratio: s and l, which decide what end a width is cut from.
        granularity: step of the trained widths, each of which has batch statistics of its own.
        num_classes: 0 for pooled features instead of logits.
        depths, widths: blocks and channels of the four stages.
        heads: of the last two stages; None for one per 64 channels.
        overlap: overlapping patches with batch normalisation, the paper's dagger.
        drop_rate: in MLPs and attention projections, and after the patches.
        drop_path_rate: of the last block; rises linearly from 0.
    """

    def __init__(
        self,
        img_size: int = 224,
        smallest_ratio: float = 0.25,
        largest_ratio: float = 1.0,
        granularity: float = 0.0625,
        num_classes: int = 1000,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 4, 8, 3),
        widths: Sequence[int] = WIDTHS,
        heads: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        overlap: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = tuple(heads) if heads is not None else tuple(width // HEAD_DIM for width in widths[2:])
        grid = make_grid(smallest_ratio, largest_ratio, granularity).ratios
        rule = self.rule = SliceRule(smallest_ratio, largest_ratio)
        self.smallest_ratio, self.largest_ratio = smallest_ratio, largest_ratio
        self.img_size, self.num_classes, self.widths = img_size, num_classes, tuple(widths)
        self.in_chans, self.mlp_ratio, self.overlap = in_chans, mlp_ratio, overlap
        self.num_features = widths[-1]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        merges, stages, before = [], [], in_chans
        for stage, (depth, width, stride) in enumerate(zip(depths, widths, STRIDES, strict=True)):
            first = stage == 0
            merges.append(
                OverlappingMerge(rule, grid, before, width, stride, from_image=first)
                if overlap
                else PatchMerge(rule, before, width, stride, from_image=first)
            )
            own, rates = rates[:depth], rates[depth:]
            stages.append(
                nn.ModuleList(
                    LocalBlock(rule, grid, width, mlp_ratio, drop_rate, rate)
                    if stage < 2
                    else GlobalBlock(rule, width, self.heads[stage - 2], mlp_ratio, drop_rate, rate)
                    for rate in own
                )
            )
            before = width
        self.patch_embeds, self.stages = nn.ModuleList(merges), nn.ModuleList(stages)
        self.pos_drop = nn.Dropout(drop_rate)
        self.norm = SlicedBatchNorm2d(rule, before, grid)
        self.head = SlicedLinear(rule, before, num_classes, rows=False) if num_classes else None
        self.apply(_initialise)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.in_chans, self.img_size, self.img_size

    def no_weight_decay(self) -> set[str]:
        return set()

    def check_ratio(self, ratio: Ratio) -> Width:
        """The exact width; refuses one that the heads of a stage cannot share, naming the valid ones (ValueError)."""
        for channels, heads in zip(self.widths[2:], self.heads, strict=True):
            check_ratio(ratio, channels, heads)
        return exact(ratio)

    def forward_features(self, images: Tensor, ratio: Ratio) -> Tensor:
        """Images (B, 3, height, width) to the last map, (B, c, height / 32, width / 32), normalised."""
        ratio = self.check_ratio(ratio)
        if any(side % 32 for side in images.shape[2:]):
            raise ValueError(f"the sides of an image must be multiples of 32, got {tuple(images.shape[2:])}")
        x = images
        for index, (merge, blocks) in enumerate(zip(self.patch_embeds, self.stages, strict=True)):
            x = merge(x, ratio)
            x = self.pos_drop(x) if index == 0 else x
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues] - a list of blocks
                x = block(x, ratio)
        return self.norm(x, ratio)

    def forward_head(self, x: Tensor, ratio: Ratio, pre_logits: bool = False) -> Tensor:
        """Pooled features (B, c), or the logits (B, K)."""
        x = x.mean((2, 3))
        return x if pre_logits or self.head is None else self.head(x, ratio)

    def forward(self, images: Tensor, ratio: Ratio) -> Tensor:
        width = self.check_ratio(ratio)
        return self.forward_head(self.forward_features(images, width), width)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


MODELS: dict[str, dict[str, Any]] = {
    "uniformer_small_scala": {"depths": (3, 4, 8, 3), "overlap": False},
    "uniformer_small_plus_scala": {"depths": (3, 5, 9, 3), "overlap": True},
}
"""UniFormer-S (21.5 million parameters, 3.6 GMACs at 224 pixels and r = 1), and the one that its paper marks with a
dagger (24.0 million, 4.2); by their costs the latter is in Scala's figure."""

for _name, _shape in MODELS.items():
    register(_name, partial(UniFormer_scala, **_shape))
