"""T2T-ViT (arXiv:2101.11986) with Performer tokens-to-token modules, and UVC's gates on its blocks and patches.

B batch, N patches, T tokens, D width, e width of the tokens-to-token stages, m random features.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from common.layers import Performer, TokensToToken, sinusoid_table
from uvc.models.deit import Block
from uvc.models.gates import GatedTransformer, check_patches_fill


def performer_macs(performer: Performer, tokens: int) -> int:
    """Multiply-accumulates of one image by the published counter (whose last terms are its own)."""
    dim, e, m, t = performer.kqv.in_features, performer.width, performer.features, tokens
    features = 2 * (t * e + e * t * e)
    return dim * t * 3 * e + features + t * m + 2 * t * e * m + t * e**2 + t * e * e + e**3


class GatedT2TViT(GatedTransformer):
    """T2T-ViT whose blocks and patches have gates.

    Args:
        img_size: side of the square input in pixels.
        token_dim: width e of the tokens-to-token stages.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, norm_eps: of the blocks.
        scale: of attention scores; None for d ** -0.5. The published pretrained models use embed_dim ** -0.5.

    Raises:
        UsageError: the tokens, one for 16 pixels of a side, do not fill the image.
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
        super().__init__(depth, embed_dim, num_heads, mlp_ratio, num_classes)
        check_patches_fill(img_size, 16)
        self.image_size = img_size, img_size
        self.tokens_to_token = TokensToToken(self.image_size, in_chans, token_dim, embed_dim)
        self.num_patches = self.tokens_to_token.num_patches
        table = sinusoid_table(self.num_patches + 1, embed_dim).to(self.block_skip_gating)
        block = partial(Block, embed_dim, num_heads, self.hidden_dim, qkv_bias=qkv_bias, scale=scale, norm_eps=norm_eps)
        self.add_layers(block, nn.Parameter(table, requires_grad=False), [0.0] * depth, norm_eps=norm_eps)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Three soft splits."""
        return self.tokens_to_token(images)

    def embed_macs(self, batch: int = 1) -> int:
        """The two Performers; the published counter leaves the projection out."""
        stages = self.tokens_to_token
        encoders: tuple[Any, ...] = stages.attention1, stages.attention2
        counts = [performer_macs(part, math.prod(grid)) for part, grid in zip(encoders, stages.grids, strict=False)]
        return batch * sum(counts)
