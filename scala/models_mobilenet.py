"""Sliceable MobileNet v2: Scala on a lightweight convolutional network (design: the official release has none).

MobileNet v2: Inverted Residuals and Linear Bottlenecks, arXiv:1801.04381; Scala, arXiv:2412.04786, whose figure of the
slimmable ability shows this backbone. A width is timm's ``mobilenetv2_100`` with int(r C) channels in every layer, so
that timm's checkpoints load; see ``narrowing.py``.

Legend: C channels, r width ratio.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.models._efficientnet_builder import efficientnet_init_weights
from torch import nn

from scala.layers import register
from scala.narrowing import NarrowedNetwork
from scala.slicing import Ratio, Width, WidthError, exact, sliced_size

FEATURES, NARROWEST = 1280, 16
"""Channels of the last map, and of the narrowest layer."""


def make_mobilenet(width: Width, *, multiplier: float, **options: Any) -> nn.Module:
    """timm's network without classifier, int(r int(multiplier C)) channels in every layer, not initialised."""
    network: Any = timm.create_model("mobilenetv2_100", num_classes=0, **options)

    def narrow(channels: int) -> int:
        return sliced_size(sliced_size(channels, multiplier), width)

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            out, into, *kernel = layer.weight.shape
            into = into if layer is network.conv_stem or layer.groups > 1 else narrow(into)
            layer.groups = narrow(layer.groups) if layer.groups > 1 else 1
            layer.weight = nn.Parameter(torch.empty(narrow(out), into, *kernel))
            layer.out_channels, layer.in_channels = narrow(out), into * layer.groups
        elif isinstance(layer, nn.BatchNorm2d):
            layer.num_features = narrow(layer.num_features)
            layer.weight, layer.bias = (nn.Parameter(torch.empty(layer.num_features)) for _ in range(2))
            layer.running_mean, layer.running_var = torch.zeros(layer.num_features), torch.ones(layer.num_features)
    network.forward = network.forward_features
    return network


class MobileNetV2_scala(NarrowedNetwork):
    """MobileNet v2 whose every forward pass takes a width ratio.

    Args:
        drop_path_rate: of the last block; rises linearly from 0.
        multiplier: every layer has int(multiplier C) channels: a slice as a network of its own.

    The others are those of :class:`NarrowedNetwork`.
    """

    def __init__(
        self, *, in_chans: int = 3, drop_path_rate: float = 0.0, multiplier: float = 1.0, **options: Any
    ) -> None:
        make = partial(make_mobilenet, multiplier=multiplier, in_chans=in_chans, drop_path_rate=drop_path_rate)
        super().__init__(make, "classifier", sliced_size(FEATURES, multiplier), in_chans=in_chans, **options)
        self.multiplier, self.narrowest = multiplier, sliced_size(NARROWEST, multiplier)
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

    def slice_arguments(self, width: Width) -> tuple[dict[str, Any], dict[str, Any]]:
        shared, alone = super().slice_arguments(width)
        return shared, alone | {"multiplier": self.multiplier * width.steps / width.of}


MODELS = {"mobilenet_v2_scala": MobileNetV2_scala}
"""MobileNet v2: 3.5 million parameters, 0.30 GMACs at 224 pixels and r = 1."""

for _name, _network in MODELS.items():
    register(_name, _network)
