"""RegNetY 16gf, 32gf and 128gf, the convolutional networks that SWAG publishes beside its Vision Transformers.

Papers: Designing Network Design Spaces, arXiv:2003.13678 (RegNet, AnyNet); SWAG, arXiv:2201.08371. Parameter names and
shapes are those of the published checkpoints.

Letters: B images, C channels, H x W a feature map. A stage is a run of blocks of one width, the first of stride 2.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from hourglass_swag.models.weights import convert_torchvision_regnet


class BlockType(StrEnum):
    """What a stage is made of."""

    RES_BOTTLENECK_BLOCK = "RES_BOTTLENECK_BLOCK"
    RES_BOTTLENECK_LINEAR_BLOCK = "RES_BOTTLENECK_LINEAR_BLOCK"


class StemType(StrEnum):
    """What precedes the stages."""

    RES_STEM_IN = "RES_STEM_IN"
    SIMPLE_STEM_IN = "SIMPLE_STEM_IN"


class ActivationType(StrEnum):
    """The non-linearity."""

    RELU = "RELU"
    SILU = "SILU"


class Stage(NamedTuple):
    """One stage of a network."""

    width: int
    stride: int
    depth: int
    group_width: int
    bottleneck_multiplier: float


@dataclass(frozen=True, kw_only=True)
class BlockParams:
    """What all blocks of a network share.

    Attributes:
        stem_type, stem_width: the stem and its channels.
        block_type, activation: names or members of the enumerations.
        use_se: squeeze and excitation in bottleneck blocks, with ``se_ratio`` of the block's input width.
        bn_epsilon, bn_momentum: of every batch normalisation.
        num_classes: outputs; None returns the feature map.
    """

    stem_type: StemType | str = StemType.SIMPLE_STEM_IN
    stem_width: int = 32
    block_type: BlockType | str = BlockType.RES_BOTTLENECK_BLOCK
    activation: ActivationType | str = ActivationType.RELU
    use_se: bool = True
    se_ratio: float = 0.25
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.1
    num_classes: int | None = None

    def get_expanded_params(self) -> list[Stage]:
        """The stages."""
        raise NotImplementedError


@dataclass(frozen=True)
class AnyNetParams(BlockParams):
    """A network whose stages are listed one by one; each list has an entry per stage."""

    depths: Sequence[int]
    widths: Sequence[int]
    group_widths: Sequence[int]
    bottleneck_multipliers: Sequence[float]
    strides: Sequence[int]

    def get_expanded_params(self) -> list[Stage]:
        """The stages.

        Raises:
            ValueError: if the lists differ in length.
        """
        lists = (self.widths, self.strides, self.depths, self.group_widths, self.bottleneck_multipliers)
        return [Stage(*stage) for stage in zip(*lists, strict=True)]


@dataclass(frozen=True)
class RegNetParams(BlockParams):
    """A network whose widths follow a quantised linear function of the block's number.

    Attributes:
        depth: number of blocks.
        w_0, w_a, w_m: width of the first block, slope, and ratio of the quantisation.
        group_width: channels of a group of the 3 x 3 convolutions.
        bottleneck_multiplier: width inside a block relative to its output.

    Raises:
        ValueError: unless w_a >= 0, w_0 > 0, w_m > 1 and w_0 is a multiple of 8.
    """

    depth: int
    w_0: int
    w_a: float
    w_m: float
    group_width: int
    bottleneck_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if self.w_a < 0 or self.w_0 <= 0 or self.w_m <= 1 or self.w_0 % 8:
            raise ValueError(
                "RegNetParams needs w_a >= 0, w_0 > 0 and a multiple of 8, w_m > 1, "
                f"got w_a = {self.w_a}, w_0 = {self.w_0}, w_m = {self.w_m}"
            )

    def get_expanded_params(self) -> list[Stage]:
        """The stages: blocks of one width follow each other; the width is made a multiple of the groups'.

        Source: arXiv:2003.13678, section 3.3, Eq. 2 to 4.
        """
        linear = self.w_0 + self.w_a * np.arange(self.depth)  # u_j
        exponents = np.round(np.log(linear / self.w_0) / math.log(self.w_m))  # s_j
        widths = 8 * np.round(self.w_0 * self.w_m**exponents / 8)
        stages = []
        for width, run in groupby(int(width) for width in widths):
            bottleneck = int(width * self.bottleneck_multiplier)
            group = min(self.group_width, bottleneck)
            bottleneck = int(round(bottleneck / group) * group)
            multiplier = self.bottleneck_multiplier
            stages.append(Stage(int(bottleneck / multiplier), 2, len(list(run)), group, multiplier))
        return stages


class SqueezeAndExcitation(nn.Module):
    """Channel attention: scale every channel by a function of all channel means.

    Args:
        channels, hidden: of the features, and between the two 1 x 1 convolutions.
        activation: between them.
    """

    def __init__(self, channels: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.excitation = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), activation, nn.Conv2d(hidden, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excitation(x.mean((2, 3), keepdim=True))


class Maker:
    """Makes the layers of one network, which share their kind of normalisation and one activation module."""

    def __init__(self, params: BlockParams) -> None:
        self.params = params
        kind = ActivationType(params.activation)
        self.activation = nn.ReLU(inplace=True) if kind is ActivationType.RELU else nn.SiLU()

    def convolution(self, width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        """Convolution that keeps the size but for the stride, without bias."""
        return nn.Conv2d(width_in, width_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)

    def norm(self, width: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(width, eps=self.params.bn_epsilon, momentum=self.params.bn_momentum)

    def unit(self, width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        """Convolution, normalisation, activation."""
        convolution = self.convolution(width_in, width_out, kernel, stride, groups)
        return nn.Sequential(convolution, self.norm(width_out), self.activation)


class Stem(nn.Module):
    """3 x 3 convolution of stride 2 (SIMPLE_STEM_IN), or 7 x 7 and max pool (RES_STEM_IN)."""

    def __init__(self, make: Maker) -> None:
        super().__init__()
        kind, width = StemType(make.params.stem_type), make.params.stem_width
        self.stem = make.unit(3, width, 7 if kind is StemType.RES_STEM_IN else 3, 2)
        if kind is StemType.RES_STEM_IN:
            self.stem.append(nn.MaxPool2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class BottleneckTransform(nn.Sequential):
    """1 x 1, grouped 3 x 3, squeeze and excitation, 1 x 1."""

    def __init__(self, make: Maker, width_in: int, stage: Stage, stride: int) -> None:
        inner = round(stage.width * stage.bottleneck_multiplier)
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            a=make.unit(width_in, inner, 1), b=make.unit(inner, inner, 3, stride, inner // stage.group_width)
        )
        if make.params.use_se:
            layers["se"] = SqueezeAndExcitation(inner, round(make.params.se_ratio * width_in), make.activation)
        layers["c"] = make.convolution(inner, stage.width, 1)
        layers["final_bn"] = make.norm(stage.width)
        super().__init__(layers)


class ResBottleneckBlock(nn.Module):
    """``activation(shortcut(x) + f(x))``; the shortcut is a strided 1 x 1 convolution where the shape changes."""

    def __init__(self, make: Maker, width_in: int, stage: Stage, stride: int) -> None:
        super().__init__()
        self.proj = self.bn = None
        if width_in != stage.width or stride != 1:
            self.proj = make.convolution(width_in, stage.width, 1, stride)
            self.bn = make.norm(stage.width)
        self.f = BottleneckTransform(make, width_in, stage, stride)
        self.activation = make.activation

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is None or self.bn is None:
            return self.activation(x + self.f(x))
        return self.activation(self.bn(self.proj(x)) + self.f(x))


class ResBottleneckLinearBlock(nn.Module):
    """Bottleneck block without activation at its end; its shortcut exists only where the shape stays."""

    def __init__(self, make: Maker, width_in: int, stage: Stage, stride: int) -> None:
        super().__init__()
        self.has_skip = width_in == stage.width and stride == 1
        self.f = BottleneckTransform(make, width_in, stage, stride)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if self.has_skip else self.f(x)


BLOCKS: dict[BlockType, type[ResBottleneckBlock | ResBottleneckLinearBlock]] = {
    BlockType.RES_BOTTLENECK_BLOCK: ResBottleneckBlock,
    BlockType.RES_BOTTLENECK_LINEAR_BLOCK: ResBottleneckLinearBlock,
}


class Head(nn.Module):
    """Global average and a linear layer: features (B, C, H, W) to logits (B, num_classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class AnyNet(nn.Module):
    """Stem, stages, head.

    Args:
        params: shape of the network.
        image_size: side in pixels that the network is meant for. It takes images of any size.

    Raises:
        ValueError: if the parameters are out of range.
    """

    def __init__(self, params: BlockParams, *, image_size: int = 224) -> None:
        super().__init__()
        self.params, self.image_size, self.num_classes = params, image_size, params.num_classes
        make = Maker(params)
        block = BLOCKS[BlockType(params.block_type)]
        self.stem = Stem(make)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        width = params.stem_width
        for number, stage in enumerate(params.get_expanded_params(), start=1):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(stage.depth):
                blocks[f"block{number}-{index}"] = block(make, width, stage, 1 if index else stage.stride)
                width = stage.width
            stages[f"block{number}"] = nn.Sequential(blocks)
        self.trunk_output = nn.Sequential(stages)
        self._initialise()
        self.head = None if params.num_classes is None else Head(width, params.num_classes)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Convolutions N(0, 2 / (k^2 out)), not divided by groups; the head, made later, keeps torch's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0.0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W), or the feature map (B, C, H', W') without a head."""
        x = self.trunk_output(self.stem(images))
        return x if self.head is None else self.head(x)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint of the published or of torchvision's layout; ``state_dict`` itself is not changed.

        Returns:
            torch's report of missing and unexpected keys.

        Raises:
            RuntimeError: naming all keys that are missing, unexpected or of another shape (with ``strict``).
        """
        return super().load_state_dict(self.adapt_state(state_dict), strict=strict, assign=assign)

    def adapt_state(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a checkpoint under this model's names."""
        return convert_torchvision_regnet(state_dict)


class RegNet(AnyNet):
    """AnyNet of ``RegNetParams``."""

    def __init__(self, params: RegNetParams, *, image_size: int = 224) -> None:
        super().__init__(params, image_size=image_size)


SIZES: dict[str, dict[str, float]] = {
    "regnety_16gf": {"depth": 18, "w_0": 200, "w_a": 106.23, "w_m": 2.48, "group_width": 112},
    "regnety_32gf": {"depth": 20, "w_0": 232, "w_a": 115.89, "w_m": 2.53, "group_width": 232},
    "regnety_128gf": {"depth": 27, "w_0": 456, "w_a": 160.83, "w_m": 2.52, "group_width": 264},
}


def make_regnet(size: str, image_size: int = 224, **options: Any) -> RegNet:
    """The network of a size of ``SIZES``; ``options`` are the other arguments of ``RegNetParams``."""
    return RegNet(RegNetParams(**{**cast(dict[str, Any], SIZES[size]), **options}), image_size=image_size)
