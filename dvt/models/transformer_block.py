"""The Transformer block of every stage, with a place for reused features and one for reused attention logits.

Paper: arXiv:2105.15075, Section 3. T2T-ViT and DeiT use the same block with other defaults.

Shapes: B batch, N tokens without the class token, D width, H heads, d = D / H.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from torch import Tensor, nn

from dvt.models.reuse import FEATURE_CHANNELS, FEATURE_HIDDEN, reuse_features

Norm = Callable[[int], nn.Module]


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Drop-path rate of each block, rising linearly from 0 to ``rate``; a float32 ramp, as published."""
    return torch.linspace(0, rate, depth, device="cpu", dtype=torch.float32).tolist()


def attend(
    q: Tensor, k: Tensor, v: Tensor, reused: Tensor | None, *, scale: float, drop: float, hand_on: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention, and its logits, reused ones included, (B, H, N+1, N+1), or None.

    Args:
        q, k, v: each (B, H, N+1, d), as the result.
        reused: logits to add, (B, H, N+1, N+1).
        drop: rate of dropout of the attention map, 0 in evaluation.
        hand_on: also return the logits. The attention map is materialised only then; otherwise attention is fused.

    Source: arXiv:2105.15075, Section 3.2, Eq. 7: Softmax(A) V, A = Q K^T / sqrt(d); Eq. 9: Softmax(A + r(A_up)) V.
    """
    if not hand_on:
        mask = None if reused is None else reused.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=drop, scale=scale), None
    relation = (q * scale) @ k.transpose(-2, -1)
    relation = relation if reused is None else relation + reused
    return F.dropout(relation.softmax(dim=-1), drop) @ v, relation


class Attention(nn.Module):
    """Self-attention that adds reused logits to its own and, only if asked to, returns the sum.

    Args:
        dim: D, a multiple of ``num_heads``, H.
        qk_scale: factor of the logits; None: d^-0.5.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} must be a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, reused: Tensor | None = None, *, hand_on: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N+1, D) to (B, N+1, D), and logits; see :func:`attend`.

        Source: arXiv:2105.15075, Section 3.2, Eq. 6: Q, K, V = z W^Q, z W^K, z W^V.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N+1, d)
        rate = self.attn_drop.p if self.training else 0.0
        mixed, relation = attend(q, k, v, reused, scale=self.scale, drop=rate, hand_on=hand_on)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2))), relation


class Reusing:
    """Attention with reused relations, then an MLP that sees reused features beside the tokens.

    ``z' = z + MSA(LN(z))``, ``z_next = z' + MLP(LN(Concat(z', E_l)))``. A subclass says what its two halves are.

    Source: arXiv:2105.15075, Section 3.2.
    """

    make_features: nn.Module | None
    """f_l, (B, M+1, D) -> (B, M+1, 48), where the block was built with feature reuse"""
    __call__: Callable[..., tuple[Tensor, Tensor | None]]
    prefix: int = 1
    """tokens in front that stand for no patch"""

    def attention_update(self, x: Tensor, reused: Tensor | None, *, hand_on: bool) -> tuple[Tensor, Tensor | None]:
        """What is added to tokens (B, N+1, D) first, and logits; see :func:`attend`."""
        raise NotImplementedError

    def mlp_update(self, x: Tensor) -> Tensor:
        """What is added to tokens (B, N+1, D) then, of them and the reused features, (B, N+1, D+48)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        features: Tensor | None = None,
        reused: Tensor | None = None,
        matrix: Tensor | None = None,
        *,
        hand_on: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the block: (B, N+1, D) -> (B, N+1, D), and the logits, (B, H, N+1, N+1), or None.

        Args:
            features: z_up, output of the last block of the stage before, (B, M+1, D); needed with feature reuse.
            reused, hand_on: see :func:`attend`.
            matrix: ``W`` that resizes the features, (N+1, M+1); see :mod:`dvt.models.reuse`.

        Raises:
            ValueError: if features are given or missing against what the block was built for.

        Source: arXiv:2105.15075, Section 3.2, Eq. 2: z' = MSA(LN(z)) + z; Eq. 3: MLP(LN(z')) + z'; Eq. 5: with reused
        features MLP(LN(Concat(z', E_l))) + z'.
        """
        make = self.make_features
        if (features is not None) != (make is not None) or (features is None) != (matrix is None):
            raise ValueError(
                f"this block was built with feature_reuse={make is not None}: it takes features and a matrix to "
                "resize them exactly if that is on"
            )
        attended, relation = self.attention_update(x, reused, hand_on=hand_on)
        x = x + attended
        inputs = x
        if features is not None and matrix is not None and make is not None:
            made = make(features)
            inputs = torch.cat([x, reuse_features(made, matrix.to(made.dtype), self.prefix).to(x.dtype)], dim=-1)
        return x + self.mlp_update(inputs), relation


def feature_network(norm: nn.Module, dim: int, hidden: int, channels: int, drop: float = 0.0) -> nn.Sequential:
    """f_l: from features of width ``dim`` to the channels that one block receives."""
    return nn.Sequential(norm, Mlp(dim, hidden, channels, drop=drop))


class Block(Reusing, nn.Module):
    """The block of T2T-ViT and DeiT.

    Args:
        mlp_ratio: hidden width of the MLP as a multiple of D, with reused features too.
        drop_path: rate of both branches, drawn for each by itself.
        norm_layer: makes a normalisation from its width.
        feature_reuse: own an f_l, and have its channels as further inputs in ``norm2`` and ``mlp``.
        feature_channels, feature_hidden: of f_l, its output and its hidden layer.
        others: of :class:`Attention`; ``drop`` of its output, of the MLP and of f_l.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
        feature_reuse: bool = False,
        feature_channels: int = FEATURE_CHANNELS,
        feature_hidden: int = FEATURE_HIDDEN,
    ) -> None:
        super().__init__()
        inputs = dim + feature_channels if feature_reuse else dim
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(inputs)
        self.mlp = Mlp(inputs, int(dim * mlp_ratio), dim, drop=drop)
        if feature_reuse:  # the name is that of the published state dicts
            self.feature_resuse_mlp = feature_network(norm_layer(dim), dim, feature_hidden, feature_channels, drop)

    @property
    def make_features(self) -> nn.Module | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self, "feature_resuse_mlp", None)

    def attention_update(self, x: Tensor, reused: Tensor | None, *, hand_on: bool) -> tuple[Tensor, Tensor | None]:
        attended, relation = self.attn(self.norm1(x), reused, hand_on=hand_on)
        return self.drop_path(attended), relation

    def mlp_update(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))
