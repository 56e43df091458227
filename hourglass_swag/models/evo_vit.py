"""Evo-ViT on the SWAG backbone: from some layer on, only the patches that the class token attends to enter a block.

Paper: Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer, arXiv:2108.01390, in the reduced form of
arXiv:2210.01035: no representative token; the patches that skip a block are carried over unchanged and may come back in
a later layer. There are no parameters beyond the backbone's, so any of its checkpoints fits.

Letters: B images, N tokens, C width, h heads, d = C / h; p the kept fraction ("prune ratio"), n = floor(p (N - 1)) the
patches that go through, t the trade-off, a the running class attention of the patches, A the class row of a layer's
attention, averaged over heads.

    unpruned layer:  a = (1 - t) a + t A
    pruned layer:    sort the patches by a, descending; the block sees the class token and the first n;
                     their a = (1 - t) a + t A; the others keep theirs

With classifier "gap" the first patch plays the part of the class token.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.measure.flops import OpCounts
from hourglass_swag.models.ops.class_row import score_class_row
from hourglass_swag.models.ops.tokens import take_tokens
from hourglass_swag.models.vision_transformer import (
    BlockFactory,
    Encoder,
    EncoderBlock,
    SelfAttention,
    VisionTransformer,
    sized,
)


def count_processed(num_patches: int, prune_ratio: float) -> int:
    """n: patches of ``num_patches`` that go through a block with this ratio."""
    return num_patches if prune_ratio == 1 else math.floor(prune_ratio * num_patches)


def easy_gather(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``x`` (B, N, C) by ``indices`` (B, K): (B, K, C)."""
    return take_tokens(x, indices)


def attend_with_class_row(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Fused attention, and the weights of the class token alone, which are one small product beside it.

    Args:
        q, k, v: (B, h, N, d).
        dropout: rate at the weights of the output.

    Returns:
        Output (B, h, N, d), and the class row averaged over heads, (B, N), in float32 at least.
    """
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return out, score_class_row(q, k)


class EvoEncoderBlock(EncoderBlock):
    """Transformer layer for the most attended patches.

    Args:
        num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate: see ``EncoderBlock``.
        prune_ratio: p, in (0, 1]; 1 for a plain layer.
        tradeoff: t, weight of this layer's class row in the running class attention.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        prune_ratio: float = 1.0,
        tradeoff: float = 0.5,
    ) -> None:
        super().__init__(num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
        if not 0 < prune_ratio <= 1:
            raise ValueError(
                f"prune_ratio (--evo_prune_ratio), the kept fraction, must be in (0, 1], got {prune_ratio}"
            )
        if not 0 <= tradeoff <= 1:
            raise ValueError(f"tradeoff (--evo_tradeoff) must be in [0, 1], got {tradeoff}")
        self.prune_ratio, self.tradeoff = prune_ratio, tradeoff

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - the class attention travels along
        self, x: Tensor, cls_attn: Tensor | None = None, *, update: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            x: tokens, (N, B, C).
            cls_attn: a, (B, N - 1); None before the first layer.
            update: whether anyone will need the new a.

        Returns:
            Tokens (N, B, C), in a pruned layer in the order of a, and the new a in that order, or None without update.

        Raises:
            ValueError: if a layer that prunes gets no class attention.
        """
        x = x.transpose(0, 1)  # (B, N, C)
        if self.prune_ratio == 1:
            x, row = self.evolve(x, update)
            return x.transpose(0, 1), self.mix(cls_attn, row)
        if cls_attn is None:
            raise ValueError("a layer that prunes needs the class attention of the layers before it")
        n = count_processed(cls_attn.shape[1], self.prune_ratio)
        cls_attn, order = cls_attn.sort(dim=1, descending=True)
        x = easy_gather(x, F.pad(order + 1, (1, 0)))
        y, row = self.evolve(x[:, : n + 1], update)
        x = torch.cat([y, x[:, n + 1 :]], dim=1).transpose(0, 1)
        if row is None:
            return x, None
        return x, torch.cat([cast(Tensor, self.mix(cls_attn[:, :n], row)), cls_attn[:, n:]], dim=1)

    def evolve(self, x: Tensor, update: bool) -> tuple[Tensor, Tensor | None]:
        """The plain layer on ``x`` (B, n + 1, C), and A, (B, n), if it is needed."""
        y = self.ln_1(x)
        attention, row = cast(SelfAttention, self.self_attention), None
        if update:
            q, k, v = attention.project(y)
            attended, row = attend_with_class_row(q, k, v, dropout=attention.dropout if self.training else 0.0)
            y, row = attention.merge_heads(attended), row[:, 1:]
        else:
            y = attention(y)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x)), row

    def mix(self, cls_attn: Tensor | None, row: Tensor | None) -> Tensor | None:
        """(1 - t) a + t A.

        Source: Evo-ViT, arXiv:2108.01390, class attention carried over layers: (1 - t) a + t A.
        """
        if cls_attn is None or row is None:
            return row
        return (1 - self.tradeoff) * cls_attn + self.tradeoff * row

    def published_ops(self, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """As executed, but for the class row and the order.

        The published code averages the whole map over the heads, (n + 1)^2 quotients, where here one row more is
        multiplied out: (n + 1) C, its softmax and scaling. Its tool counts N - 1 sums for indices.
        """
        N, B, C = args[0].shape
        counts = inside + OpCounts(add=0 if self.prune_ratio == 1 else B * (N - 1))
        if result[1] is not None:
            T = 1 + count_processed(N - 1, self.prune_ratio)
            counts = counts + {
                "div": B * T * T,
                "mul": -B * C,
                "matmul": -B * T * C,
                "softmax": -B * self.num_heads * T,
            }
        return counts


class EvoEncoder(Encoder):
    """The backbone's encoder; the class attention travels from layer to layer, as long as a layer will prune by it."""

    def __init__(
        self, seq_length: int, num_layers: int, hidden_dim: int, dropout_rate: float, make_block: BlockFactory
    ) -> None:
        super().__init__(seq_length, num_layers, hidden_dim, dropout_rate, make_block)
        pruned = [index for index, block in enumerate(self.blocks()) if block.prune_ratio != 1]
        self.last_pruned = max(pruned, default=0)

    def blocks(self) -> list[EvoEncoderBlock]:
        """The layers."""
        return cast(list[EvoEncoderBlock], list(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        """All layers; ``x`` and the result are (N, B, C), the result in another order."""
        x, cls_attn = self.dropout(self.embed(x)), None
        for index, block in enumerate(self.layers):
            x, cls_attn = block(x, cls_attn, update=index < self.last_pruned)
        return self.normalize(x)


class EvoViT(VisionTransformer):
    """Vision Transformer whose later layers process the most attended patches only.

    Args:
        arguments, options: of ``VisionTransformer``.
        prune_ratio: p, the kept fraction from the layer ``prune_location`` on; or one number per layer.
        tradeoff: t; or one number per layer.
        prune_location: first pruned layer, unless there is one ratio per layer.

    Raises:
        ValueError: if a number is out of range, or the first layer were to prune, which nothing has scored yet.
    """

    encoder_class = EvoEncoder

    def __init__(
        self,
        *arguments: Any,
        prune_ratio: float | Sequence[float] = 1.0,
        tradeoff: float | Sequence[float] = 0.5,
        prune_location: int = 3,
        **options: Any,
    ) -> None:
        def make_block(index: int, *shape: Any) -> nn.Module:
            layers = self.num_layers
            ratios = ratio_per_layer(layers, prune_ratio, prune_location)
            tradeoffs = [tradeoff] * layers if isinstance(tradeoff, (int, float)) else list(tradeoff)
            if len(tradeoffs) != layers:
                raise ValueError(f"tradeoff must be a number or one for each of {layers} layers, got {len(tradeoffs)}")
            return EvoEncoderBlock(*shape, prune_ratio=ratios[index], tradeoff=tradeoffs[index])

        super().__init__(*arguments, make_block=make_block, **options)


def ratio_per_layer(num_layers: int, prune_ratio: float | Sequence[float], prune_location: int) -> list[float]:
    """p of every layer: 1 before ``prune_location``, ``prune_ratio`` from there on.

    Raises:
        ValueError: if the first layer were to prune, the location is beyond the layers, or a list has another length.
    """
    if isinstance(prune_ratio, (int, float)):
        if prune_ratio == 1:
            return [1.0] * num_layers
        if not 1 <= prune_location < num_layers:
            raise ValueError(
                f"prune_location (--evo_prune_location) must be 1 to {num_layers - 1}, got {prune_location}: the first "
                "layer cannot prune, because no class attention has ranked the patches yet"
            )
        return [1.0] * prune_location + [float(prune_ratio)] * (num_layers - prune_location)
    ratios = list(prune_ratio)
    if len(ratios) != num_layers:
        raise ValueError(f"prune_ratio must be a number or one for each of {num_layers} layers, got {len(ratios)}")
    if ratios[0] != 1:
        raise ValueError(
            f"the first layer cannot prune (prune_ratio[0] = {ratios[0]}): nothing has ranked the patches yet"
        )
    return ratios


EvoViTB16 = sized("EvoViTB16", EvoViT, "b16")
EvoViTL16 = sized("EvoViTL16", EvoViT, "l16")
EvoViTH14 = sized("EvoViTH14", EvoViT, "h14")
EvoViTDesk = sized("EvoViTDesk", EvoViT, "desk", 32)
