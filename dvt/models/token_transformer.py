"""Token encoder of T2T-ViT with softmax attention ("T2T-ViT_t"). Paper: arXiv:2101.11986."""

import torch.nn.functional as F
from timm.layers import DropPath, Mlp  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from torch import Tensor, nn

from dvt.models.transformer_block import Norm


class Attention(nn.Module):
    """Self-attention whose output is narrower than its input; the skip connection starts at the values.

    Args:
        dim: width of the input.
        in_dim: width of the output.
        num_heads: only one is meaningful.
        qk_scale: factor of the logits; None: (dim / heads)^-0.5, from the width of the *input*, as published.

    Raises:
        ValueError: with more than one head.
    """

    def __init__(
        self,
        dim: int,
        in_dim: int,
        num_heads: int = 1,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads != 1:
            raise ValueError(f"this token encoder has one head, got num_heads {num_heads}")
        self.in_dim = in_dim
        self.scale = qk_scale or dim**-0.5
        self.qkv = nn.Linear(dim, 3 * in_dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].split(self.in_dim, dim=-1)  # each (B, 1, T, in_dim)
        rate = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=self.scale)
        return (v + self.proj_drop(self.proj(mixed)))[:, 0]


class Token_transformer(nn.Module):
    """One pre-norm Transformer layer from width ``dim`` to ``in_dim``."""

    def __init__(
        self,
        dim: int,
        in_dim: int,
        num_heads: int = 1,
        mlp_ratio: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, in_dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(in_dim)
        self.mlp = Mlp(in_dim, int(in_dim * mlp_ratio), in_dim, drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, in_dim)."""
        x = self.attn(self.norm1(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))
