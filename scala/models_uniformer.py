"""Sliceable UniFormer-S: Scala on a hybrid of convolution and attention (design: the official release has none).

UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning, arXiv:2201.04676; Scala,
arXiv:2412.04786, whose figures show UniFormer-S with 13 widths. Written from the papers. Two stages of local blocks
(depthwise 5x5 affinity, batch normalisation) and two of attention blocks, each with a depthwise 3x3 convolution as
dynamic position embedding. A width has int(r C) channels in every stage (``narrowing.py``); a stage keeps its number of
heads, and its attention scale is that of the full head, as in the ViT (``models_scala.py``).

Legend: B batch, C channels of a stage, c = int(r C), h, w its grid, r width ratio.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from scala.layers import NORM_EPS, register
from scala.models_scala import Block
from scala.narrowing import FULL, NarrowedNetwork
from scala.slicing import Ratio, Width, check_ratio, exact, sliced_size

WIDTHS = (64, 128, 320, 512)
STRIDES = (4, 2, 2, 2)
HEAD_DIM = 64


class OverlappingMerge(nn.Sequential):
    """Overlapping patches (the paper's variants marked with a dagger): a 3x3 convolution of stride 2, or two for 4."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        first = out // 2 if stride == 4 else out
        layers = {"conv1": nn.Conv2d(channels, first, 3, 2, 1), "norm1": nn.BatchNorm2d(first)}
        if stride == 4:
            layers |= {"act": nn.GELU(), "conv2": nn.Conv2d(first, out, 3, 2, 1), "norm2": nn.BatchNorm2d(out)}
        super().__init__(OrderedDict(layers))


class LocalBlock(nn.Module):
    """Position embedding, local affinity (a depthwise 5x5 between 1x1s), MLP; each with a shortcut."""

    def __init__(self, channels: int, mlp_ratio: float, drop: float, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.attn = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), drop=drop, use_conv=True)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) to the same."""
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.conv2(self.attn(self.conv1(self.norm1(x)))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GlobalBlock(Block):
    """Position embedding, then a pre-norm transformer block over all positions.

    Args:
        scale: of the attention, that of the full head.
    """

    def __init__(
        self, channels: int, heads: int, scale: float, mlp_ratio: float, drop: float, drop_path: float
    ) -> None:
        super().__init__(1.0, 1.0, channels, heads, mlp_ratio, qkv_bias=True, drop=drop, drop_path=drop_path)
        self.attn.scale = scale
        self.pos_embed = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - of one width
        """(B, c, h, w) to the same."""
        x = x + self.pos_embed(x)
        tokens = super().forward(x.flatten(2).transpose(1, 2), FULL)  # (B, h w, c)
        return tokens.transpose(1, 2).reshape(x.shape)


class Trunk(nn.Module):
    """UniFormer without its classifier, plain: images to the last map, normalised.

    Args:
        width: r, of all channels of the full network, ``widths``.

    The others are those of :class:`UniFormer_scala`.
    """

    def __init__(
        self, width: Width, *, in_chans: int, depths: Sequence[int], widths: Sequence[int], heads: Sequence[int],
        mlp_ratio: float, overlap: bool, drop_rate: float, drop_path_rate: float,
    ) -> None:  # fmt: skip
        super().__init__()
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        merges, stages, before = [], [], in_chans
        for stage, (depth, full, stride) in enumerate(zip(depths, widths, STRIDES, strict=True)):
            channels = sliced_size(full, width)
            if overlap:
                merges.append(OverlappingMerge(before, channels, stride))
            else:
                patches = {"proj": nn.Conv2d(before, channels, stride, stride), "norm": LayerNorm2d(channels, NORM_EPS)}
                merges.append(nn.Sequential(OrderedDict(patches)))
            shape: dict[str, Any] = {"channels": channels, "mlp_ratio": mlp_ratio, "drop": drop_rate}
            make: Any = LocalBlock
            if stage >= 2:
                make = partial(GlobalBlock, heads=heads[stage - 2], scale=(full // heads[stage - 2]) ** -0.5)
            stages.append(nn.ModuleList(make(**shape, drop_path=next(rates)) for _ in range(depth)))
            before = channels
        self.patch_embeds, self.stages = nn.ModuleList(merges), nn.ModuleList(stages)
        self.pos_drop = nn.Dropout(drop_rate)
        self.norm = nn.BatchNorm2d(before)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) to (B, c, height / 32, width / 32)."""
        for index, (merge, blocks) in enumerate(zip(self.patch_embeds, self.stages, strict=True)):
            x = merge(x)
            x = self.pos_drop(x) if index == 0 else x
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues] - a list of blocks
                x = block(x)
        return self.norm(x)


class UniFormer_scala(NarrowedNetwork):
    """UniFormer whose every forward pass takes a width ratio.

    Args:
        depths, widths: blocks and channels of the four stages.
        heads: of the last two stages; None for one per 64 channels.
        overlap: overlapping patches with batch normalisation, the paper's dagger.
        drop_rate: in MLPs and attention projections, and after the patches.
        drop_path_rate: of the last block; rises linearly from 0.

    The others are those of :class:`NarrowedNetwork`.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 4, 8, 3),
        widths: Sequence[int] = WIDTHS,
        heads: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        overlap: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        heads = tuple(heads) if heads is not None else tuple(width // HEAD_DIM for width in widths[2:])
        trunk = partial(
            Trunk, in_chans=in_chans, depths=depths, widths=widths, heads=heads, mlp_ratio=mlp_ratio, overlap=overlap,
            drop_rate=drop_rate, drop_path_rate=drop_path_rate,
        )  # fmt: skip
        super().__init__(trunk, "head", widths[-1], in_chans=in_chans, **options)
        self.depths, self.widths, self.heads = tuple(depths), tuple(widths), heads
        self.mlp_ratio, self.overlap = mlp_ratio, overlap
        self.apply(_initialise)

    def check_ratio(self, ratio: Ratio) -> Width:
        """The exact width; refuses one that the heads of a stage cannot share, naming the valid ones (ValueError)."""
        for channels, heads in zip(self.widths[2:], self.heads, strict=True):
            check_ratio(ratio, channels, heads)
        return exact(ratio)

    def slice_arguments(self, width: Width) -> tuple[dict[str, Any], dict[str, Any]]:
        shared, alone = super().slice_arguments(width)
        widths = [width.channels(full) for full in self.widths]
        same = {name: getattr(self, name) for name in ("depths", "heads", "mlp_ratio", "overlap")}
        return shared, alone | {"widths": widths} | same

    def forward_features(self, images: Tensor, ratio: Ratio) -> Tensor:
        """Images to the last map, (B, c, height / 32, width / 32), normalised."""
        if any(side % 32 for side in images.shape[2:]):
            raise ValueError(f"the sides of an image must be multiples of 32, got {tuple(images.shape[2:])}")
        return super().forward_features(images, ratio)


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
