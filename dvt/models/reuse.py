"""Feature reuse and relationship reuse: what a stage takes over from the one before it, as functions of tensors.

Paper: Not All Images are Worth 16x16 Words, arXiv:2105.15075, Section 3.2. Both resize from the token grid of the stage
before (n_up x n_up) to that of the stage (n x n): nearest up-sampling by two, then adaptive average pooling. That is
linear and separable, X -> A X A^T, so one matrix of tokens does it for features and, on either side, for relations.

Shapes: B batch, L blocks, H heads, D width, M = n_up^2 tokens before, N = n^2 tokens now; a class
token comes first.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def resize_grid(maps: Tensor, target: int) -> Tensor:
    """Resize square maps: nearest up-sampling by two, then adaptive average pooling, as ``A X A^T``.

    Args:
        maps: (..., n_up, n_up).
        target: tokens per side of the result.

    Returns:
        (..., target, target), in the dtype of ``maps``.
    """
    overlap, sizes = grid_overlap(maps.shape[-1], target)
    matrix = overlap.to(maps) / sizes.to(maps)
    return matrix @ maps @ matrix.T


def token_overlap(source: int, target: int) -> tuple[Tensor, Tensor]:
    """The resize of all tokens, class token first, as whole numbers: ``W = blockdiag(1, A (x) A) = overlap / sizes``.

    Returns:
        (N+1, M+1) and (N+1, 1); see :func:`grid_overlap`.
    """
    overlap, sizes = grid_overlap(source, target)
    grids = torch.kron(overlap, overlap), torch.kron(sizes, sizes)
    one = torch.ones(1, 1, device="cpu")
    return torch.block_diag(one, grids[0]), torch.cat([one, grids[1]])


class TokenResize(nn.Module):
    """Holds ``W`` of a stage; without parameters, and without entries in a state dict.

    Args:
        source, target: tokens per side of the stage before and of this one.
    """

    overlap: Tensor
    sizes: Tensor

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.register_buffer("overlap", torch.empty(target**2 + 1, source**2 + 1), persistent=False)
        self.register_buffer("sizes", torch.empty(target**2 + 1, 1), persistent=False)
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
        tokens = self.target**2 + 1
        return tokens + -tokens % ALIGNMENT

    def extra_repr(self) -> str:
        return f"{self.source}x{self.source} -> {self.target}x{self.target}"


def reuse_features(features: Tensor, matrix: Tensor) -> Tensor:
    """Resize the features made for a block; the class token receives zeros.

    Args:
        features: output of the block's f_l, (B, M+1, 48); its class token is not used.
        matrix: ``W``, (N+1, M+1).

    Returns:
        E_l, (B, N+1, 48).

    Source: arXiv:2105.15075, Section 3.2, feature reuse: the context embedding E_l = Up(f_l(z_up)).
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

    Source: arXiv:2105.15075, Section 3.2, relationship reuse: Attn = softmax(A_l + r_l(A_up)) V.
    """
    return resize_relations(mixer(relations), matrix).chunk(blocks, dim=1)
