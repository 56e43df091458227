"""Operations of a network for one image: what runs here, and what the authors' tool counts.

The two differ where a stage resizes what it reuses: two matrix products here, an up-sampling and a pooling of every map
in the official code.
"""

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from common.measure.flops import Counted, OpCounts, count_operations, gmacs
from dvt.models.backbone import Stage
from dvt.models.cascade import Cascade, Exits
from dvt.models.reuse import padded

CONVENTION = "fvcore"
"""Of the published costs."""


class _FirstExits(nn.Module):
    """A cascade that ends after its first exits."""

    def __init__(self, cascade: Cascade, exits: int) -> None:
        super().__init__()
        self.cascade, self.exits = cascade, exits

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the last one."""
        output = self.cascade.run_exit(0, images)
        for exit in range(1, self.exits):
            output = self.cascade.run_exit(exit, images, output)
        return output.logits

    def published_ops(self, inside: OpCounts, args: Any, result: Any) -> OpCounts:
        """Resizes as the official operators in place of the matrix products."""
        for stage in self.cascade.stages[: self.exits]:
            inside = inside + _official_resizes(stage)
        return inside


def _official_resizes(stage: Stage) -> OpCounts:
    """What the tool counts for a stage's resizes, less what they cost here."""
    if stage.source_grid is None or not (stage.feature_reuse or stage.relation_reuse):
        return OpCounts()
    tokens, source = (math.prod(grid) + stage.prefix for grid in (stage.grid, stage.source_grid))
    products = maps = 0  # a map has the grid of the stage before
    if stage.feature_reuse:
        products += stage.depth * math.prod(stage.grid) * stage.feature_channels * math.prod(stage.source_grid)
        maps += stage.feature_channels * stage.depth
    if stage.relation_reuse:
        channels = stage.depth * stage.num_heads
        products += channels * (source + tokens) * padded(tokens) * source
        maps += channels * (source + tokens)  # along keys, along queries
    pixels = 4 * math.prod(stage.source_grid) * maps
    return OpCounts(matmul=-products, upsample=pixels, pool=pixels)


def exit_gmacs(exits: Exits, images: Tensor) -> list[float]:
    """Cumulative multiply-accumulates per image in 1e9 that are executed up to each exit.

    Args:
        images: (B, 3, H, W); on the meta device nothing is computed, which serves where costs do not depend on them.
    """
    if isinstance(exits, Cascade):
        return [gmacs(counted.executed) for counted in count_exits(exits)]
    each = (gmacs(count_operations(stage, images).executed) / len(images) for stage in exits.stages)
    return list(accumulate(each))


def count_exits(model: nn.Module) -> list[Counted]:
    """Operations up to each exit, cumulative; of a network with one exit, all of them."""
    assert isinstance(model, (Cascade, Stage))
    stages = model.stages if isinstance(model, Cascade) else (model,)
    dtype = next(model.parameters()).dtype
    images = torch.empty(1, 3, *stages[0].img_size, device="meta", dtype=dtype)
    if isinstance(model, Stage):
        return [count_operations(model, images)]
    return [count_operations(_FirstExits(model, number + 1), images) for number in range(len(stages))]


def exit_gflops(model: nn.Module) -> list[float]:
    """Cumulative cost of the exits in GFLOPs (multiply-accumulates), counted as the authors did."""
    return [gmacs(counted.published, CONVENTION) for counted in count_exits(model)]
