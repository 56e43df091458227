"""Groups of weights: their scores, the proximal step that shrinks the least of them, and masks.

UVC, arXiv:2203.08243. Groups of block l are columns: of W1 = ``attn.proj`` (D x D) one
per head h and dimension j, d of them together a head; of W3 = ``mlp.fc2`` (D x M) one per hidden neuron. A group's
score is its squared L2 norm. s[l, 0], s[l, 1] and r[l, h] say how many heads, neurons and dimensions of head h to
remove; a positive number of any size counts as the next whole one.

L blocks, H heads, d channels of a head, D = H d, M hidden neurons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from uvc.models.deit import Block
from uvc.models.gates import GatedTransformer, masked_weights


class Groups(NamedTuple):
    """A value of each group: its score, or whether it is removed.

    ``dims`` (L, H, d) of proj's columns, ``heads`` (L, H), ``neurons`` (L, M) of fc2's columns.
    """

    dims: Tensor
    heads: Tensor
    neurons: Tensor


def blocks_of(model: GatedTransformer) -> list[Block]:
    """The blocks, typed."""
    return cast(list[Block], list(model.blocks))


@torch.no_grad()
def group_scores(model: GatedTransformer) -> Groups:
    """Scores of all groups from the current weights.

    Source: arXiv:2203.08243, Figure 1 (1): heads, their dimensions and neurons, by the norms of their columns.
    """
    blocks = blocks_of(model)  # square().sum() is four times faster on a CPU than vector_norm
    columns = torch.stack([block.attn.proj.weight.square().sum(0) for block in blocks])  # (L, D)
    dims = columns.unflatten(1, (model.num_heads, model.head_dim))
    neurons = torch.stack([block.mlp.fc2.weight.square().sum(0) for block in blocks])
    return Groups(dims, dims.sum(-1), neurons)


def whole(numbers: Tensor) -> Tensor:
    """Next whole number, as integers."""
    return numbers.detach().ceil().long()


def ceil_straight_through(numbers: Tensor) -> Tensor:
    """Next whole number exactly; its gradient is one."""
    return numbers.detach().ceil() + (numbers - numbers.detach())


def is_least(scores: Tensor, counts: Tensor) -> Tensor:
    """Whether an entry is among the ``counts`` smallest of the last dimension; of equal ones the first goes first.

    Args:
        scores: (..., n).
        counts: integers (...).
    """
    order = scores.argsort(dim=-1, stable=True)
    positions = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, positions)
    return ranks < counts[..., None]


def least_sum(scores: Tensor, numbers: Tensor) -> Tensor:
    """T_k(v): the sum of the k = ceil(number) smallest scores, (..., n) and (...) -> (...).

    Its gradient by the number is the next smallest score, and the largest where none is left.

    Source: arXiv:2203.08243, sparsity constraints: T_k(v), the sum of the k smallest group norms, is zero.
    """
    ascending = scores.detach().sort(dim=-1).values
    count = whole(numbers).clamp(0, scores.shape[-1])[..., None]
    zero = torch.zeros_like(ascending[..., :1])
    total = torch.cat([zero, ascending.cumsum(-1)], dim=-1).gather(-1, count)[..., 0]
    following = ascending.gather(-1, count.clamp(max=scores.shape[-1] - 1))[..., 0]
    return total + following * (numbers - numbers.detach())


def removal(scores: Groups, s: Tensor, r: Tensor) -> Groups:
    """The groups that s (L, 2) and r (L, H) remove."""
    return Groups(
        dims=is_least(scores.dims, whole(r)),
        heads=is_least(scores.heads, whole(s[:, 0])),
        neurons=is_least(scores.neurons, whole(s[:, 1])),
    )


@torch.no_grad()
def proximal_step_(model: GatedTransformer, scores: Groups, removed: Groups, y: Tensor, p: Tensor, lr: float) -> Groups:
    """Divide the columns of the groups to remove by 1 + 2 lr (dual); a column may be divided twice.

    Args:
        model: its ``attn.proj`` and ``mlp.fc2`` change.
        scores, removed: before the step.
        y: duals (L, 2) of heads and neurons. p: duals (L, H) of dimensions.
        lr: learning rate of the weights.

    Returns:
        The scores after the step.

    Source: arXiv:2203.08243, proximal step: columns of the least groups are divided by 1 + 2 lr dual.
    """
    by_dim = torch.where(removed.dims, 1 + 2 * lr * p[..., None], 1.0)  # (L, H, d)
    by_head = torch.where(removed.heads, 1 + 2 * lr * y[:, :1], 1.0)  # (L, H)
    by_neuron = torch.where(removed.neurons, 1 + 2 * lr * y[:, 1:], 1.0)  # (L, M)
    columns = by_dim * by_head[..., None]
    for block, column, neuron in zip(blocks_of(model), columns.flatten(1), by_neuron, strict=True):
        block.attn.proj.weight.div_(column)
        block.mlp.fc2.weight.div_(neuron)
    dims = scores.dims / columns.square()
    return Groups(dims, dims.sum(-1), scores.neurons / by_neuron.square())


@torch.no_grad()
def update_masks_(model: GatedTransformer, s: Tensor, r: Tensor, *, keep_stale: bool = False) -> None:
    """Set the masks of proj, fc1 and fc2 to what s and r remove under the current weights.

    Args:
        model: with masks (``register_masks``).
        s, r: (L, 2) and (L, H).
        keep_stale: leave the zeros that fc1's masks already have, as the official code does: neurons removed at any
            earlier time then stay removed in fc1 alone.
    """
    removed = removal(group_scores(model), s, r)
    gone = (removed.dims | removed.heads[..., None]).flatten(1)  # columns of ``attn.proj``, (L, D)
    for block, columns, neurons in zip(blocks_of(model), gone, removed.neurons, strict=True):
        block.attn.proj.get_buffer("mask").fill_(1).masked_fill_(columns, 0)
        block.mlp.fc2.get_buffer("mask").fill_(1).masked_fill_(neurons, 0)
        rows = block.mlp.fc1.get_buffer("mask")
        if not keep_stale:
            rows.fill_(1)
        rows.masked_fill_(neurons[:, None], 0)


@contextlib.contextmanager
def with_masks(model: GatedTransformer) -> Generator[None]:
    """Weights multiplied by their masks inside, as before after: for evaluating what stage 2 will start from."""
    pairs = [pair for block in blocks_of(model) for pair in masked_weights(block)]
    kept = [weight.detach().clone() for weight, _ in pairs]
    with torch.no_grad():
        for weight, mask in pairs:
            weight.mul_(mask)
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), before in zip(pairs, kept, strict=True):
                weight.copy_(before)
