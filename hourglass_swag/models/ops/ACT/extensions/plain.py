"""The three operators of ACT in plain PyTorch, vectorised, for any device and floating-point type, differentiable.

Letters: R rows (images x heads), N tokens, C groups, D channels. A token whose group is not one of 0 ... C - 1 takes
no part.
"""

import torch
from torch import Tensor


def ada_cluster(hashes: Tensor) -> tuple[Tensor, Tensor]:
    """Group equal hash values of a row.

    Args:
        hashes: (R, N) int64.

    Returns:
        Group of each token, (R, N) int32: the rank of its value among the distinct values of its row, ascending and
        signed. Tokens per group, (R, N) int32, zero behind the last group.
    """
    ordered, position = hashes.sort(dim=1)
    rank = torch.zeros_like(ordered)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    groups = torch.empty_like(rank).scatter_(1, position, rank)
    counts = torch.zeros_like(rank).scatter_add_(1, rank, torch.ones_like(rank))
    return groups.int(), counts.int()


def sum_groups(x: Tensor, groups: Tensor, number: int) -> Tensor:
    """Sum of the members of each group in token order, so that every run gives the same bits.

    Args:
        x: tokens, (R, N, D). Half precision is added up in float32.
        groups: (R, N), int32 or int64.
        number: of groups, C.

    Returns:
        Sums (R, C, D) in the type of ``x``; exact zeros where there is no member.
    """
    R, N, D = x.shape
    index, slots = _flat_index(groups, number), R * number + 1  # the last slot takes what has no group
    rows = x.reshape(R * N, D).to(torch.promote_types(x.dtype, torch.float32))
    if x.device.type == "cpu":
        sums = rows.new_zeros(slots, D).index_add(0, index, rows)
    else:  # index_add adds in no fixed order there
        lengths = torch.zeros(slots, dtype=index.dtype, device=x.device).scatter_add_(0, index, torch.ones_like(index))
        rows = rows.index_select(0, index.argsort(stable=True))
        sums = torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True, initial=0)
    return sums[:-1].view(R, number, D).to(x.dtype)


def weighted_sum(x: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """y[r, g] = sum over tokens t of group g of weights[r, g] x[r, t].

    Args:
        x: (R, N, D); groups: (R, N); weights: (R, C) of any type, of which those of empty groups are never read.

    Returns:
        y, (R, C, D), in the type of ``x``.
    """
    return sum_groups(x * _weight_per_token(weights, groups), groups, weights.shape[1]).to(x.dtype)


def broadcast(y: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """x[r, t] = weights[r, g] y[r, g] for token t of group g; zero without a group.

    Args:
        y: (R, C, D); groups: (R, N); weights: (R, C) of any type.

    Returns:
        x, (R, N, D), in the type of ``y``.
    """
    return (copy_groups(y, groups) * _weight_per_token(weights, groups)).to(y.dtype)


def copy_groups(y: Tensor, groups: Tensor) -> Tensor:
    """The row of ``y`` (R, C, D) that belongs to each token's group, (R, N, D); a token without one gets group 0's."""
    R, C, D = y.shape
    index = groups.long().clamp(0, C - 1) + C * torch.arange(R, device=y.device)[:, None]
    return y.reshape(R * C, D).index_select(0, index.flatten()).view(R, groups.shape[1], D)


def _flat_index(groups: Tensor, number: int) -> Tensor:
    """Slot r C + g of each token, (R N,) int64; R C for one without a group."""
    R = groups.shape[0]
    groups = groups.long()
    index = groups + number * torch.arange(R, device=groups.device)[:, None]
    return index.where((groups >= 0) & (groups < number), R * number).flatten()


def _weight_per_token(weights: Tensor, groups: Tensor) -> Tensor:
    """Weight of each token's group, (R, N, 1); zero without a group."""
    number = weights.shape[1]
    chosen = weights.gather(1, groups.long().clamp(0, number - 1))
    return chosen.where((groups >= 0) & (groups < number), 0)[..., None]
