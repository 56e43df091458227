"""Token encoder of T2T-ViT with softmax attention ("T2T-ViT_t"). Paper: arXiv:2101.11986."""

import torch.nn.functional as F
from timm.layers import Mlp  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention of one head whose output is narrower than its input; the skip connection starts at the values.

    Args:
        dim: width of the input.
        in_dim: width of the output.
        qk_scale: factor of the logits; None: dim^-0.5, from the width of the *input*, as published.
    """

    def __init__(self, dim: int, in_dim: int, qkv_bias: bool = False, qk_scale: float | None = None) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.scale = qk_scale or dim**-0.5
        self.qkv = nn.Linear(dim, 3 * in_dim, bias=qkv_bias)
        self.proj = nn.Linear(in_dim, in_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].split(self.in_dim, dim=-1)  # each (B, 1, T, in_dim)
        return (v + self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))[:, 0]


class Token_transformer(nn.Module):
    """One pre-norm Transformer layer from width ``dim`` to ``in_dim``; of one head, the only number that works.

    Raises:
        ValueError: with more than one head.
    """

    def __init__(
        self,
        dim: int,
        in_dim: int,
        num_heads: int = 1,
        mlp_ratio: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
    ) -> None:
        super().__init__()
        if num_heads != 1:
            raise ValueError(f"this token encoder has one head, got num_heads {num_heads}")
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, in_dim, qkv_bias, qk_scale)
        self.norm2 = nn.LayerNorm(in_dim)
        self.mlp = Mlp(in_dim, int(in_dim * mlp_ratio), in_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, in_dim)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
