"""EViT on the SWAG backbone: keep the most attended patches, drop the others or fuse them into one token.

Paper: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations (EViT),
arXiv:2202.07800. There are no parameters beyond the backbone's, so any of its checkpoints fits.

The published rows on SWAG score a patch by the mean attention that *all* tokens pay to it (``score="mean"``, the
default); EViT itself by the attention of the class token alone (``score="cls"``).

Letters: B images, N tokens, C width, h heads, d = C / h; U tokens left by a layer that drops some, q its keep rate.
With classifier "gap" the first patch plays the part of the class token.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hourglass_swag.models.ops.class_row import score_class_row
from hourglass_swag.models.ops.mean_attention import has_kernel, mean_attention
from hourglass_swag.models.vision_transformer import EncoderBlock, VisionTransformer, sized

Score = Literal["mean", "cls"]

CPU_ROWS = 64  # queries whose attention weights exist at once on a CPU: they stay in its cache


def count_kept(num_patches: int, keep_rate: float) -> int:
    """Patches that remain of ``num_patches``: ceil(q (N - 1)), in floating point as published."""
    return math.ceil(keep_rate * num_patches)


def complement_idx(idx: Tensor, dim: int) -> Tensor:
    """Numbers in 0 ... dim - 1 that are absent from each row of ``idx`` (..., K), ascending: (..., dim - K)."""
    absent = torch.ones(*idx.shape[:-1], dim, dtype=torch.bool, device=idx.device).scatter(-1, idx, False)
    return absent.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : dim - idx.shape[-1]]


def attend_and_score(q: Tensor, k: Tensor, v: Tensor, *, rows: int, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Attention, and the mean over heads and queries of its weights.

    The mean needs the weights of every query, so they are computed once, ``rows`` queries at a time, for both results.

    Args:
        q, k, v: queries, keys, values, (B, h, N, d).
        rows: queries per block.
        dropout: rate at the weights.

    Returns:
        Output (B, h, N, d), and the mean weight of every key, (B, N), in float32 at least.
    """
    heads, tokens, width = q.shape[1:]
    precise = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (q * width**-0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)  # (B h, ...), once
    outputs: list[Tensor] = []
    sums: list[Tensor] = []
    for block in q.split(rows, dim=1):
        weights = (block @ k).softmax(dim=2)  # (B h, rows, N)
        if dropout:
            weights = F.dropout(weights, dropout)
        outputs.append(weights @ v)
        averaged = weights.unflatten(0, (-1, heads)).sum(1, dtype=precise) / (heads * tokens)  # (B, rows, N)
        sums.append(averaged.sum(1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out.unflatten(0, (-1, heads)), torch.stack(sums).sum(0)


def attend_with_scores(q: Tensor, k: Tensor, v: Tensor, score: Score, *, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Attention, and the score of every token.

    One row of weights beside fused attention suffices for "cls"; "mean" needs them all. On a GPU in half precision a
    kernel makes and adds them up without storing them; that repeats a product.

    Args:
        q, k, v: queries, keys, values, (B, h, N, d).
        score: "mean" over all queries, or "cls", the class token's row.
        dropout: rate at the weights.

    Returns:
        Output (B, h, N, d), scores (B, N).
    """
    if score == "cls":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), score_class_row(q, k)
    if not dropout and has_kernel(q, k):
        return F.scaled_dot_product_attention(q, k, v), mean_attention(q, k)
    return attend_and_score(q, k, v, rows=CPU_ROWS if q.device.type == "cpu" else q.shape[2], dropout=dropout)


class TokenSelection(nn.Module):
    """Keep the best patches behind the class token, best first, and append the others as one token if asked for.

    Args:
        keep_rate: q, fraction of the patches kept.
        fuse_token: append the sum of the dropped patches, each times its score (the scores are not normalised).

    Raises:
        ValueError: if the keep rate is not in (0, 1].

    Source: EViT, arXiv:2202.07800, Inattentive token fusion: x_fused = sum_i a_i x_i over the dropped patches.
    """

    def __init__(self, keep_rate: float, fuse_token: bool) -> None:
        super().__init__()
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep rates (--base_keep_rate) must be in (0, 1], got {keep_rate}")
        self.keep_rate, self.fuse_token = keep_rate, fuse_token

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, fuse_token={self.fuse_token}"

    def drops(self, num_tokens: int) -> bool:
        """Whether any of ``num_tokens`` tokens goes."""
        return count_kept(num_tokens - 1, self.keep_rate) < num_tokens - 1

    def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Select among the patches of ``x``.

        Args:
            x: tokens, (B, N, C).
            scores: of the patches, (B, N - 1).

        Returns:
            The tokens left, (B, U, C), and which of the N tokens were kept: the class token, then patches, best
            first, (B, U or, with a fused token, U - 1).
        """
        number = 1 + count_kept(scores.shape[1], self.keep_rate)
        scores = F.pad(scores, (1, 0), value=math.inf)  # the class token ranks first
        ranked = scores.topk(x.shape[1] if self.fuse_token else number, dim=1)
        x = x.gather(1, ranked.indices[..., None].expand(-1, -1, x.shape[2]))
        kept = ranked.indices[:, :number]
        if not self.fuse_token:
            return x, kept
        weights = ranked.values[:, number:, None].to(x.dtype)
        fused = (x[:, number:] * weights).sum(1, keepdim=True)
        return torch.cat([x[:, :number], fused], dim=1), kept


class EViTEncoderBlock(EncoderBlock):
    """Transformer layer that drops patches between its halves; with keep rate 1 it is a plain layer.

    Args:
        num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate: see ``EncoderBlock``.
        keep_rate, fuse_token: see ``TokenSelection``.
        score: "mean" over all queries, or "cls", the class token's row.

    Raises:
        ValueError: if the keep rate or the score is out of range.
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        keep_rate: float = 1.0,
        fuse_token: bool = False,
        score: Score = "mean",
    ) -> None:
        super().__init__(num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
        if score not in ("mean", "cls"):
            raise ValueError(f"score must be 'mean' or 'cls', got {score!r}")
        self.score: Score = score
        self.selection = TokenSelection(keep_rate, fuse_token)

    def forward(self, x: Tensor) -> Tensor:
        """One layer: ``x`` is (N, B, C), the result (U, B, C)."""
        if not self.selection.drops(x.shape[0]):
            return super().forward(x)
        x = x.transpose(0, 1)  # (B, N, C)
        attention = self.self_attention
        q, k, v = attention.project(self.ln_1(x))
        out, scores = attend_with_scores(q, k, v, self.score, dropout=attention.dropout if self.training else 0.0)
        x, _ = self.selection(x + self.dropout(attention.merge_heads(out)), scores[:, 1:])
        x = x + self.mlp(self.ln_2(x))
        return x.transpose(0, 1)


class EViT(VisionTransformer):
    """Vision Transformer whose layers drop the patches that are attended least.

    Args:
        arguments, options: of ``VisionTransformer``.
        keep_rate: fraction of the patches that each layer keeps, one number per layer.
        fuse_token: append the dropped patches as one token; later layers treat it as a patch.
        score: how patches are ranked: "mean" as in the published rows on SWAG, "cls" as in EViT's paper.

    Raises:
        ValueError: if there is not one keep rate per layer, one is not in (0, 1], or the score is unknown.
    """

    def __init__(
        self,
        *arguments: Any,
        keep_rate: Sequence[float] = (1,),
        fuse_token: bool = False,
        score: Score = "mean",
        **options: Any,
    ) -> None:
        def make_block(index: int, *shape: Any) -> nn.Module:
            if len(keep_rate) != self.num_layers:
                raise ValueError(
                    f"keep_rate must hold one number for each of the {self.num_layers} layers, got {len(keep_rate)}"
                )
            return EViTEncoderBlock(*shape, keep_rate=keep_rate[index], fuse_token=fuse_token, score=score)

        super().__init__(*arguments, make_block=make_block, **options)


def keep_rates(num_layers: int, base_keep_rate: float, drop_loc: Sequence[int]) -> list[float]:
    """Keep rate of every layer: ``base_keep_rate`` at the layers ``drop_loc``, 1 elsewhere.

    Raises:
        ValueError: if one of ``drop_loc`` is no layer.
    """
    if beyond := sorted(location for location in drop_loc if not 0 <= location < num_layers):
        raise ValueError(f"drop_loc (--drop_loc) must hold layers 0 to {num_layers - 1}, got {beyond}")
    return [base_keep_rate if index in drop_loc else 1.0 for index in range(num_layers)]


class _Dropping(EViT):
    """EViT that drops at the layers ``drop_loc``."""

    def __init__(
        self,
        *,
        num_layers: int,
        base_keep_rate: float = 0.6,
        drop_loc: Sequence[int],
        fuse_token: bool = True,
        **options: Any,
    ) -> None:
        rates = keep_rates(num_layers, base_keep_rate, drop_loc)
        super().__init__(num_layers=num_layers, keep_rate=rates, fuse_token=fuse_token, **options)


EViTB16 = sized("EViTB16", _Dropping, "b16", drop_loc=(3, 6, 9))
EViTL16 = sized("EViTL16", _Dropping, "l16", drop_loc=(6, 12, 18))
EViTH14 = sized("EViTH14", _Dropping, "h14", drop_loc=(8, 16, 24))
EViTDesk = sized("EViTDesk", _Dropping, "desk", 32, drop_loc=(2, 4, 6), base_keep_rate=0.7, fuse_token=False)
