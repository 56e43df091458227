"""What T2T-ViT and DeiT share: tokens, blocks, head, and the two reuses from the stage before.

Paper: arXiv:2105.15075, Section 3. A subclass brings the network that turns an image into tokens.

Shapes: B batch, N tokens of the stage, M of the stage before (class token not counted), D width, L blocks, H heads,
C classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from common.layers import init_linear
from dvt.models.reuse import FEATURE_CHANNELS, RELATION_RATIO, Grid, TokenResize, reuse_relations
from dvt.models.transformer_block import Block, Norm, Reusing, drop_path_rates

Size = int | tuple[int, int]
"""Side of an image in pixels, or height and width."""


class StageOutput(NamedTuple):
    """What a stage answers and hands on: relations only if asked to; they include what was reused."""

    logits: Tensor  # (B, C)
    features: Tensor | None = None  # output of the last block, before the final normalisation, (B, N+1, D)
    relations: Tensor | None = None  # attention logits of all blocks and heads, block-major, (B, L·H, N+1, N+1)

    def select(self, index: Tensor) -> "StageOutput":
        """The same for some images of the batch: their numbers (int64), or a mask (bool, B)."""
        rows = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        # on a CPU index_select is several times faster than indexing
        features, relations = (value if value is None else value.index_select(0, rows) for value in self[1:])
        return StageOutput(self.logits.index_select(0, rows), features, relations)


class Stage(nn.Module):
    """A Vision Transformer at one token grid, alone or in a cascade, and what it reuses of the stage before.

    A subclass brings the network: tokens, blocks that can reuse, an answer.
    """

    num_classes: int
    embed_dim: int
    depth: int
    num_heads: int
    prefix: int = 1
    """tokens in front that stand for no patch"""
    grid: Grid
    img_size: tuple[int, int]
    """height and width of the images in pixels"""

    def add_reuse(
        self, source_grid: Grid | None, *, feature_reuse: bool, relation_reuse: bool, feature_channels: int
    ) -> None:
        """The modules that all blocks share; arguments of :class:`Backbone`."""
        self.source_grid, self.feature_reuse, self.relation_reuse = source_grid, feature_reuse, relation_reuse
        self.feature_channels = feature_channels
        if relation_reuse:
            maps = self.depth * self.num_heads
            self.relation_reuse_conv = nn.Sequential(
                nn.Conv2d(maps, RELATION_RATIO * maps, 1), nn.GELU(), nn.Conv2d(RELATION_RATIO * maps, maps, 1)
            )
        if feature_reuse or relation_reuse:
            if source_grid is None:
                raise ValueError("feature_reuse and relation_reuse need source_grid, the grid of the stage before")
            self.token_resize = TokenResize(source_grid, self.grid, self.prefix)

    def tokens(self, images: Tensor) -> Tensor:
        """What enters the first block, (B, N+1, D), of images (B, 3, height, width)."""
        raise NotImplementedError

    @property
    def layers(self) -> Sequence[Reusing]:
        """The blocks."""
        raise NotImplementedError

    def answer(self, x: Tensor) -> Tensor:
        """Class logits (B, C) of what the last block gave, (B, N+1, D)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, C) of a stage that stands alone, its attention fused.

        Raises:
            ValueError: if it was built with a reuse: see :meth:`run`.
        """
        return self.run(images).logits

    def run(self, images: Tensor, before: StageOutput | None = None, *, hand_on: bool = False) -> StageOutput:
        """Run the stage.

        Args:
            images: (B, 3, height, width).
            before: output of the stage before; not looked at without a reuse.
            hand_on: also return the attention logits, which makes each block materialise its map.

        Raises:
            ValueError: if a reuse lacks what it reuses.

        Source: arXiv:2105.15075, Section 3.2, Eq. 8: A_up, the logits of all blocks and heads.
        """
        features = relations = matrix = None
        if self.feature_reuse or self.relation_reuse:
            if before is None:
                raise ValueError("this stage reuses features or relations: run it in a cascade, or pass `before`")
            if self.relation_reuse and before.relations is None:
                raise ValueError("this stage reuses relations, but the stage before was not asked to hand them on")
            assert before.features is not None
            features = before.features if self.feature_reuse else None
            relations = before.relations if self.relation_reuse else None
            matrix = self.token_resize(before.features.dtype)
        x = self.tokens(images)
        reused: tuple[Tensor | None, ...] = (None,) * self.depth
        if relations is not None and matrix is not None:
            reused = reuse_relations(relations, self.relation_reuse_conv, matrix.to(relations.dtype), self.depth)
        maps: list[Tensor] = []
        for block, added in zip(self.layers, reused, strict=True):
            x, relation = block(x, features, added, matrix if self.feature_reuse else None, hand_on=hand_on)
            if relation is not None:
                maps.append(relation)
        return StageOutput(self.answer(x), x, torch.cat(maps, dim=1) if hand_on else None)


class Backbone(Stage):
    """T2T-ViT or DeiT.

    Args:
        embed: from images (B, 3, height, width) to tokens (B, N, D), with ``img_size`` and ``grid``; it becomes the
            module ``embed_name``.
        pos_embed: (1, N+1, D), trained or not.
        source_grid: rows and columns of tokens of the stage before; needed for either reuse.
        feature_reuse, relation_reuse: take over the features, the attention logits, of the stage before, which must
            have the same width, depth and heads.
        feature_channels: of the reused features that each block receives.
        pos_std: of a position table that is trained, at the start.
        options: of every block: mlp_ratio, qkv_bias, qk_scale, feature_hidden.

    Raises:
        ValueError: if a reuse has no stage to reuse from.
    """

    embed_name: str

    def __init__(
        self,
        embed: nn.Module,
        pos_embed: nn.Parameter,
        *,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Norm = nn.LayerNorm,
        source_grid: Grid | None = None,
        feature_reuse: bool = False,
        relation_reuse: bool = False,
        feature_channels: int = FEATURE_CHANNELS,
        pos_std: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.embed_dim, self.depth, self.num_heads = num_classes, embed_dim, depth, num_heads
        self.grid: Grid = embed.grid  # pyright: ignore[reportAttributeAccessIssue]
        self.img_size: tuple[int, int] = embed.img_size  # pyright: ignore[reportAttributeAccessIssue]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = pos_embed
        self.add_module(self.embed_name, embed)
        self.pos_drop = nn.Dropout(drop_rate)
        options |= {"drop": drop_rate, "attn_drop": attn_drop_rate, "norm_layer": norm_layer}
        options |= {"feature_reuse": feature_reuse, "feature_channels": feature_channels}
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, drop_path=rate, **options) for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim)
        self.add_reuse(
            source_grid, feature_reuse=feature_reuse, relation_reuse=relation_reuse, feature_channels=feature_channels
        )
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=pos_std)
        self.apply(init_linear)

    @property
    def embed(self) -> Any:
        """The network from images to tokens."""
        return getattr(self, self.embed_name)

    def no_weight_decay(self) -> set[str]:
        """Parameters that a network with one exit does not decay; a cascade has no such list, as published."""
        return {"cls_token", "pos_embed"}

    @property
    def layers(self) -> Sequence[Reusing]:
        return cast(Sequence[Reusing], self.blocks)

    def tokens(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return self.pos_drop(x + self.pos_embed)

    def answer(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 0])


def sides_of(size: Size) -> tuple[int, int]:
    """Height and width of images in pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
