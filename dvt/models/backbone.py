"""What T2T-ViT and DeiT share: tokens, blocks, head, and the two reuses from the stage before.

Paper: arXiv:2105.15075, Section 3. A subclass brings the network that turns a picture into tokens.

Shapes: B batch, N tokens of the stage, M of the stage before (class token not counted), D width, L blocks, H heads,
C classes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.layers import init_linear
from common.measure import flops
from common.measure.flops import OpCounts
from dvt.models.reuse import FEATURE_CHANNELS, RELATION_RATIO, TokenResize, reuse_relations
from dvt.models.transformer_block import Block, Norm, drop_path_rates


class StageOutput(NamedTuple):
    """What a stage answers and hands on.

    Attributes:
        logits: (B, C).
        features: output of the last block, before the final normalisation, class token first, (B, N+1, D).
        relations: attention logits of all blocks and heads, block-major, what was reused included,
            (B, L·H, N+1, N+1); None unless asked for.
    """

    logits: Tensor
    features: Tensor
    relations: Tensor | None = None

    def select(self, index: Tensor) -> "StageOutput":
        """The same for some pictures of the batch.

        Args:
            index: their numbers (int64), or a mask (bool, B).
        """
        rows = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        logits, features = self.logits.index_select(0, rows), self.features.index_select(0, rows)
        # on a CPU several times faster than indexing, and relations are most of what is handed on
        return StageOutput(logits, features, None if self.relations is None else self.relations.index_select(0, rows))


class Backbone(nn.Module):
    """A Vision Transformer at one token grid, alone or as a stage of a cascade.

    Args:
        embed: name and module of the network from pictures (B, 3, size, size) to tokens (B, N, D).
        grid: tokens per side.
        pos_embed: (1, N+1, D), trained or not.
        source_grid: tokens per side of the stage before; needed for either reuse.
        feature_reuse, relation_reuse: take over the features, the attention logits, of the stage before, which must
            have the same width, depth and heads.

    Raises:
        ValueError: if a reuse has no stage to reuse from.
    """

    def __init__(
        self,
        *,
        embed: tuple[str, nn.Module],
        grid: int,
        pos_embed: nn.Parameter,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
        source_grid: int | None = None,
        feature_reuse: bool = False,
        relation_reuse: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.embed_dim, self.depth, self.num_heads = num_classes, embed_dim, depth, num_heads
        self.grid, self.source_grid = grid, source_grid
        self.feature_reuse, self.relation_reuse = feature_reuse, relation_reuse
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = pos_embed
        self.embed_name = embed[0]
        self.add_module(*embed)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rate,
                norm_layer=norm_layer,
                feature_reuse=feature_reuse,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim)
        if relation_reuse:
            maps = depth * num_heads
            self.relation_reuse_conv = nn.Sequential(
                nn.Conv2d(maps, RELATION_RATIO * maps, 1), nn.GELU(), nn.Conv2d(RELATION_RATIO * maps, maps, 1)
            )
        if feature_reuse or relation_reuse:
            if source_grid is None:
                raise ValueError("feature_reuse and relation_reuse need source_grid, the grid of the stage before")
            self.token_resize = TokenResize(source_grid, grid)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    @property
    def embed(self) -> Any:
        """The network from pictures to tokens."""
        return getattr(self, self.embed_name)

    def no_weight_decay(self) -> set[str]:
        """Parameters that a network with one exit does not decay; a cascade has no such list, as published."""
        return {"cls_token", "pos_embed"}

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, C) of a stage that stands alone, its attention fused.

        Raises:
            ValueError: if it was built with a reuse: see :meth:`run`.
        """
        return self.run(images).logits

    def run(self, images: Tensor, before: StageOutput | None = None, *, hand_on: bool = False) -> StageOutput:
        """Run the stage.

        Args:
            images: (B, 3, size, size).
            before: output of the stage before; not looked at without a reuse.
            hand_on: also return the attention logits, which makes each block materialise its map.

        Raises:
            ValueError: if a reuse lacks what it reuses.
        """
        features, relations, matrix = self._find_reused(before)
        x = self.embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        reused: tuple[Tensor | None, ...] = (None,) * self.depth
        if relations is not None and matrix is not None:
            reused = reuse_relations(relations, self.relation_reuse_conv, matrix.to(relations.dtype), self.depth)
        resize = matrix if self.feature_reuse else None
        maps: list[Tensor] = []
        for block, added in zip(self.blocks, reused, strict=True):
            x, relation = block(x, features, added, resize, hand_on=hand_on)
            if relation is not None:
                maps.append(relation)
        logits = self.head(self.norm(x)[:, 0])
        return StageOutput(logits, x, torch.cat(maps, dim=1) if hand_on else None)

    def _find_reused(self, before: StageOutput | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Features and relations that this stage takes over, and the matrix that resizes both."""
        if not self.feature_reuse and not self.relation_reuse:
            return None, None, None
        if before is None:
            raise ValueError("this stage reuses features or relations: run it in a cascade, or pass `before`")
        if self.relation_reuse and before.relations is None:
            raise ValueError("this stage reuses relations, but the stage before was not asked to hand them on")
        features = before.features if self.feature_reuse else None
        relations = before.relations if self.relation_reuse else None
        return features, relations, self.token_resize(before.features.dtype)

    def count_ops(self, *, published: bool = False) -> OpCounts:
        """Operations for one picture, as a stage with its reuse networks.

        Args:
            published: count the resizes as the operators of the official code (up-sampling and pooling); otherwise as
                the matrix products that run here.
        """
        tokens = self.grid**2 + 1
        source = 0 if self.source_grid is None else self.source_grid**2 + 1
        counts = self.embed.count_ops()
        for block in self.blocks:
            assert isinstance(block, Block)
            counts += block.count_ops(tokens, source)
        counts += self._count_reuse(tokens, source, published)
        counts += flops.layer_norm(tokens * self.embed_dim)
        if self.num_classes > 0:
            counts += flops.linear(1, self.embed_dim, self.num_classes)
        return counts

    def _count_reuse(self, tokens: int, source: int, published: bool) -> OpCounts:
        """The mixer of relations, and both resizes."""
        counts, channels = OpCounts(), self.depth * self.num_heads
        if self.relation_reuse:
            counts += flops.conv2d(source, source, channels, RELATION_RATIO * channels, 1)
            counts += flops.gelu(source**2 * RELATION_RATIO * channels)
            counts += flops.conv2d(source, source, RELATION_RATIO * channels, channels, 1)
        resized_features = FEATURE_CHANNELS * self.depth if self.feature_reuse else 0  # maps of n_up x n_up
        resized_relations = channels * (source + tokens) if self.relation_reuse else 0  # along keys, along queries
        if published and self.source_grid is not None:
            pixels = (2 * self.source_grid) ** 2 * (resized_features + resized_relations)
            return counts + flops.upsample(pixels) + flops.pool(pixels)
        if self.feature_reuse:
            counts += flops.matmul(self.depth, tokens - 1, FEATURE_CHANNELS, source - 1)
        if self.relation_reuse:
            padded = self.token_resize.padded_tokens
            counts += flops.matmul(channels, source, padded, source)
            counts += flops.matmul(channels, tokens, padded, source)
        return counts
