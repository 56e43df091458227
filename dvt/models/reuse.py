"""Feature reuse and relationship reuse: what a stage takes over from the one before it, as functions of tensors.

Paper: Not All Images are Worth 16x16 Words, arXiv:2105.15075, Section 3.2. Both resize from the token grid of the stage
before to that of the stage: nearest up-sampling by two, then adaptive average pooling. That is linear and separable,
X -> A X B^T (A = B on square grids), so one matrix of tokens does it for features and, on either side, for relations.

Shapes: B batch, L blocks, H heads, D width, M = rows x columns tokens before, N tokens now; a class token comes first,
or as many tokens as the networks of a library have there, which are treated alike.
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


def resize_side(source: int, target: int) -> Tensor:
    """The resize of one side of a grid from n_up to n tokens, ``A`` (n, n_up), in float64; its rows sum to one."""
    each = torch.eye(source, dtype=torch.float64, device="cpu")[None]
    return F.adaptive_avg_pool1d(F.interpolate(each, scale_factor=2, mode="nearest"), target)[0].T


def resize_tokens(source: Grid, target: Grid, prefix: int = 1) -> Tensor:
    """The resize of all tokens, class token (``prefix`` tokens) first, ``W = blockdiag(1, A (x) B)``, (N+1, M+1)."""
    rows, columns = map(resize_side, source, target)
    return torch.block_diag(torch.eye(prefix).to(rows), torch.kron(rows, columns))


class TokenResize(nn.Module):
    """Holds ``W`` of a stage, from its source grid to its own; nothing of it is in a state dict."""

    matrix: Tensor

    def __init__(self, source: Grid, target: Grid, prefix: int = 1) -> None:
        super().__init__()
        self.source, self.target, self.prefix = source, target, prefix
        shape = [math.prod(grid) + prefix for grid in (target, source)]
        self.register_buffer("matrix", torch.empty(shape), persistent=False)
        self.reset_buffers()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TokenResize":
        """Moves and casts, after which ``W`` is exact in the new dtype, and defined after ``to_empty()``."""
        super()._apply(fn, recurse)
        self.reset_buffers()
        return self

    def reset_buffers(self) -> None:
        """Fill in ``W``."""
        if not self.matrix.is_meta:
            self.matrix.copy_(resize_tokens(self.source, self.target, self.prefix))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """``W`` in ``dtype``."""
        return self.matrix.to(dtype)


def padded(tokens: int) -> int:
    """Length of a row of that many reused logits in memory, in elements."""
    return tokens + -tokens % ALIGNMENT


def reuse_features(features: Tensor, matrix: Tensor, prefix: int = 1) -> Tensor:
    """Resize the features made for a block; the class token receives zeros.

    Args:
        features: output of the block's f_l, (B, M+1, 48); its class token is not used.
        matrix: ``W``, (N+1, M+1).
        prefix: tokens in front that are treated as the class token.

    Returns:
        E_l, (B, N+1, 48).

    Source: arXiv:2105.15075, Section 3.2, Eq. 4: the context embedding E_l, f_l(z_up) up-sampled, zeros for the class.
    """
    return F.pad(matrix[prefix:, prefix:] @ features[:, prefix:], (0, 0, prefix, 0))


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
    keys = F.pad(matrix, (0, 0, 0, padded(tokens) - tokens))
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
