"""Feature reuse and relationship reuse: what a stage takes over from the one before it, as functions of tensors.

Paper: Not All Images are Worth 16x16 Words, arXiv:2105.15075, Section 3.2. Both resize from the token grid of the stage
before to that of the stage: nearest up-sampling by two, then adaptive average pooling. That is linear and separable,
X -> A X B^T (A = B on square grids), so one matrix of tokens does it for features and, on either side, for relations.

Shapes: B batch, L blocks, H heads, D width, M = rows x columns tokens before, N tokens now; a class token comes first.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
"""Rows and columns of tokens."""

FEATURE_CHANNELS = 48
"""Channels of the reused features that each block receives."""

FEATURE_HIDDEN = 128
"""Hidden width of the network that makes them."""

RELATION_RATIO = 3
"""Hidden channels of the relation mixer, as a multiple of its L·H inputs."""

ALIGNMENT = 8
"""Rows of a relation start at multiples of this many elements, as fused attention wants its mask."""


def grid_overlap(source: int, target: int) -> tuple[Tensor, Tensor]:
    """The resize of a side as whole numbers: ``A = overlap / sizes``.

    Args:
        source, target: tokens per side, n_up and n.

    Returns:
        Up-sampled pixels of each source token in each pooling window, (target, source), and the windows' sizes,
        (target, 1); small whole numbers in float32, hence exact in every dtype.
    """
    start = torch.tensor([(2 * source * i) // target for i in range(target)], device="cpu")
    stop = torch.tensor([-(-2 * source * (i + 1) // target) for i in range(target)], device="cpu")
    left = 2 * torch.arange(source, device="cpu")
    overlap = torch.minimum(stop[:, None], left + 2) - torch.maximum(start[:, None], left)
    return overlap.clamp(min=0).float(), (stop - start)[:, None].float()


def token_overlap(source: Grid, target: Grid) -> tuple[Tensor, Tensor]:
    """The resize of all tokens, class token first, as whole numbers: ``W = blockdiag(1, A (x) B) = overlap / sizes``.

    Args:
        source, target: rows and columns of tokens.

    Returns:
        (N+1, M+1) and (N+1, 1); see :func:`grid_overlap`.
    """
    (rows, row_sizes), (columns, column_sizes) = map(grid_overlap, source, target)
    one = torch.ones(1, 1, device="cpu")
    overlap = torch.block_diag(one, torch.kron(rows, columns))
    return overlap, torch.cat([one, torch.kron(row_sizes, column_sizes)])


class TokenResize(nn.Module):
    """Holds ``W`` of a stage; without parameters, and without entries in a state dict.

    Args:
        source, target: rows and columns of tokens of the stage before and of this one.
    """

    overlap: Tensor
    sizes: Tensor

    def __init__(self, source: Grid, target: Grid) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.register_buffer("overlap", torch.empty(math.prod(target) + 1, math.prod(source) + 1), persistent=False)
        self.register_buffer("sizes", torch.empty(math.prod(target) + 1, 1), persistent=False)
        self.reset_buffers()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TokenResize":
        """Moves and casts, after which the constants are filled in anew: ``to_empty()`` leaves them undefined."""
        super()._apply(fn, recurse)
        self.reset_buffers()
        return self

    def reset_buffers(self) -> None:
        """Fill in the constants."""
        for buffer, value in zip((self.overlap, self.sizes), token_overlap(self.source, self.target), strict=True):
            if not buffer.is_meta:
                buffer.copy_(value)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """``W`` (N+1, M+1) in ``dtype``; its rows sum to one."""
        return self.overlap.to(dtype) / self.sizes.to(dtype)

    @property
    def padded_tokens(self) -> int:
        """Length of a row of resized relations in memory, in elements."""
        tokens = len(self.overlap)
        return tokens + -tokens % ALIGNMENT

    def extra_repr(self) -> str:
        return "{}x{} -> {}x{}".format(*self.source, *self.target)


def reuse_features(features: Tensor, matrix: Tensor) -> Tensor:
    """Resize the features made for a block; the class token receives zeros.

    Args:
        features: output of the block's f_l, (B, M+1, 48); its class token is not used.
        matrix: ``W``, (N+1, M+1).

    Returns:
        E_l, (B, N+1, 48).

    Source: arXiv:2105.15075, Section 3.2, Eq. 4: the context embedding E_l, f_l(z_up) up-sampled, zeros for the class.
    """
    return F.pad(matrix[1:, 1:] @ features[:, 1:], (0, 0, 1, 0))


def resize_relations(relations: Tensor, matrix: Tensor) -> Tensor:
    """Resize attention logits along queries and keys, ``W R W^T``.

    The class token's row and column are so resized along one side only, and their common entry is kept.

    Args:
        relations: (B, C, M+1, M+1).
        matrix: ``W``, (N+1, M+1).

    Returns:
        (B, C, N+1, N+1), a view whose rows start at multiples of ``ALIGNMENT`` elements.
    """
    tokens = len(matrix)
    keys = F.pad(matrix, (0, 0, 0, -tokens % ALIGNMENT))
    return (matrix @ (relations @ keys.T))[..., :tokens]


def reuse_relations(relations: Tensor, mixer: nn.Module, matrix: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """Turn the attention logits of the stage before into what is added to those of each block.

    Args:
        relations: of all blocks and heads, block-major, (B, L·H, M+1, M+1).
        mixer: point-wise network over channels, L·H -> 3·L·H -> L·H; runs before the resize.
        matrix: ``W``, (N+1, M+1).
        blocks: L.

    Returns:
        L tensors r_l(A_up), (B, H, N+1, N+1).

    Source: arXiv:2105.15075, Section 3.2, Eq. 9: r_l(A_up), added to the logits.
    """
    return resize_relations(mixer(relations), matrix).chunk(blocks, dim=1)
