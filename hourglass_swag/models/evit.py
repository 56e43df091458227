"""EViT: keep the most attended patches, drop the others or fuse them into one token.

Paper: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations (EViT),
arXiv:2202.07800. There are no parameters beyond the backbone's, so any of its checkpoints fits.

The published rows on SWAG score a patch by the mean attention that *all* tokens pay to it; EViT itself by the attention
of the class token alone.

Letters: B images, N tokens, P patches, C width, h heads, d = C / h; U tokens left by a layer that drops some, q its
keep rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.hosts import Effect, Facts, Method, Parts, PlanError, Tokens
from common.hosts.runner import attend
from hourglass_swag.host import publish
from hourglass_swag.methods import ATTENTION, EQUAL, REDUCES, Undrop, check_choice, check_layers
from hourglass_swag.models.ops.class_row import score_class_row
from hourglass_swag.models.ops.mean_attention import has_kernel, mean_attention
from hourglass_swag.models.vision_transformer import VisionTransformer

CPU_ROWS = 64  # queries whose attention weights exist at once on a CPU: they stay in its cache


def count_kept(num_patches: int, keep_rate: float) -> int:
    """Patches that remain of ``num_patches``: ceil(q (N - 1)), in floating point as published."""
    return math.ceil(keep_rate * num_patches)


def complement_idx(idx: Tensor, dim: int) -> Tensor:
    """Numbers in 0 ... dim - 1 that are absent from each row of ``idx`` (..., K), ascending: (..., dim - K)."""
    absent = torch.ones(*idx.shape[:-1], dim, dtype=torch.bool, device=idx.device).scatter(-1, idx, False)
    return absent.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : dim - idx.shape[-1]]


def attend_and_score(
    q: Tensor, k: Tensor, v: Tensor, *, rows: int, scale: float | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention, and the mean over heads and queries of its weights.

    The mean needs the weights of every query, so they are computed once, ``rows`` queries at a time, for both results.

    Args:
        q, k, v: queries, keys, values, (B, h, N, d).
        rows: queries per block.
        scale: of the logits; None for d^-0.5.
        dropout: rate at the weights.

    Returns:
        Output (B, h, N, d), and the mean weight of every key, (B, N), in float32 at least.
    """
    heads, tokens, width = q.shape[1:]
    precise = torch.promote_types(q.dtype, torch.float32)
    factor = width**-0.5 if scale is None else scale
    q, k, v = (q * factor).flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)  # (B h, ...), once
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


@dataclass(frozen=True)
class EViT(Method):
    """EViT: patches that are attended least are dropped, or fused into one token.

    Args:
        keep: fraction of the patches that each of the layers keeps, or one for each of them.
        layers: where; default: a quarter, half and three quarters of the depth.
        fuse: append the dropped patches, weighted by their scores, as one token; later layers treat it as a patch.
        score: "class", attention of the class token, the default; or "mean" over all queries, that without one.
        restore: "nearest", the kept token most like a dropped one (cosine) then, followed to the end, which is never
            one that was fused; or "frozen", the features that it had.

    Source: arXiv:2202.07800, section 3.
    """

    name = "evit"
    swag: ClassVar = {"score": "mean"}
    keep: float | tuple[float, ...] = 0.7
    layers: tuple[int, ...] | None = None
    fuse: bool = False
    score: Literal["class", "mean"] | None = None
    restore: Literal["nearest", "frozen"] = "nearest"

    def resolve(self, facts: Facts) -> "EViT":
        layers = self.layers
        if layers is None:
            layers = sorted({facts.depth * quarter // 4 for quarter in (1, 2, 3)})
        given, layers = layers, check_layers("evit: layers", layers, facts)
        keep = self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(layers)
        if len(keep) != len(layers):
            raise PlanError(f"evit: keep must be a number, or one for each of {len(layers)} layers, got {len(keep)}")
        keep = tuple(keep[given.index(layer)] for layer in layers)
        if wrong := [rate for rate in (*keep, self.keep) if not isinstance(rate, tuple) and not 0 < rate <= 1]:
            raise PlanError(f"evit: keep (--base_keep_rate) must be in (0, 1], got {wrong[0]}")
        score = self.score or ("class" if facts.class_token else "mean")
        if score == "class" and not facts.class_token:
            raise PlanError(f"evit: score 'class' needs a class token, which {facts.name} has not; take 'mean'")
        return replace(self, keep=keep, layers=layers, score=score)

    def effects(self) -> Sequence[Effect]:
        assert self.layers is not None
        found: list[Effect] = []
        for layer in self.layers:
            if self.keep_at(layer) < 1:
                if self.score == "mean":
                    found.append(Effect(layer, "attend", needs=ATTENTION))
                found.append(Effect(layer, "between", needs=EQUAL, breaks=REDUCES))
        return found

    def keep_at(self, layer: int) -> float:
        """q of a layer."""
        assert self.layers is not None
        assert isinstance(self.keep, tuple)
        return self.keep[self.layers.index(layer)]

    def fuses_before(self, layer: int) -> bool:
        """Whether there is a fused token among those that enter a layer."""
        return self.fuse and any(self.keep_at(each) < 1 for each in self.layers or () if each < layer)

    def attend(self, layer: int, tokens: Tokens, parts: Parts) -> tuple[Tensor, Tokens, Parts]:
        """Attention and the mean of its weights.

        On a GPU in half precision a kernel makes the weights and adds them up without storing them; that repeats a
        product.
        """
        q, k, v = parts.q, parts.k, parts.v
        if count_kept(k.shape[2] - tokens.prefix, self.keep_at(layer)) >= k.shape[2] - tokens.prefix:
            return attend(parts, tokens), tokens, parts
        if not parts.dropout and has_kernel(q, k) and parts.scale == q.shape[3] ** -0.5:
            return attend(parts, tokens), tokens, replace(parts, scores=mean_attention(q, k))
        rows = CPU_ROWS if q.device.type == "cpu" else q.shape[2]
        heads, scores = attend_and_score(q, k, v, rows=rows, scale=parts.scale, dropout=parts.dropout)
        return heads, tokens, replace(parts, scores=scores)

    def rank(self, layer: int, tokens: Tokens, parts: Parts, *, all_of_them: bool = False) -> tuple[Tensor, Tensor]:
        """Scores of patches and their places among the tokens, best first: those kept, or all of them, (B, K)."""
        scores = (
            score_class_row(parts.q, parts.k, parts.scale, tokens.key_bias) if parts.scores is None else parts.scores
        )
        scores = scores[:, tokens.prefix :]
        number = scores.shape[1] if all_of_them else count_kept(scores.shape[1], self.keep_at(layer))
        ranked = scores.topk(number, dim=1)
        return ranked.values, ranked.indices + tokens.prefix

    def between(self, layer: int, tokens: Tokens, parts: Parts) -> Tokens:
        """The prefix, then the patches kept, best first, then the others as one token if asked for.

        Source: EViT, arXiv:2202.07800, Inattentive token fusion: x_fused = sum_i a_i x_i over the dropped patches.
        """
        patches = tokens.x.shape[1] - tokens.prefix
        number = count_kept(patches, self.keep_at(layer))
        if number >= patches:
            return tokens
        scores, places = self.rank(layer, tokens, parts, all_of_them=self.fuse)
        index = tokens.behind_prefix(places)
        taken, kept = tokens.take(index), tokens.prefix + number
        left = taken
        if self.fuse:
            weights = scores[:, number:]
            fused = (taken.x[:, kept:] * weights[..., None].to(taken.x.dtype)).sum(1, keepdim=True)
            dropped = None if taken.rotation is None else taken.rotation.part(slice(number, None))
            left = taken.head(kept).append(fused, weights, dropped)
        return left.update(
            undone_by=Undrop(tokens, index[:, :kept], None, self.restore, some_fused=self.fuses_before(layer))
        )


def published(
    net: VisionTransformer,
    *,
    base_keep_rate: float = 0.6,
    drop_loc: Sequence[int] | None = None,
    fuse_token: bool = True,
    score: Literal["mean", "cls"] = "mean",
) -> VisionTransformer:
    """The network of a published row, under the published names of the settings.

    Args:
        net: the backbone.
        base_keep_rate: fraction of the patches that the layers ``drop_loc`` keep.
        drop_loc: default: a quarter, half and three quarters of the depth.
        fuse_token: append the dropped patches as one token.
        score: "mean" as in the published rows on SWAG, "cls" as in EViT's paper.

    Raises:
        ValueError: if a keep rate, a location or the score is out of range.
    """
    check_choice("evit: score (--evit_score)", score, ("mean", "cls"))
    layers = None if drop_loc is None else tuple(set(drop_loc))
    if layers and (beyond := sorted(layer for layer in layers if not 0 <= layer < net.num_layers)):
        raise ValueError(f"drop_loc (--drop_loc) must hold layers 0 to {net.num_layers - 1}, got {beyond}")
    ranking = "class" if score == "cls" else "mean"
    return publish(net, EViT(keep=base_keep_rate, layers=layers, fuse=fuse_token, score=ranking))
