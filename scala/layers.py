"""Layers of which a width ratio uses a part of the weights, and the weights of a whole network at a width.

*Slicing Vision Transformer for Flexible Inference*, arXiv:2412.04786. Every layer takes the ratio after its input;
which channels that means is decided in ``slicing.py``. Batch statistics of different widths differ, so they cannot
share one running mean: every trained width has a row of its own, as in slimmable networks (arXiv:1812.08928). A width
that was not trained gets its row from a few batches by :func:`calibrate_` (design).

    sliced_state_dict(model, 0.5)           # every weight of a sliced model at that width

Legend: B batch, C channels, c = int(r C) channels of a slice, d = int(r D), r width ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from common.measure.flops import OpCounts, count_operations
from common.run.launch import get_world_size, reduce_sums
from scala.slicing import Ratio, SliceRule, Width, exact, sliced_size

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
    """Convolution whose output channels, and input channels unless it reads the image, are cut; or a depthwise one.

    Args:
        padding: None for half the kernel.
        depthwise: one filter per channel; the filters are cut along the channels.
        from_image: the input is never cut.
    """

    def __init__(
        self, rule: SliceRule, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1,
        padding: int | None = None, depthwise: bool = False, from_image: bool = False, bias: bool = False,
    ) -> None:  # fmt: skip
        if depthwise and in_channels != out_channels:
            raise ValueError(f"a depthwise convolution keeps its channels, got {in_channels} and {out_channels}")
        padding = kernel // 2 if padding is None else padding
        groups = in_channels if depthwise else 1
        super().__init__(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias)
        self.rule = rule
        self.dims = {"weight": {0: 1} if depthwise or from_image else {0: 1, 1: 1}, "bias": {0: 1}}

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, c_in, h, w) to (B, c_out, h', w')."""
        own = self.sliced(ratio)
        groups = own["weight"].shape[0] if self.groups > 1 else 1
        return F.conv2d(x, own["weight"], own.get("bias"), self.stride, self.padding, self.dilation, groups)  # pyright: ignore[reportArgumentType]


class SlicedBatchNorm2d(Sliced, nn.Module):
    """Batch normalisation with shared affine weights and running statistics per trained width.

    ``running_mean``, ``running_var`` and ``num_batches_tracked`` are those of the largest width, so that a checkpoint
    of an ordinary network fits; rows of ``narrow_mean`` and ``narrow_var`` belong to the other widths, from the
    smallest on, of which a width uses the first c entries.

    Args:
        channels: C.
        widths: trained ratios in rising order; the last is the largest.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    narrow_mean: Tensor
    narrow_var: Tensor

    def __init__(
        self, rule: SliceRule, channels: int, widths: Sequence[float], *, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.rule, self.dims = rule, {"weight": {0: 1}, "bias": {0: 1}}
        self.channels, self.eps, self.momentum = channels, eps, momentum
        *narrow, self.largest = (exact(width) for width in widths)
        self.rows = {width: index for index, width in enumerate(narrow)}
        self.calibrated: dict[Width, tuple[Tensor, Tensor]] = {}
        self.batches_seen: int | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        if self.rows:
            self.register_buffer("narrow_mean", torch.zeros(len(self.rows), channels))
            self.register_buffer("narrow_var", torch.ones(len(self.rows), channels))

    def knows(self, ratio: Ratio) -> bool:
        """Whether there are statistics for a width."""
        return exact(ratio) in (self.largest, *self.rows, *self.calibrated)

    def statistics(self, ratio: Ratio) -> tuple[Tensor, Tensor]:
        """Running mean and variance of a width, (c,) each, as views.

        Raises:
            ValueError: a width that was neither trained nor calibrated.
        """
        width = exact(ratio)
        size = width.channels(self.channels)
        if width == self.largest:
            return self.running_mean[:size], self.running_var[:size]
        if width in self.rows:
            row = self.rows[width]
            return self.narrow_mean[row, :size], self.narrow_var[row, :size]
        if width in self.calibrated:
            return self.calibrated[width]
        known = ", ".join(f"{steps / of:g}" for steps, of in (*self.rows, self.largest))
        raise ValueError(
            f"batch normalisation has no statistics for width ratio {width.steps / width.of:g}: it has those of the "
            f"trained widths {known}; give calibrate_() a few batches"
        )

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(B, c, h, w) normalised; in training by its own statistics, which move the running ones of this width."""
        weight, bias = self.sliced(ratio).values()
        if weight.is_meta:  # a count of operations, which every width has
            mean, variance = self.running_mean[: len(weight)], self.running_var[: len(weight)]
        else:
            mean, variance = self.statistics(ratio)
        if self.batches_seen is not None:  # calibration: the plain average over batches
            return F.batch_norm(x, mean, variance, weight, bias, True, 1 / (self.batches_seen + 1), self.eps)
        if self.training and exact(ratio) == self.largest:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)

    def reserve(self, ratio: Ratio) -> None:
        """Make room for the statistics of a width that is not trained."""
        if not self.knows(ratio):
            empty = self.running_mean.new_zeros(sliced_size(self.channels, ratio))
            self.calibrated[exact(ratio)] = (empty, empty + 1)


def batch_norms(model: nn.Module) -> list[SlicedBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, SlicedBatchNorm2d)]


@torch.no_grad()
def calibrate_(model: nn.Module, ratio: Ratio, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of one width by their average over ``batches`` of images; weights stay.

    Statistics of a trained width stay in the model's state; those of another width live until the model is rebuilt.

    Args:
        model: called as ``model(images, ratio)``, in evaluation mode (dropout off), with sliced batch normalisation.
        batches: images (B, 3, height, width) on the model's device; a few thousand in all suffice.

    Returns:
        Batches seen by this process; several processes end with the mean of theirs.

    Raises:
        ValueError: a model without batch normalisation, or no batch.

    Source: arXiv:2412.04786, Section 5.2, slimmable ability across architectures (design).
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch normalisation to calibrate")
    was_training, seen = model.training, 0
    model.eval()
    for norm in norms:
        norm.reserve(ratio)
    try:
        for images in batches:
            for norm in norms:
                norm.batches_seen = seen
            model(images, ratio)
            seen += 1
    finally:
        for norm in norms:
            norm.batches_seen = None
        model.train(was_training)
    if not seen:
        raise ValueError("calibration needs at least one batch of images")
    for norm in norms:
        for value in norm.statistics(ratio):  # every process saw its own images
            value.copy_(reduce_sums(value.clone()) / get_world_size())
    return seen


# A whole network at one width


def sliced_state_dict(model: nn.Module, ratio: Ratio) -> dict[str, Tensor]:
    """Every weight that the width uses, under the names and in the order of ``model.state_dict()``; views, no copies.

    The shapes are those of a stand-alone network of width d = int(r D) with the same number of heads. Its attention
    scale differs, though: see ``scala/export.py``.

    Raises:
        WidthError: an invalid ratio, from the model's own ``check_ratio``.
        TypeError: a parameter that no sliced module owns.
    """
    check: Callable[[Ratio], Width] | None = getattr(model, "check_ratio", None)
    width = check(ratio) if check is not None else exact(ratio)
    cut: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Sliced):
            cut |= {f"{prefix}.{name}" if prefix else name: value for name, value in module.sliced(width).items()}
    names = [name for name, _ in model.named_parameters()]
    if missing := [name for name in names if name not in cut]:
        raise TypeError(f"no sliced module owns {', '.join(missing)}")
    return {name: cut[name] for name in names}


@torch.no_grad()
def count_active_parameters(model: nn.Module, ratio: Ratio) -> int:
    """Entries of the weights that a width uses; works on the meta device."""
    return sum(value.numel() for value in sliced_state_dict(model, ratio).values())


class SlicedNetwork:
    """What a whole network says of its widths."""

    def check_ratio(self, ratio: Ratio) -> Width:
        """The exact width; one that the network cannot have is refused, naming those that it can (WidthError)."""
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it is built for."""
        raise NotImplementedError

    def count_parameters(self, ratio: Ratio) -> int:
        """Parameters that a width touches: those of a stand-alone network of that width."""
        return count_active_parameters(self, ratio)  # pyright: ignore[reportArgumentType] - a module

    def count_ops(self, ratio: Ratio) -> OpCounts:
        """Operations of one forward pass of one image at a width, from shapes alone."""
        model: Any = self
        images = torch.empty(1, *self.input_shape, device="meta", dtype=next(model.parameters()).dtype)
        return count_operations(model, images, self.check_ratio(ratio)).executed
