"""Layers of which a width ratio uses a part of the weights, and the weights of a whole network at a width.

*Slicing Vision Transformer for Flexible Inference*, arXiv:2412.04786. Every layer takes the ratio after its input;
which channels that means is decided in ``slicing.py``.

    sliced_state_dict(model, 0.5)           # every weight of a sliced model at that width

Legend: B batch, C channels, c = int(r C) channels of a slice, d = int(r D), r width ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from common.measure.flops import OpCounts, count_operations
from scala.slicing import Ratio, SliceRule, Width

NORM_EPS = 1e-5
"""Of every layer normalisation that runs: the published networks were trained with it, not with DeiT's 1e-6."""


_PASSED_BY_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def register(name: str, make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Put a network into timm's registry: a factory that takes what timm adds and has no weights to give."""

    def factory(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no weights to download, no published weights fit: train it, or load your own")
        return make(**{key: value for key, value in kwargs.items() if key not in _PASSED_BY_TIMM})

    factory.__name__ = factory.__qualname__ = name
    factory.__module__, factory.__doc__ = make.__module__, f"{name}; see ``MODELS``."
    return register_model(factory)


class Sliced:
    """A module that knows its own weights at a width.

    Attributes:
        rule: decides the end.
        dims: own parameter -> dimension that shrinks -> equal parts along it, see :meth:`SliceRule.cut`; parameters
            that are not here are whole at every width.
    """

    rule: SliceRule
    dims: Mapping[str, Mapping[int, int]]

    def sliced(self, ratio: Ratio) -> dict[str, Tensor]:
        """The module's own parameters at ``ratio``, views, by their names in its state dict."""
        own: dict[str, Tensor] = {}
        for name, value in self._parameters.items():  # pyright: ignore[reportAttributeAccessIssue] - of a module
            if value is not None:
                own[name] = value
                for dim, parts in self.dims.get(name, {}).items():
                    own[name] = self.rule.cut(own[name], ratio, dim, parts=parts)
        return own


class SlicedLinear(Sliced, nn.Linear):
    """A linear layer of which ``ratio`` uses a block of the rows, of the columns, or of both.

    Args:
        rule: decides the end.
        rows, columns: whether output and input channels shrink with the ratio; a classification head keeps its rows.
        parts: equal parts of the rows, see :meth:`SliceRule.cut`.
    """

    def __init__(
        self, rule: SliceRule, in_features: int, out_features: int, bias: bool = True, *, rows: bool = True,
        columns: bool = True, parts: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.rule = rule
        down = {0: parts} if rows else {}
        self.dims = {"weight": {1: 1} | down if columns else down, "bias": down}

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = self.sliced(ratio)
        return F.linear(x, own["weight"], own.get("bias"))


class SlicedLayerNorm(Sliced, nn.LayerNorm):
    """Layer normalisation over d channels with the affine weights of ``ratio``; eps is 1e-5, see ``NORM_EPS``."""

    def __init__(self, rule: SliceRule, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)
        self.rule, self.dims = rule, {"weight": {0: 1}, "bias": {0: 1}}

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = self.sliced(ratio)
        return F.layer_norm(x, own["weight"].shape, own["weight"], own["bias"], self.eps)


class SlicedConv2d(Sliced, nn.Conv2d):
    """Convolution of an image to patches, whose output channels are cut."""

    def __init__(self, rule: SliceRule, in_channels: int, out_channels: int, patch: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, patch, patch, bias=bias)
        self.rule, self.dims = rule, {"weight": {0: 1}, "bias": {0: 1}}

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, 3, height, width) to (B, c, height / patch, width / patch)."""
        own = self.sliced(ratio)
        return F.conv2d(x, own["weight"], own.get("bias"), self.stride)


class SlicedNetwork:
    """What a whole network says of its widths; those of the bound decide which end a width is cut from."""

    smallest_ratio: float
    largest_ratio: float

    def check_ratio(self, ratio: Ratio) -> Width:
        """The exact width; one that the network cannot have is refused, naming those that it can (WidthError)."""
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it is built for."""
        raise NotImplementedError

    def slice_arguments(self, width: Width) -> tuple[dict[str, Any], dict[str, Any]]:
        """Constructor arguments of a width as a network of its own: those timm's class has, too, and further ones."""
        raise NotImplementedError

    def sliced_parameters(self, width: Width) -> dict[str, Tensor]:
        """See :func:`sliced_state_dict`."""
        model: Any = self
        cut: dict[str, Tensor] = {}
        for prefix, module in model.named_modules():
            if isinstance(module, Sliced):
                cut |= {f"{prefix}.{name}" if prefix else name: value for name, value in module.sliced(width).items()}
        return {name: cut[name] for name, _ in model.named_parameters()}

    def count_parameters(self, ratio: Ratio) -> int:
        """Parameters that a width touches: those of a stand-alone network of that width; also on the meta device."""
        return sum(value.numel() for value in sliced_state_dict(self, ratio).values())

    def count_ops(self, ratio: Ratio) -> OpCounts:
        """Operations of one forward pass of one image at a width, from shapes alone."""
        model: Any = self
        images = torch.empty(1, *self.input_shape, device="meta", dtype=next(model.parameters()).dtype)
        return count_operations(model, images, self.check_ratio(ratio)).executed


def sliced_state_dict(model: SlicedNetwork, ratio: Ratio) -> dict[str, Tensor]:
    """Every weight that the width uses, under the names and in the order of the network's own; views, no copies.

    The shapes are those of a stand-alone network of width d = int(r D) with the same number of heads. Its attention
    scale differs, though: see ``scala/export.py``.

    Raises:
        WidthError: an invalid ratio.
    """
    return model.sliced_parameters(model.check_ratio(ratio))
