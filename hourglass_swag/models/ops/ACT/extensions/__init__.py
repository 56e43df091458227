"""The three operators of ACT: compiled where they are built and serve the device, in plain PyTorch elsewhere."""

from typing import Any

import torch
from torch import Tensor

from hourglass_swag.models.ops import library
from hourglass_swag.models.ops.ACT.extensions import plain

__all__ = ["ada_cluster_", "broadcast_", "weighted_sum_"]


def ada_cluster_(hashes: Tensor) -> tuple[Tensor, Tensor]:
    """Group equal hash values of a row and drop the columns of ``counts`` that no row uses.

    Args:
        hashes: (R, N) int64.

    Returns:
        Group of each token, (R, N) int32, and tokens per group, (R, C) int32; see ``plain.ada_cluster``. C is the
        number of groups of the row that has most: reading it waits for the device.
    """
    groups, counts = number_groups(hashes)
    return groups, counts[:, : count_groups(groups)]


def number_groups(hashes: Tensor) -> tuple[Tensor, Tensor]:
    """As ``ada_cluster_``, with all N columns of ``counts``."""
    return _operators(hashes).ada_cluster(hashes)


def count_groups(groups: Tensor) -> int:
    """Groups of the row that has most."""
    return int(groups.max()) + 1 if groups.numel() else 0


def weighted_sum_(x: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the members of each group, (R, C, D); see ``plain.weighted_sum``."""
    return _operators(x).weighted_sum(x, groups, weights)


def broadcast_(y: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Weighted copy of each group's row to its members, (R, N, D); see ``plain.broadcast``."""
    return _operators(y).broadcast(y, groups, weights)


def _operators(tensor: Tensor) -> Any:
    """Compiled or plain forms for this tensor's device."""
    return getattr(torch.ops, library.NAMESPACE) if library.serves(tensor.device, "ada_cluster") else plain
