"""Sliceable MobileNet v2: Scala on a lightweight convolutional network (design: the official release has none).

MobileNet v2: Inverted Residuals and Linear Bottlenecks, arXiv:1801.04381; Scala, arXiv:2412.04786, whose figure of the
slimmable ability shows this backbone. Weights have the names and shapes of timm's ``mobilenetv2_100``, so its
checkpoints load; depthwise convolutions are cut along their channels, for batch normalisation see ``layers.py``.

Legend: B batch, C channels, c = int(r C) channels of a slice, r width ratio.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from timm.models._efficientnet_builder import efficientnet_init_weights
from torch import Tensor, nn

from scala.layers import SlicedBatchNorm2d, SlicedConv2d, SlicedLinear, SlicedNetwork, register
from scala.slicing import Ratio, SliceRule, Width, WidthError, exact, make_grid, sliced_size

# channels, blocks, stride of the first block, expansion: Table 2 of arXiv:1801.04381
STAGES = ((16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6), (160, 3, 2, 6), (320, 1, 1, 6))
STEM, FEATURES = 32, 1280


class DepthwiseBlock(nn.Module):
    """The first block, without expansion: 3x3 depthwise, then 1x1."""

    def __init__(self, rule: SliceRule, widths: Sequence[float], channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = SlicedConv2d(rule, channels, channels, 3, stride=stride, depthwise=True)
        self.bn1 = SlicedBatchNorm2d(rule, channels, widths)
        self.conv_pw = SlicedConv2d(rule, channels, out, 1)
        self.bn2 = SlicedBatchNorm2d(rule, out, widths)

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        x = F.relu6(self.bn1(self.conv_dw(x, ratio), ratio))
        return self.bn2(self.conv_pw(x, ratio), ratio)


class InvertedResidual(nn.Module):
    """1x1 expansion to ``inner`` channels, 3x3 depthwise, linear 1x1 projection; a shortcut where shapes agree."""

    def __init__(
        self,
        rule: SliceRule,
        widths: Sequence[float],
        channels: int,
        inner: int,
        out: int,
        *,
        stride: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv_pw = SlicedConv2d(rule, channels, inner, 1)
        self.bn1 = SlicedBatchNorm2d(rule, inner, widths)
        self.conv_dw = SlicedConv2d(rule, inner, inner, 3, stride=stride, depthwise=True)
        self.bn2 = SlicedBatchNorm2d(rule, inner, widths)
        self.conv_pwl = SlicedConv2d(rule, inner, out, 1)
        self.bn3 = SlicedBatchNorm2d(rule, out, widths)
        self.has_skip = stride == 1 and channels == out
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        y = F.relu6(self.bn1(self.conv_pw(x, ratio), ratio))
        y = F.relu6(self.bn2(self.conv_dw(y, ratio), ratio))
        y = self.bn3(self.conv_pwl(y, ratio), ratio)
        return x + self.drop_path(y) if self.has_skip else y


class MobileNetV2_scala(SlicedNetwork, nn.Module):
    """MobileNet v2 whose every forward pass takes a width ratio.

    Args:
        img_size: side of the input in pixels; any works, the count of operations goes by it.
        smallest_ratio, largest_ratio: s and l, which decide what end a width is cut from.
        granularity: step of the trained widths, each of which has batch statistics of its own.
        num_classes: 0 for pooled features instead of logits.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; rises linearly from 0.
        multiplier: every layer has int(multiplier C) channels: a slice as a network of its own.
    """

    def __init__(
        self,
        img_size: int = 224,
        smallest_ratio: float = 0.25,
        largest_ratio: float = 1.0,
        granularity: float = 0.0625,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        widths = make_grid(smallest_ratio, largest_ratio, granularity).ratios
        rule = SliceRule(smallest_ratio, largest_ratio)
        self.rule, self.smallest_ratio, self.largest_ratio = rule, smallest_ratio, largest_ratio
        self.img_size, self.num_classes, self.drop_rate = img_size, num_classes, drop_rate
        stem, features = sliced_size(STEM, multiplier), sliced_size(FEATURES, multiplier)
        self.multiplier = multiplier
        self.num_features, self.narrowest = features, sliced_size(STAGES[0][0], multiplier)
        self.conv_stem = SlicedConv2d(rule, in_chans, stem, 3, stride=2, from_image=True)
        self.bn1 = SlicedBatchNorm2d(rule, stem, widths)
        total = sum(blocks for _, blocks, _, _ in STAGES)
        stages, channels, full, done = [], stem, STEM, 0
        for wide, blocks, stride, expansion in STAGES:
            stage, out = [], sliced_size(wide, multiplier)
            for index in range(blocks):
                step = stride if index == 0 else 1
                if expansion == 1:
                    stage.append(DepthwiseBlock(rule, widths, channels, out, step))
                else:
                    rate, inner = drop_path_rate * done / total, sliced_size(full * expansion, multiplier)
                    stage.append(InvertedResidual(rule, widths, channels, inner, out, stride=step, drop_path=rate))
                channels, full, done = out, wide, done + 1
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = SlicedConv2d(rule, channels, features, 1)
        self.bn2 = SlicedBatchNorm2d(rule, features, widths)
        self.classifier = SlicedLinear(rule, features, num_classes, rows=False) if num_classes else None
        efficientnet_init_weights(self)  # normal with variance 2 / fan-out; uniform for the classifier

    def check_ratio(self, ratio: Ratio) -> Width:
        """The exact width; it must lie in (0, 1] and leave every layer a channel (ValueError)."""
        width = exact(ratio)
        if not width.channels(self.narrowest):
            raise WidthError(
                f"a width ratio must be from 1/{self.narrowest}, which leaves the narrowest layer one channel, to 1, "
                f"got {width.steps / width.of:g}"
            )
        return width

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.conv_stem.in_channels, self.img_size, self.img_size

    def no_weight_decay(self) -> set[str]:
        return set()

    def forward_features(self, x: Tensor, ratio: Ratio) -> Tensor:
        """Images (B, 3, height, width) to the last map, (B, int(r 1280), height / 32, width / 32)."""
        ratio = self.check_ratio(ratio)
        x = F.relu6(self.bn1(self.conv_stem(x, ratio), ratio))
        for stage in self.blocks:
            for block in stage:  # pyright: ignore[reportGeneralTypeIssues] - a Sequential of blocks
                x = block(x, ratio)
        return F.relu6(self.bn2(self.conv_head(x, ratio), ratio))

    def forward_head(self, x: Tensor, ratio: Ratio, pre_logits: bool = False) -> Tensor:
        """Pooled features (B, c), or the logits (B, K)."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits or self.classifier is None else self.classifier(x, ratio)

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        width = self.check_ratio(ratio)
        return self.forward_head(self.forward_features(x, width), width)


MODELS = {"mobilenet_v2_scala": MobileNetV2_scala}
"""MobileNet v2: 3.5 million parameters, 0.30 GMACs at 224 pixels and r = 1."""

for _name, _network in MODELS.items():
    register(_name, _network)
