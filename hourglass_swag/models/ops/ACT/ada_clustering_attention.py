"""Adaptive clustering attention: queries (or keys) that share a locality-sensitive hash code act as their mean.

Paper: End-to-End Object Detection with Adaptive Clustering Transformer (ACT), arXiv:2011.09315, section 3. Written from
the formulas; where the implementation behind the published rows on SWAG departs from the paper, it is kept: the offset
of the hash spans [0, 1) and not a bucket, and two bits per round are added up, so that large values carry over.

Letters: R rows (images x heads), N tokens, d channels of a head, H hash rounds, C clusters of the row that has most.

    z[j, n]  = floor((sum_c x[n, c] alpha[c, j] + beta[j]) / 8),   alpha ~ N(0, 1), beta ~ U[0, 1)
    code[n]  = sum_j (z[j, n] - min_n z[j, n]) 2^(2j)              int64, wrapping around
    Q[c]     = mean of the queries whose code is the c-th smallest
    out[n]   = softmax(Q[cluster of n] K^T) V
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.measure.flops import OpCounts
from common.run.precision import without_autocast
from hourglass_swag.models.ops import library
from hourglass_swag.models.ops.ACT.extensions import broadcast_, count_groups, number_groups, plain, weighted_sum_
from hourglass_swag.models.ops.projections import draw_projections
from hourglass_swag.models.plug_in import caller

BUCKET_WIDTH = 8.0
BITS_PER_ROUND = 2
USED_ROUNDS = 32  # 64 bits hold no more


class ClustersUnknown(ValueError):
    """A cost was asked for that depends on how many clusters the data form, and none have been formed yet."""


def hash_codes(vectors: Tensor, alpha: Tensor, beta: Tensor, bucket_width: float = BUCKET_WIDTH) -> Tensor:
    """Hash code of each token.

    Args:
        vectors: x, (..., N, d).
        alpha: projections, d x H numbers in that order; beta: offsets, H numbers. Any shape, the type of ``vectors``.
        bucket_width: 8 in the published code.

    Returns:
        Codes (..., N) int64. Equal codes mean the same cluster; from round 32 on nothing reaches the 64 bits.

    Source: ACT, arXiv:2011.09315, hashing: h(x) = floor((a x + b) / w).
    """
    dim = vectors.shape[-1]
    alpha = alpha.reshape(dim, -1)[:, :USED_ROUNDS]
    values = (vectors @ alpha + beta.reshape(-1)[:USED_ROUNDS]) / bucket_width  # (..., N, H)
    buckets = values.to(torch.promote_types(values.dtype, torch.float32)).floor()
    shifts = BITS_PER_ROUND * torch.arange(alpha.shape[1], device=vectors.device)
    lowest = (buckets.amin(-2).long() << shifts).sum(-1, keepdim=True)  # wraps as the sum below, so it may come off it
    return (buckets.long() << shifts).sum(-1) - lowest


def calc_center(x: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """Mean of the members of each cluster, (R, C, D), exact zeros for an empty one.

    Args:
        x: tokens, (R, N, D); groups: (R, N) int32; counts: members of each cluster, (R, C).

    Source: ACT, arXiv:2011.09315, prototypes: the mean of the tokens of equal code.
    """
    if library.serves(x.device, "weighted_sum"):
        members = counts.to(torch.promote_types(x.dtype, torch.float32))
        return weighted_sum_(x, groups, (1 / members).where(counts > 0, 0))
    sums = plain.sum_groups(x, groups, counts.shape[1])
    return sums / counts.clamp_min(1)[..., None].to(x.dtype)


def copy_to_members(y: Tensor, groups: Tensor) -> Tensor:
    """The row of ``y`` (R, C, D) of each token's cluster, (R, N, D)."""
    if library.serves(y.device, "broadcast"):
        return broadcast_(y, groups, torch.ones(y.shape[:2], dtype=y.dtype, device=y.device))
    return plain.copy_groups(y, groups)


class CalcCenter:
    """``CalcCenter.apply(x, groups, counts)``: the published name of ``calc_center``."""

    apply = staticmethod(calc_center)


class Broadcast:
    """``Broadcast.apply(y, groups)``: the published name of ``copy_to_members``."""

    apply = staticmethod(copy_to_members)


class WeightedSoftMax:
    """``WeightedSoftMax.apply(logits, counts)``: a softmax in which key c stands for ``counts[c]`` equal keys.

    softmax(S) counts, divided by its sum over the keys, is the softmax of S + log(counts). Both broadcast.

    Source: ACT, arXiv:2011.09315, attention to prototypes: a softmax weighted by their counts.
    """

    @staticmethod
    def apply(logits: Tensor, counts: Tensor) -> Tensor:
        return (logits + counts.to(logits.dtype).log()).softmax(-1)


def attend_clusters(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes_q: Tensor | None,
    codes_k: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    dropout: float,
) -> tuple[Tensor, Sequence[int]]:
    """Attention between the clusters that equal codes make.

    Args:
        q, k, v: (B, h, N, d), (B, h, M, d), (B, h, M, e).
        codes_q, codes_k: (B, h, N) and (B, h, M) int64; None where nothing is clustered.
        mask: True where a key counts, broadcast to (B, h, N, M); None with clustered keys.
        temperature: factor of the logits.
        dropout: rate at the weights.

    Returns:
        (B, h, N, e), and the numbers of clusters of queries and keys, 0 where nothing is clustered.

    Raises:
        ClustersUnknown: on the meta device, which has no data to cluster.
    """
    rows, query_groups, formed = q.shape[:2], None, [0, 0]
    if codes_q is not None:
        query_groups, counts = cluster(codes_q.flatten(0, 1))
        formed[0] = counts.shape[1]
        q = calc_center(q.flatten(0, 1), query_groups, counts).unflatten(0, rows)
    if codes_k is not None:
        groups, counts = cluster(codes_k.flatten(0, 1))
        formed[1] = counts.shape[1]
        k, v = (calc_center(x.flatten(0, 1), groups, counts).unflatten(0, rows) for x in (k, v))
        mask = counts.to(q.dtype).log()[:, None].unflatten(0, rows)  # see WeightedSoftMax; -inf for an empty cluster
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=temperature)
    if query_groups is not None:
        out = copy_to_members(out.flatten(0, 1), query_groups).unflatten(0, rows)
    return out, formed


def cluster(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster of each token by its code (R, N), (R, N) int32, and the sizes of the clusters, (R, C) int32."""
    if codes.device.type == "meta":
        raise ClustersUnknown(
            "how many clusters ACT forms depends on the weights and the image, which the meta device does not "
            "have: run the model on an image"
        )
    groups, counts = number_groups(codes)
    return groups, counts[:, : count_groups(groups)]


@torch.library.custom_op(
    "leanvit_act::attend_clusters",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for the number of clusters
    schema="(Tensor q, Tensor k, Tensor v, Tensor? codes_q, Tensor? codes_k, Tensor? mask, float temperature, "
    "float dropout) -> (Tensor, Tensor)",
)
def _attend_clusters(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes_q: Tensor | None,
    codes_k: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """``attend_clusters`` as one operator of a compiled model, which need not know how many clusters there are."""
    out, formed = attend_clusters(q, k, v, codes_q, codes_k, mask, temperature, dropout)
    return out.contiguous(), torch.tensor(formed)


@_attend_clusters.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), torch.empty(2, dtype=torch.int64, device="cpu")


class AdaClusteringAttention(nn.Module):
    """Attention between clusters of queries and, if asked for, of keys and values. It has no parameters.

    Args:
        group_Q, group_K: cluster the queries; cluster keys and values.
        q_hashes, k_hashes: hash rounds H; from 33 on they change nothing, which is warned of.
        softmax_temp: factor of the logits.
        attention_dropout: rate at the attention weights in training.
        bucket_width: of the hash; 8 in the published code.

    Attributes:
        Q_clusters, K_clusters: clusters of the last call, those of the row that had most; None where none were formed,
            a tensor with the number after a compiled model.
        generator: for the random projections; None for torch's default one.

    Raises:
        ValueError: if a number of rounds is below 1, or the width is not positive.
    """

    def __init__(
        self,
        group_Q: bool = False,
        group_K: bool = False,
        q_hashes: int = 32,
        k_hashes: int = 8,
        softmax_temp: float = 1,
        attention_dropout: float = 0.0,
        *,
        bucket_width: float = BUCKET_WIDTH,
    ) -> None:
        super().__init__()
        for name, rounds in (("q_hashes", q_hashes), ("k_hashes", k_hashes)):
            if rounds < 1:
                raise ValueError(f"{name} (--act_{name}) must be 1 to {USED_ROUNDS}, got {rounds}")
            if rounds > USED_ROUNDS:
                warnings.warn(f"{name} = {rounds}: rounds behind {USED_ROUNDS} change nothing", stacklevel=caller())
        if not bucket_width > 0:
            raise ValueError(f"bucket_width must be positive, got {bucket_width}")
        self.group_Q, self.group_K = group_Q, group_K
        self.q_hashes, self.k_hashes = q_hashes, k_hashes
        self.softmax_temp = softmax_temp
        self.attention_dropout = attention_dropout
        self.bucket_width = bucket_width
        self.generator: torch.Generator | None = None
        self.Q_clusters: int | Tensor | None = None
        self.K_clusters: int | Tensor | None = None

    def extra_repr(self) -> str:
        sides = [
            f"{side} ({rounds} rounds)"
            for side, grouped, rounds in (
                ("queries", self.group_Q, self.q_hashes),
                ("keys", self.group_K, self.k_hashes),
            )
            if grouped
        ]
        return f"clusters {' and '.join(sides) or 'nothing'}"

    def draw(self, dim: int, n_hashes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random projections alpha (1, dim, n_hashes), then offsets beta (1, n_hashes, 1); replace it to supply them.

        One call per clustered side of every forward pass, queries first. Drawn in float32 whatever ``dtype`` is.
        """
        alpha, beta = draw_projections((1, dim, n_hashes), (1, n_hashes, 1), device, self.generator)
        return alpha.to(dtype), beta.to(dtype)

    @torch.no_grad()
    def hash(self, vectors: Tensor, n_hashes: int) -> Tensor:
        """Codes (..., N) of vectors (..., N, d) under fresh projections; in float32 under autocast."""
        vectors = vectors.detach()
        with without_autocast(vectors):
            alpha, beta = self.draw(vectors.shape[-1], n_hashes, vectors.device, vectors.dtype)
            return hash_codes(vectors, alpha, beta, self.bucket_width)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        key_padding_mask: Tensor | None = None,
        dropout: float | None = None,
    ) -> Tensor:
        """Attend. Rows may be (R, ...) or, without any copying, (B, h, ...).

        A compiled model without gradients runs all that depends on the number of clusters as one operator.

        Args:
            queries: multiplied by d^-0.5 already, (R, N, d).
            keys, values: (R, M, d) and (R, M, e).
            key_padding_mask: keys to ignore, (R, M), True = ignore; not with clustered keys.
            dropout: rate at the weights; None for the one of the constructor, in training.

        Returns:
            (R, N, e).

        Raises:
            ValueError: for a mask with clustered keys.
        """
        if key_padding_mask is not None and self.group_K:
            raise ValueError("key_padding_mask does not go with clustered keys (group_K): padding would join clusters")
        codes = [
            self.hash(x.float() if _is_autocast(x) else x, rounds) if grouped else None
            for grouped, x, rounds in ((self.group_Q, queries, self.q_hashes), (self.group_K, keys, self.k_hashes))
        ]
        mask = None if key_padding_mask is None else ~key_padding_mask[..., None, :]  # (R, 1, M), True = attend
        operands = (queries, keys, values, codes[0], codes[1], mask)
        flat = queries.dim() == 3
        if flat:  # the fused kernels want two leading dimensions
            operands = tuple(None if x is None else x[None] for x in operands)
        if dropout is None:
            dropout = self.attention_dropout if self.training else 0.0
        unknown_sizes = torch.compiler.is_compiling() and not torch.is_grad_enabled() and not dropout
        attend: Any = torch.ops.leanvit_act.attend_clusters if unknown_sizes else attend_clusters
        out, formed = attend(*operands, self.softmax_temp, dropout)
        self.Q_clusters, self.K_clusters = (None if code is None else formed[i] for i, code in enumerate(codes))
        return out[0] if flat else out

    def published_ops(self, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """The published formula: attention between C_q queries and C_k keys, and the hash of what is clustered.

        Per clustered side NEH multiply-accumulates (E = h d), of which rounds behind the 32nd are spared here, and h N
        H additions, quotients and differences; h C_q C_k products for the temperature, and as many products and
        quotients for reweighting clustered keys. Sorting, grouping, averaging and copying are not counted.
        """
        *rows, N, d = args[0].shape
        R = math.prod(rows)
        rounds = self.group_Q * self.q_hashes + self.group_K * self.k_hashes
        logits = R * int(self.Q_clusters or N) * int(self.K_clusters or N)
        return OpCounts(
            matmul=rounds * R * N * d + 2 * logits * d,
            softmax=logits,
            mul=logits * (2 if self.group_K else 1),
            div=rounds * R * N + (logits if self.group_K else 0),
            add=rounds * R * N,
            sub=rounds * R * N,
        )


def _is_autocast(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
