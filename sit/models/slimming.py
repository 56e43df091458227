"""Token slimming and its reverse: how SiT lets N tokens become fewer, and how training looks back at all of them.

Paper: Self-slimmed Vision Transformer, arXiv:2111.12624, the token slimming module and its reverse. Written from the
paper's equations.

Letters: B batch, N tokens in, M tokens out, C width, T all tokens of the network (those of its teacher).
Published names stay where files and callers know them: ``keeped_patches`` is M, ``recovered_patches`` is T.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn


def slim_tokens(tokens: Tensor, scores: Tensor) -> Tensor:
    """Aggregate N tokens softly into M; unlike pruning, none is discarded.

    Args:
        tokens: patch tokens without the class token, (B, N, C).
        scores: unnormalised weight of each input in each output, (B, N, M).

    Returns:
        Convex combinations of the inputs, (B, M, C).

    Source: SiT, arXiv:2111.12624, token slimming module (TSM): A = softmax of S over the input tokens, Y = A^T X.
    """
    return scores.transpose(1, 2).softmax(dim=-1) @ tokens  # (B, M, N) @ (B, N, C)


def stage_tokens(number: int, keeping_ratio: float, stages: int) -> list[int]:
    """Tokens of each stage: the floor of ``number`` times the exact power of the ratio, never rounded in between.

    324 tokens at ratio 0.5 give 324, 162, 81, 40.

    Source: SiT, arXiv:2111.12624, token slimming between stages: int(N r^i) tokens in stage i, counted from 0.
    """
    return [int(number * keeping_ratio**stage) for stage in range(stages)]


def layer_tokens(tokens: Sequence[int], stage_blocks: Sequence[int]) -> list[int]:
    """Tokens that enter each block, block i leaving as many as enter i + 1; as many entries of the last stage follow.

    Args:
        tokens: of each stage.
        stage_blocks: blocks of each stage.
    """
    blocks = [*stage_blocks, stage_blocks[-1]]
    return [count for count, times in zip([*tokens, tokens[-1]], blocks, strict=True) for _ in range(times)]


def slimming_blocks(stage_blocks: Sequence[int]) -> list[int]:
    """Blocks, counted from 1, right after which tokens are slimmed: the last of each stage but the final one."""
    return list(accumulate(stage_blocks))[:-1]


def default_stages(depth: int) -> list[int]:
    """Stages for a network that the paper does not show: half of the blocks see all tokens, up to three stages follow.

    20 blocks give those of SiT-M, 10, 4, 3, 3.
    """
    late = depth // 2
    stages = min(3, late)
    return [depth - late, *(late // stages + (index < late % stages) for index in range(stages))]


class TokenSlimmingModule(nn.Module):
    """Token slimming module (TSM): N tokens become ``keeped_patches`` convex combinations of them.

    The scores come from the normalised tokens, the mixture is of the tokens as they are. N may be any number. The bias
    of the last linear layer is constant along the softmax and cancels; it is kept because files hold it.

    Args:
        dim: width C.
        keeped_patches: tokens M that come out.
        ratio: hidden width of the scoring network over C.
    """

    def __init__(self, dim: int, keeped_patches: int, ratio: float = 0.5) -> None:
        super().__init__()
        if keeped_patches < 1:
            raise ValueError(
                f"a token slimming module must keep at least one token, got {keeped_patches}; raise keeping_ratio or "
                "take fewer stages"
            )
        hidden = int(dim * ratio)
        self.weight = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, keeped_patches)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def layers(self) -> tuple[nn.Module, nn.Linear, nn.Module, nn.Linear]:
        """Normalisation, linear, activation, linear."""
        norm, fc1, act, fc2 = self.weight
        assert isinstance(fc1, nn.Linear)
        assert isinstance(fc2, nn.Linear)
        return norm, fc1, act, fc2

    @property
    def keeped_patches(self) -> int:
        """Tokens that come out."""
        return self.layers()[3].out_features

    def scores(self, tokens: Tensor) -> Tensor:
        """Unnormalised mixing weights s (W2 gelu(W1 LN(X) + b1) + b2), (B, N, M).

        The learned scale is multiplied into the last layer's weights, which are far fewer than the scores.

        Source: SiT, arXiv:2111.12624, token slimming module (TSM): S = s (W2 gelu(W1 LN(X) + b1) + b2).
        """
        norm, fc1, act, fc2 = self.layers()
        scale = self.scale[0, 0]
        return F.linear(act(fc1(norm(tokens))), fc2.weight * scale, fc2.bias * scale)

    def mixing_weights(self, tokens: Tensor) -> Tensor:
        """Share of each input token in each output token, (B, M, N); every row sums to one."""
        return self.scores(tokens).transpose(1, 2).softmax(dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, M, C)."""
        return slim_tokens(tokens, self.scores(tokens))


class ReverseTSM(nn.Module):
    """Reverse token slimming module (RTSM): maps M slimmed tokens back to T, for training only.

    First an MLP along the tokens, without a shortcut, then one along the channels with a shortcut.

    Args:
        dim: width C.
        keeped_patches: tokens M that come in.
        recovered_patches: tokens T that come out.
        ratio: hidden width over T (first MLP) and over C (second).
    """

    def __init__(self, dim: int, keeped_patches: int, recovered_patches: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.recovered_patches = recovered_patches
        self.norm1 = nn.LayerNorm(dim)
        self.mlp1 = Mlp(keeped_patches, int(recovered_patches * ratio), recovered_patches)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp2 = Mlp(dim, int(dim * ratio), dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, M, C) to (B, T, C).

        Source: SiT, arXiv:2111.12624, reverse token slimming module (RTSM): Z = MLP1 along the tokens of LN(Y),
        X' = Z + MLP2(LN(Z)).
        """
        recovered = self.mlp1(self.norm1(tokens).transpose(1, 2)).transpose(1, 2)  # (B, C, M) -> (B, C, T) -> (B, T, C)
        return recovered + self.mlp2(self.norm2(recovered))


def slimming_modules(dim: int, tokens: Sequence[int]) -> nn.ModuleList:
    """``tsm``: the module in front of each stage but the first, whose ``tokens`` these are."""
    return nn.ModuleList(TokenSlimmingModule(dim, kept) for kept in tokens)


def reverse_modules(dim: int, tokens: Sequence[int], number: int) -> nn.ModuleList:
    """``rtsm``: the reverse module of each block that leaves ``tokens`` out of ``number``; none where it leaves all."""
    return nn.ModuleList(ReverseTSM(dim, left, number) if left < number else nn.Identity() for left in tokens)
