"""Convolution and batch normalisation at any width, for the backbones of Scala that are not plain ViTs (design).

Batch statistics of different widths differ, so they cannot share one running mean: every trained width has a row of its
own, as in slimmable networks (arXiv:1812.08928). A width that was not trained gets its row from a few batches by
:func:`calibrate_`. Affine weights are shared and cut by the same rule as everything else (``scala/slicing.py``).

Legend: B batch, C channels, c = int(r C) channels of a slice, r width ratio, s and l smallest and largest ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.measure.flops import OpCounts
from common.run.distributed import get_world_size, reduce_sums
from scala.slicing import SliceRule, sliced_size


class ChannelConv2d(nn.Conv2d):
    """Convolution whose output channels, and input channels unless it reads the image, are cut; or a depthwise one.

    Args:
        depthwise: one filter per channel; the filters are cut along the channels.
        from_image: the input is never cut.
    """

    def __init__(
        self,
        rule: SliceRule,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        depthwise: bool = False,
        from_image: bool = False,
        bias: bool = False,
    ) -> None:
        if depthwise and in_channels != out_channels:
            raise ValueError(f"a depthwise convolution keeps its channels, got {in_channels} and {out_channels}")
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=kernel // 2 if padding is None else padding,
            groups=in_channels if depthwise else 1,
            bias=bias,
        )
        self.rule = rule
        self.axes = (0,) if depthwise or from_image else (0, 1)

    def forward(self, x: Tensor, ratio: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, c_in, h, w) to (B, c_out, h', w')."""
        own = self.sliced(ratio)
        groups = own["weight"].shape[0] if self.groups > 1 else 1
        return F.conv2d(x, own["weight"], own.get("bias"), self.stride, self.padding, self.dilation, groups)  # pyright: ignore[reportArgumentType]

    def sliced(self, ratio: float) -> dict[str, Tensor]:
        own = {"weight": self.rule.cut(self.weight, ratio, *self.axes)}
        return own if self.bias is None else own | {"bias": self.rule.cut(self.bias, ratio, 0)}

    def count_ops(self, ratio: float, pixels: int) -> OpCounts:
        """Operations for ``pixels`` positions of the output."""
        shape = list(self.weight.shape)
        for axis in self.axes:
            shape[axis] = sliced_size(shape[axis], ratio)
        rows, columns, height, width = shape
        counts = OpCounts(conv=pixels * rows * columns * height * width)
        return counts + OpCounts(conv_bias=pixels * rows) if self.bias is not None else counts


class SlicedBatchNorm2d(nn.Module):
    """Batch normalisation with shared affine weights and running statistics per trained width.

    ``running_mean``, ``running_var`` and ``num_batches_tracked`` are those of the largest width, so that a checkpoint
    of an ordinary network fits; rows of ``narrow_mean`` and ``narrow_var`` belong to the other widths, from the
    smallest on, of which a width uses the first c entries.

    Args:
        channels: C.
        widths: trained ratios in rising order; the last is the largest.
    """

    def __init__(
        self, rule: SliceRule, channels: int, widths: Sequence[float], *, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.rule, self.channels, self.eps, self.momentum = rule, channels, eps, momentum
        self.rows = {width: index for index, width in enumerate(widths[:-1])}
        self.largest = widths[-1]
        self.calibrated: dict[float, tuple[Tensor, Tensor]] = {}
        self.batches_seen: int | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.narrow_mean: Tensor
        self.narrow_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        if self.rows:
            self.register_buffer("narrow_mean", torch.zeros(len(self.rows), channels))
            self.register_buffer("narrow_var", torch.ones(len(self.rows), channels))

    def knows(self, ratio: float) -> bool:
        """Whether there are statistics for a width."""
        return ratio == self.largest or ratio in self.rows or ratio in self.calibrated

    def statistics(self, ratio: float) -> tuple[Tensor, Tensor]:
        """Running mean and variance of a width, (c,) each, as views.

        Raises:
            ValueError: a width that was neither trained nor calibrated.
        """
        count = sliced_size(self.channels, ratio)
        if ratio == self.largest:
            return self.running_mean[:count], self.running_var[:count]
        if ratio in self.rows:
            row = self.rows[ratio]
            return self.narrow_mean[row, :count], self.narrow_var[row, :count]
        if ratio in self.calibrated:
            return self.calibrated[ratio]
        raise ValueError(
            f"batch normalisation has no statistics for width ratio {ratio}: it has those of the trained widths "
            f"{', '.join(f'{width:g}' for width in (*self.rows, self.largest))}; give calibrate_() a few batches"
        )

    def sliced(self, ratio: float) -> dict[str, Tensor]:
        return {"weight": self.rule.cut(self.weight, ratio, 0), "bias": self.rule.cut(self.bias, ratio, 0)}

    def forward(self, x: Tensor, ratio: float) -> Tensor:
        """(B, c, h, w) normalised; in training by its own statistics, which move the running ones of this width."""
        weight, bias = self.sliced(ratio).values()
        mean, variance = self.statistics(ratio)
        if self.batches_seen is not None:  # calibration: the plain average over batches
            return F.batch_norm(x, mean, variance, weight, bias, True, 1 / (self.batches_seen + 1), self.eps)
        if self.training and ratio == self.largest:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)

    def reserve(self, ratio: float) -> None:
        """Make room for the statistics of a width that is not trained."""
        if not self.knows(ratio):
            empty = self.running_mean.new_zeros(sliced_size(self.channels, ratio))
            self.calibrated[ratio] = (empty, empty + 1)


def batch_norms(model: nn.Module) -> list[SlicedBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, SlicedBatchNorm2d)]


@contextmanager
def _calibrating(norms: Sequence[SlicedBatchNorm2d]) -> Iterator[None]:
    for norm in norms:
        norm.batches_seen = 0
    try:
        yield
    finally:
        for norm in norms:
            norm.batches_seen = None


@torch.no_grad()
def calibrate_(model: nn.Module, ratio: float, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of one width by their average over ``batches`` of images; weights stay.

    Statistics of a trained width stay in the model's state; those of another width live until the model is rebuilt.

    Args:
        model: called as ``model(images, ratio)``, in evaluation mode (dropout off), with sliced batch normalisation.
        batches: images (B, 3, height, width) on the model's device; a few thousand in all suffice.

    Returns:
        Batches seen by this process; several processes end with the mean of theirs.

    Raises:
        ValueError: a model without batch normalisation, or no batch.
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch normalisation to calibrate")
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.reserve(ratio)
    seen = 0
    try:
        with _calibrating(norms):
            for images in batches:
                model(images, ratio)
                seen += 1
                for norm in norms:
                    norm.batches_seen = seen
    finally:
        model.train(was_training)
    if not seen:
        raise ValueError("calibration needs at least one batch of images")
    for norm in norms:
        for value in norm.statistics(ratio):  # every process saw its own pictures
            value.copy_(reduce_sums(value.clone()) / get_world_size())
    return seen
