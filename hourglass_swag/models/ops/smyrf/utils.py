"""Asymmetric clustering of queries and keys by locality-sensitive hashing.

Paper: SMYRF: Efficient Attention using Asymmetric Clustering, arXiv:2010.05315, section 3. Written from the formulas.

Letters: R rows (images x heads), N tokens, d channels of a head, T hash rounds. MQ and MK are the largest norms of a
row's queries and keys.

    q^ = [q, 0, sqrt(MQ^2 + MK^2 - |q|^2)],   k^ = [k, sqrt(MQ^2 + MK^2 - |k|^2), 0]
    u[t, n] = x^[n] . alpha[t] + beta[t],      alpha ~ N(0, 1)^(d + 2), beta ~ U[0, r)

q^ . k^ = q . k, and all q^ (and all k^) of a row have the same norm, so a large inner product is a small distance.
Sorting u needs no division by the width r and no rounding, and beta cannot change the order.
"""

import torch
from torch import Tensor

from hourglass_swag.models.ops import library

EXTRA_CHANNELS = 2  # of the lifted vectors


class XBOXPLUS:
    """The lift, for queries (R, N, d) and keys (R, M, d) that are to be compared.

    Source: SMYRF, arXiv:2010.05315, asymmetric transformations: F(q) = [q, 0, sqrt(M_Q^2 + M_K^2
    - |q|^2)], G(k) = [k, sqrt(M_Q^2 + M_K^2 - |k|^2), 0].
    """

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self.queries, self.keys = queries, keys
        squared_q, squared_k = queries.square().sum(-1), keys.square().sum(-1)  # (R, N), (R, M)
        total = squared_q.amax(-1, keepdim=True) + squared_k.amax(-1, keepdim=True)  # MQ^2 + MK^2, (R, 1)
        self.extra_q, self.extra_k = (total - squared_q).sqrt(), (total - squared_k).sqrt()

    def Q(self) -> Tensor:
        """q^, (R, N, d + 2)."""
        extra = self.extra_q[..., None]
        return torch.cat([self.queries, torch.zeros_like(extra), extra], dim=-1)

    def K(self) -> Tensor:
        """k^, (R, M, d + 2)."""
        extra = self.extra_k[..., None]
        return torch.cat([self.keys, extra, torch.zeros_like(extra)], dim=-1)


class E2LSH:
    """Projections on T random lines.

    Args:
        alpha: directions, (D, T).
        beta: offsets, T numbers of any shape.
    """

    def __init__(self, alpha: Tensor, beta: Tensor) -> None:
        self.alpha, self.beta = alpha, beta.reshape(-1)

    def __call__(self, vectors: Tensor) -> Tensor:
        """u of vectors (R, N, D), (T, R, N)."""
        return (vectors @ self.alpha + self.beta).permute(2, 0, 1)


def sort_rows(values: Tensor) -> Tensor:
    """``values.argsort(-1)``, by the compiled operator where it is built: a float32 radix sort on a CPU."""
    if values.dtype == torch.float32 and library.serves(values.device, "sort_rows"):
        return getattr(torch.ops, library.NAMESPACE).sort_rows(values)
    return values.argsort(-1)


@torch.no_grad()
def lsh_clustering(queries: Tensor, keys: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Order of queries and keys along each random line.

    Args:
        queries, keys: (R, N, d) and (R, M, d).
        alpha: (d + 2, T); beta: T numbers.

    Returns:
        Positions by ascending u, (T, R, N) and (T, R, M).

    Source: SMYRF, arXiv:2010.05315, adaptive clustering: equal parts of the order along random lines.
    """
    lift, dim = XBOXPLUS(queries, keys), queries.shape[-1]
    lines, offset = alpha.mT, beta.reshape(-1, 1)  # (T, d + 2), (T, 1)
    orders: list[Tensor] = []
    for vectors, extra, channel in ((queries, lift.extra_q, dim + 1), (keys, lift.extra_k, dim)):
        values = lines[:, :dim] @ vectors.mT + lines[:, channel, None] * extra[:, None] + offset  # (R, T, N)
        orders.append(sort_rows(values).transpose(0, 1))
    return orders[0], orders[1]
