"""DeiT with gates on blocks and patches, the backbone of UVC.

UVC, arXiv:2203.08243; the network is DeiT's (arXiv:2012.12877), whose published weights
load by name. Every block also owns two pairs of logits for its halves, which the method never uses but its files hold.

B batch, N patches, T tokens, D width, H heads, d channels of a head, M hidden neurons.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from timm.layers import PatchEmbed  # pyright: ignore[reportPrivateImportUsage]
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models import vision_transformer
from torch import Tensor, nn

from uvc.models.gates import GatedTransformer, check_patches_fill


class Block(vision_transformer.Block):
    """timm's pre-norm block, with the idle gates of its halves.

    Args:
        dim: width D. num_heads: H; divides D. hidden: M.
        qkv_bias, norm_eps, drop_path: of the block.
        scale: of attention scores; None for d ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        if dim % num_heads:
            raise ValueError(f"the width must be a multiple of the number of heads, got {dim} and {num_heads}")
        super().__init__(
            dim,
            num_heads,
            mlp_ratio=(hidden + 0.5) / dim,  # the product is rounded down
            qkv_bias=qkv_bias,
            drop_path=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),  # pyright: ignore[reportArgumentType] - makes a layer
        )
        self.attn: Attention  # timm declares no more than a module
        self.mlp: Mlp
        self.attn_skip_gating = nn.Parameter(torch.tensor([-1.0, 1.0]))
        self.mlp_skip_gating = nn.Parameter(torch.tensor([-1.0, 1.0]))
        self.scale = scale
        if scale is not None:
            self.attn.scale, self.attn.fused_attn = scale, False  # the fused form has its own scale


class GatedDeiT(GatedTransformer):
    """DeiT whose blocks and patches have gates; without any of them it is DeiT.

    Args:
        img_size: side of the input, or (height, width), in pixels.
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, norm_eps: of the network.
        distilled: distillation token and second head.
        drop_path_rate: stochastic depth of the last block; it grows linearly with depth.

    Raises:
        UsageError: the patches do not fill the image.
    """

    block_class: type[Block] = Block

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        distilled: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(depth, embed_dim, num_heads, mlp_ratio, num_classes, distilled=distilled)
        check_patches_fill(img_size, patch_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.num_patches = self.patch_embed.num_patches
        self.image_size = cast(tuple[int, int], self.patch_embed.img_size)
        positions = nn.Parameter(torch.zeros(1, self.num_patches + self.num_prefix_tokens, embed_dim))
        make = partial(self.block_class, embed_dim, num_heads, self.hidden_dim, qkv_bias=qkv_bias, norm_eps=norm_eps)
        rates = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.add_layers(make, positions, rates, norm_eps=norm_eps)
        self.add_token_scores()  # which keep torch's initial values

    def embed_patches(self, images: Tensor) -> Tensor:
        """One convolution."""
        return self.patch_embed(images)

    def embed_macs(self, batch: int = 1) -> int:
        """B N D P^2 channels."""
        return batch * self.num_patches * self.patch_embed.proj.weight.numel()
