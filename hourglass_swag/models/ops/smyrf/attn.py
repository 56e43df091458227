"""SMYRF: attention inside equal-size clusters of similar queries and keys, several rounds combined by their mass.

Paper: SMYRF: Efficient Attention using Asymmetric Clustering, arXiv:2010.05315. Written from the formulas; where the
implementation behind the published rows on SWAG departs from the paper, it is kept as the default.

Letters: R rows (images x heads), N queries and M keys of a row, d channels, T hash rounds, c_q and c_k sizes of a
cluster. Inside a cluster:

    S = Q K^T / norm,   z = logsumexp of S over the keys,   o = softmax(S) V

and over rounds: out[n] = sum_t w[t, n] o[t, n] with w = softmax over t of z[t, n].

The published clusters are cut from one flat list over (round, row, rank). Unless N is a multiple of c_q, a cluster at
the end of a row therefore also holds the first tokens of the next one: another head, another image of the batch, or
another round. Results then depend on what else is in the batch. ``padded=True`` keeps rows apart: each is filled up
with masked keys to whole clusters. Its results are not the published ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.measure.flops import OpCounts
from common.run.errors import UsageError
from common.run.precision import without_autocast
from hourglass_swag.models.ops import library
from hourglass_swag.models.ops.projections import draw_projections
from hourglass_swag.models.ops.smyrf.utils import EXTRA_CHANNELS, lsh_clustering

MAX_ELEMENTS = {"cpu": 2**20}
"""Numbers gathered or computed at once, by device type: on a CPU they should stay in its cache."""
DEFAULT_MAX_ELEMENTS = 2**28

COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # half precision is computed in float32
COMPILED_WIDTHS = (16, 128)  # channels of a head: step and maximum


def dense(q: Tensor, k: Tensor, v: Tensor, norm_factor: float = 1.0) -> Tensor:
    """Attention without clusters, for comparison: (R, N, d), (R, M, d), (R, M, e) to (R, N, e)."""
    return (q @ k.mT / norm_factor).softmax(-1) @ v


class ClusterSizeError(UsageError):
    """Queries and keys of a batch that clusters of these sizes cannot share out."""


def cluster_lengths(tokens: tuple[int, int], sizes: tuple[int, int], lists: int, *, padded: bool) -> tuple[int, int]:
    """Places that a row's queries and keys take in the list of clusters.

    Args:
        tokens: queries and keys of a row, N and M.
        sizes: c_q and c_k.
        lists: rows times rounds, T R.
        padded: whether each row is filled up to whole clusters.

    Returns:
        N and M, or the next multiples of the sizes.

    Raises:
        ClusterSizeError: if queries and keys do not give the same clusters.
    """
    (N, M), (c_q, c_k) = tokens, sizes
    if padded:
        if -(-N // c_q) != -(-M // c_k):
            raise ClusterSizeError(
                f"{N} queries in clusters of {c_q} and {M} keys in clusters of {c_k} (--smyrf_q_cluster_size, "
                f"--smyrf_k_cluster_size) do not make as many clusters: {-(-N // c_q)} and {-(-M // c_k)}"
            )
        return -(-N // c_q) * c_q, -(-M // c_k) * c_k
    if N // c_q != M // c_k:
        raise ClusterSizeError(
            f"{N} queries in clusters of {c_q} and {M} keys in clusters of {c_k} (--smyrf_q_cluster_size, "
            f"--smyrf_k_cluster_size) do not make as many clusters: {N // c_q} and {M // c_k}"
        )
    if lists * N % c_q or lists * M % c_k or lists * N // c_q != lists * M // c_k:
        raise ClusterSizeError(
            f"rounds x images x heads x tokens = {lists * N} (queries), {lists * M} (keys) must be multiples of the "
            f"cluster sizes {c_q}, {c_k} (--smyrf_q_cluster_size, --smyrf_k_cluster_size) and give as many clusters; "
            "a divisor of the rounds (--smyrf_n_hashes) always does, and so does padded=True (--smyrf_padded)"
        )
    return N, M


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order_q: Tensor,
    order_k: Tensor,
    sizes: tuple[int, int],
    *,
    norm_factor: float = 1.0,
    dropout: float = 0.0,
    padded: bool = False,
) -> Tensor:
    """``attend_in_clusters``, by the compiled operator where it is built and fits: float32 on a CPU, no gradients."""
    width = q.shape[2]
    if (
        library.serves(q.device, "attend_in_clusters")
        and q.dtype in COMPILED_DTYPES
        and width == v.shape[2]
        and width % COMPILED_WIDTHS[0] == 0
        and width <= COMPILED_WIDTHS[1]
        and not dropout
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    ):
        cluster_lengths((q.shape[1], k.shape[1]), sizes, order_q.shape[0] * q.shape[0], padded=padded)
        operator = getattr(torch.ops, library.NAMESPACE).attend_in_clusters
        out = operator(q.float(), k.float(), v.float(), order_q, order_k, *sizes, 1 / norm_factor, padded)
        return out.to(q.dtype)
    return attend_in_clusters(q, k, v, order_q, order_k, sizes, norm_factor=norm_factor, dropout=dropout, padded=padded)


def attend_in_clusters(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order_q: Tensor,
    order_k: Tensor,
    sizes: tuple[int, int],
    *,
    norm_factor: float = 1.0,
    dropout: float = 0.0,
    padded: bool = False,
) -> Tensor:
    """Attention inside the clusters of all rounds, combined over the rounds.

    A few rounds are computed at once and joined to the earlier ones by their mass, so memory does not grow with T.

    Args:
        q, k, v: (R, N, d), (R, M, d), (R, M, e).
        order_q, order_k: tokens by rank, (T, R, N) and (T, R, M).
        sizes: c_q and c_k.
        norm_factor: divisor of the logits.
        dropout: rate at the weights.
        padded: keep rows apart.

    Returns:
        (R, N, e).

    Raises:
        ValueError: if the sizes do not fit; see ``cluster_lengths``.
    """
    (T, R, N), M, (c_q, c_k) = order_q.shape, order_k.shape[2], sizes
    length_q, length_k = cluster_lengths((N, M), sizes, T * R, padded=padded)
    first = torch.arange(R, device=q.device)[:, None]  # of each row
    places = torch.empty_like(order_q).scatter_(2, order_q, torch.arange(N, device=q.device).expand_as(order_q))
    places = (places + first * length_q).contiguous()  # of each query in its round's list, (T, R, N)
    mask = None
    if padded:
        order_q, order_k = F.pad(order_q, (0, length_q - N)), F.pad(order_k, (0, length_k - M))  # any token will do
        mask = torch.zeros(length_k, dtype=torch.bool, device=q.device)
        mask[M:] = True
        mask = mask.view(1, -1, 1, c_k)  # (1, clusters, 1, c_k)
    order_q, order_k = order_q + first * N, order_k + first * M
    precise = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.reshape(-1, x.shape[-1]) for x in (q / norm_factor, k, v))
    mass = out = None
    for part in _parts(T, R, (length_q, length_k), sizes, v.shape[-1], q.device.type):
        clusters_q, clusters_k = order_q[part].flatten(), order_k[part].flatten()
        Q, K, V = q.index_select(0, clusters_q), k.index_select(0, clusters_k), v.index_select(0, clusters_k)
        logits = (Q.view(-1, c_q, Q.shape[1]) @ K.view(-1, c_k, K.shape[1]).mT).to(precise)  # (clusters, c_q, c_k)
        if mask is not None:
            logits = logits.view(-1, mask.shape[1], c_q, c_k).masked_fill(mask, -math.inf).view_as(logits)
        highest = logits.detach().amax(2, keepdim=True)
        weights = (logits - highest).exp()
        total = weights.sum(2, keepdim=True)
        if dropout:
            weights = F.dropout(weights, dropout)
        attended = (weights.to(V.dtype) @ V.view(-1, c_k, V.shape[1])).to(precise) / total
        rounds = order_q[part].shape[0]
        index = places[part] + R * length_q * torch.arange(rounds, device=q.device)[:, None, None]
        o = attended.flatten(0, 1).index_select(0, index.flatten()).view(rounds, R * N, v.shape[1])
        z = (highest + total.log()).flatten().index_select(0, index.flatten()).view(rounds, R * N, 1)
        new_mass = z.logsumexp(0) if mass is None else torch.logaddexp(mass, z.logsumexp(0))
        new = ((z - new_mass).exp() * o).sum(0)
        out = new if out is None or mass is None else out * (mass - new_mass).exp() + new
        mass = new_mass
    assert out is not None
    return out.view(R, N, v.shape[1]).to(v.dtype)


def _parts(
    T: int, R: int, lengths: tuple[int, int], sizes: tuple[int, int], width: int, device_type: str
) -> list[slice]:
    """Rounds that are computed at once: as many as ``MAX_ELEMENTS`` allows, cut where clusters end."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():  # for any number of rows
        return [slice(0, T)]
    unit = math.lcm(*(size // math.gcd(R * length, size) for length, size in zip(lengths, sizes, strict=True)))
    elements = R * max(max(lengths) * width, lengths[0] * sizes[1])
    at_once = max(MAX_ELEMENTS.get(device_type, DEFAULT_MAX_ELEMENTS) // max(elements * unit, 1), 1) * unit
    return [slice(start, start + at_once) for start in range(0, T, at_once)]


class SmyrfAttention(nn.Module):
    """Attention inside clusters. It has no parameters.

    Args:
        n_hashes: rounds T.
        q_cluster_size, k_cluster_size: c_q and c_k, unless the next two are given.
        q_attn_size, k_attn_size: c_q and c_k.
        clustering_algo: "lsh" is the only one.
        dropout: rate at the weights in training.
        r: range of the offset beta; it has no influence.
        max_iters: of a clustering algorithm that does not exist; ignored.
        padded: keep rows apart; see the top of this file.

    Attributes:
        generator: for the random projections; None for torch's default one.

    Raises:
        ValueError: if a number is below 1.
        NotImplementedError: for another algorithm.
    """

    def __init__(
        self,
        n_hashes: int,
        q_cluster_size: int,
        k_cluster_size: int,
        q_attn_size: int | None = None,
        k_attn_size: int | None = None,
        clustering_algo: str = "lsh",
        dropout: float = 0.0,
        r: float = 1,
        max_iters: int = 50,
        *,
        padded: bool = False,
    ) -> None:
        super().__init__()
        if clustering_algo != "lsh":
            raise NotImplementedError(f"clustering_algo must be 'lsh', got {clustering_algo!r}")
        self.q_attn_size = q_cluster_size if q_attn_size is None else q_attn_size
        self.k_attn_size = k_cluster_size if k_attn_size is None else k_attn_size
        for name, value in (
            ("n_hashes (--smyrf_n_hashes)", n_hashes),
            ("q_cluster_size (--smyrf_q_cluster_size)", self.q_attn_size),
            ("k_cluster_size (--smyrf_k_cluster_size)", self.k_attn_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.n_hashes = n_hashes
        self.dropout, self.r, self.padded = dropout, r, padded
        self.generator: torch.Generator | None = None

    def extra_repr(self) -> str:
        return (
            f"n_hashes={self.n_hashes}, q_attn_size={self.q_attn_size}, k_attn_size={self.k_attn_size}, "
            f"padded={self.padded}"
        )

    def draw(self, dim: int, n_hashes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random directions alpha (dim, n_hashes), then offsets beta (1, n_hashes); replace it to supply them.

        One call per forward pass, which serves queries and keys; ``dim`` is d + 2. Drawn in float32 whatever ``dtype``
        is.
        """
        alpha, beta = draw_projections((dim, n_hashes), (1, n_hashes), device, self.generator)
        return alpha.to(dtype), (self.r * beta).to(dtype)

    def orders(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Order of queries and keys in each round, (T, R, N) and (T, R, M), in float32 at least."""
        precise = torch.promote_types(queries.dtype, torch.float32)
        with torch.no_grad(), without_autocast(queries):
            alpha, beta = self.draw(queries.shape[-1] + EXTRA_CHANNELS, self.n_hashes, queries.device, precise)
            return lsh_clustering(queries.to(precise), keys.to(precise), alpha.reshape(-1, self.n_hashes), beta)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attn_mask: Tensor | None = None,
        norm_factor: float = 1.0,
        return_attn_map: bool = False,
        dropout: float | None = None,
    ) -> Any:
        """Attend.

        Args:
            queries, keys, values: (R, N, d), (R, M, d), (R, M, e).
            attn_mask: must be None.
            norm_factor: divisor of the logits.
            return_attn_map: return ``(out, (order_q, order_k))``, the orders (T, R, N) and (T, R, M).
            dropout: rate at the weights; None for the one of the constructor, in training.

        Returns:
            (R, N, e).

        Raises:
            ValueError: for a mask, or if the sizes do not fit.
        """
        if attn_mask is not None:
            raise ValueError("SMYRF attention has no masks: they have no meaning inside sorted clusters")
        sizes = (self.q_attn_size, self.k_attn_size)
        lists = self.n_hashes * queries.shape[0]
        cluster_lengths((queries.shape[1], keys.shape[1]), sizes, lists, padded=self.padded)
        order_q, order_k = self.orders(queries, keys)
        if dropout is None:
            dropout = self.dropout if self.training else 0.0
        out = attend(
            queries,
            keys,
            values,
            order_q,
            order_k,
            sizes,
            norm_factor=norm_factor,
            dropout=dropout,
            padded=self.padded,
        )
        return (out, (order_q, order_k)) if return_attn_map else out

    def published_ops(self, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """The published formula for self-attention: lift, project, attend in clusters, combine.

        2RN(d+2)T + 2TRNcd multiply-accumulates; div RTNc; sub 2RN + RTNc + RTN; dropout RTNc; add 5RTN; mul TRNd, c
        being the keys of a cluster. The two extra channels of the lift are not multiplied out here. Exponentials,
        sorting and gathering are not counted. With padding the clusters are the published ones and more.
        """
        R, N, d = args[0].shape
        T = self.n_hashes
        places = -(-N // self.q_attn_size) * self.q_attn_size if self.padded else N
        pairs = R * T * places * self.k_attn_size
        return OpCounts(
            matmul=2 * R * N * (d + EXTRA_CHANNELS) * T + 2 * pairs * d,
            div=pairs,
            sub=2 * R * N + pairs + R * T * N,
            dropout=pairs,
            add=5 * R * T * N,
            mul=T * R * N * d,
        )
