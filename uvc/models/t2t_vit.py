"""T2T-ViT (arXiv:2101.11986) with Performer tokens-to-token modules, and UVC's gates on its blocks and patches.

B batch, N patches, T tokens of a stage, D width, e width of the tokens-to-token stages, m random features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc.models.deit import Block, _init_weights
from uvc.models.gates import GatedTransformer, select_tokens

FEATURES_PER_CHANNEL = 0.5
"""Random features m of a Performer per channel of its output: 32 for 64."""
STAGES = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""Kernel, stride and padding of the three soft splits."""


class Performer(nn.Module):
    """Linear attention with random positive features, and an MLP of the same width.

    Args:
        dim: input width; the residual starts from v, so it may differ from ``emb``.
        emb: output width e.
    """

    def __init__(self, dim: int, emb: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.emb, self.features = emb, int(emb * FEATURES_PER_CHANNEL)
        self.kqv = nn.Linear(dim, 3 * emb)
        self.dp = nn.Dropout(dropout)
        self.proj = nn.Linear(emb, emb)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(emb)
        self.mlp = nn.Sequential(nn.Linear(emb, emb), nn.GELU(), nn.Linear(emb, emb), nn.Dropout(dropout))
        self.w = nn.Parameter(torch.empty(self.features, emb), requires_grad=False)
        if not self.w.is_meta:
            nn.init.orthogonal_(self.w)
            with torch.no_grad():
                self.w.mul_(math.sqrt(self.features))

    def positive_features(self, x: Tensor) -> Tensor:
        """exp(w x - |x|^2 / 2) / sqrt(m), (B, T, e) -> (B, T, m)."""
        exponent = F.linear(x, self.w) - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(self.features)

    def attend(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, e)."""
        k, q, v = self.kqv(x).split(self.emb, dim=-1)
        k, q = self.positive_features(k), self.positive_features(q)  # (B, T, m)
        weight = q @ k.sum(1)[..., None]  # (B, T, 1)
        y = q @ (k.transpose(1, 2) @ v) / (weight + 1e-8)
        return v + self.dp(self.proj(y))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, e)."""
        x = self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int) -> int:
        """Of one image, by the published counter (whose last terms are its own)."""
        dim, e, m, t = self.kqv.in_features, self.emb, self.features, tokens
        features = 2 * (t * e + e * t * e)
        return dim * t * 3 * e + features + t * m + 2 * t * e * m + t * e**2 + t * e * e + e**3


class TokensToToken(nn.Module):
    """Three soft splits with a Performer after each of the first two, then a projection."""

    def __init__(self, img_size: int, in_chans: int, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        widths = [in_chans * STAGES[0][0] ** 2, token_dim * STAGES[1][0] ** 2, token_dim * STAGES[2][0] ** 2]
        self.attention1 = Performer(widths[0], token_dim)
        self.attention2 = Performer(widths[1], token_dim)
        self.project = nn.Linear(widths[2], embed_dim)
        self.grids = []
        side = img_size
        for kernel, stride, padding in STAGES:
            side = (side + 2 * padding - kernel) // stride + 1
            self.grids.append(side)
        self.num_patches = side**2

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, N, D)."""
        x = images
        for attention, (kernel, stride, padding), side in zip(
            (self.attention1, self.attention2, None), STAGES, self.grids, strict=True
        ):
            x = F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2)  # (B, T, channels k^2)
            if attention is not None:
                x = attention(x).transpose(1, 2).reshape(len(x), -1, side, side)
        return self.project(x)


def sinusoid_table(positions: int, width: int) -> Tensor:
    """Fixed position embedding (1, positions, width): sines at even channels, cosines at odd ones."""
    channel = np.arange(width)
    angles = np.arange(positions)[:, None] / np.power(10000, 2 * (channel // 2) / width)
    table = np.where(channel % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.from_numpy(table)[None].to(torch.get_default_dtype())


class GatedT2TViT(GatedTransformer):
    """T2T-ViT whose blocks and patches have gates.

    Args:
        img_size: side of the square input in pixels.
        token_dim: width e of the tokens-to-token stages.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, norm_eps: of the blocks.
        scale: of attention scores; None for d ** -0.5. The published pretrained models use embed_dim ** -0.5.
    """

    embeds_patches_apart = False  # every token of its first stages serves several patches

    def __init__(
        self,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
        token_dim: int = 64,
        scale: float | None = None,
    ) -> None:
        super().__init__(depth)
        self.embed_dim, self.num_heads, self.num_classes = embed_dim, num_heads, num_classes
        self.hidden_dim = int(embed_dim * mlp_ratio)
        self.num_prefix_tokens = 1
        self.img_size = img_size
        self.tokens_to_token = TokensToToken(img_size, in_chans, token_dim, embed_dim)
        self.num_patches = self.tokens_to_token.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = sinusoid_table(self.num_patches + 1, embed_dim).to(self.cls_token.device)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, self.hidden_dim, qkv_bias=qkv_bias, scale=scale, norm_eps=norm_eps)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def add_token_scores(self) -> None:
        """Add the linear layer that scores patches for selection by image; the published network has none."""
        like = self.cls_token
        self.gumbel = nn.Linear(self.embed_dim, 1, device=like.device, dtype=like.dtype)

    def forward_features(self, images: Tensor, tau: float = -1.0, ratio: float = 0.9) -> Tensor:
        """Normalised tokens (B, T, D); arguments as ``forward``."""
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"expected images of {self.img_size} x {self.img_size}, got {tuple(images.shape[-2:])}")
        x = self.gate_patches(self.tokens_to_token(images))  # (B, N, D)
        if tau > 0:
            if not hasattr(self, "gumbel"):
                raise RuntimeError("token selection needs the layer of scores; call add_token_scores() first")
            x = select_tokens(x, self.gumbel(x).squeeze(-1), tau=tau, ratio=ratio)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.run_blocks(self.drop_patches(x)))

    def forward(self, images: Tensor, tau: float = -1.0, ratio: float = 0.9) -> Tensor | tuple[Tensor, Tensor]:
        """Class logits (B, classes); in training mode the same twice. Arguments as ``GatedDeiT.forward``."""
        logits = self.head(self.forward_features(images, tau, ratio)[:, 0])
        return (logits, logits) if self.training else logits

    def embed_macs(self, batch: int) -> int:
        """The two Performers; the published counter leaves the projection out."""
        stages = self.tokens_to_token
        first, second, _ = stages.grids
        return batch * (stages.attention1.macs(first**2) + stages.attention2.macs(second**2))

    def no_weight_decay(self) -> set[str]:
        """Names that stage 2 does not decay."""
        return {"pos_embed", "cls_token"}
