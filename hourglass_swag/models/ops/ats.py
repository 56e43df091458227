"""Adaptive token sampling: pick the tokens that the class token needs by inverse transform sampling of their scores.

Paper: Adaptive Token Sampling for Efficient Vision Transformers (ATS), arXiv:2111.15667, section 3. Written from the
formulas; where the implementation behind the published rows on SWAG departs from the paper, the text says so.

Letters: B images, N tokens in, U tokens out, R tokens that entered the network (the reference), h heads, d channels of
a head, C = h d, m the policy: 1 for a token of the image, 0 for padding behind an image that has fewer than others.

    A[i,j] = (e[i,j] + eps / N) / (sum_j e[i,j] + eps),   e[i,j] = exp(a[i,j] - max_j a[i,j]) m[j]   (or 1 for j = i)
    s[j]   = (sum over heads of A[0,j]) |v[j]|, over the patches j, normalised to sum 1
    c      = cumulative sum of s in ascending order, rescaled to [0, 1]
    u[t]   = y0 + t (1 - y0) / (R - 2),  t = 0 ... R - 2,  y0 the smallest c above 0

The patches whose c is nearest to some u survive, in ascending order of s, behind the class token. Only the class row of
A is needed to choose, and only the survivors' rows to go on, so no N x N map is made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hourglass_swag.models.ops.class_row import class_row_logits

EPS = 1e-6


def softmax_with_policy(logits: Tensor, policy: Tensor, eps: float = EPS) -> Tensor:
    """Softmax over the tokens of the image, smoothed: A of this file's head, in float32 at least.

    Args:
        logits: a, (B, h, Q, N), rows of the first Q tokens.
        policy: m, (B, N, 1).
        eps: smoothing; with it A is not quite a softmax even if nothing is masked.

    Returns:
        A, (B, h, Q, N).
    """
    queries, tokens = logits.shape[2:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = torch.eye(queries, tokens, dtype=torch.bool, device=logits.device)
    allowed = (policy.view(-1, 1, 1, tokens) > 0) | own
    weights = (logits - logits.amax(3, keepdim=True)).exp() * allowed
    return (weights + eps / tokens) / (weights.sum(3, keepdim=True) + eps)


def score_assignment_step(attention: Tensor, values: Tensor, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Scores s of the patches, ascending.

    Args:
        attention: A, (B, h, Q, N), of which the first row counts.
        values: v, (B, h, N, d), zero for padding.
        prefix: tokens in front that are no patches.

    Returns:
        Sorted scores (B, P) of P patches, and which they belong to, 0 ... P - 1, (B, P).

    Source: ATS, arXiv:2111.15667, Section 3, Adaptive Token Sampler: S_j = A_1j |V_j| / sum_i A_1i |V_i|.
    """
    length = torch.linalg.vector_norm(values, dim=(1, 3), dtype=attention.dtype)  # |v| over all C channels, (B, N)
    scores = (attention[:, :, 0].sum(1) * length)[:, prefix:]
    return tuple((scores / scores.sum(1, keepdim=True)).sort(dim=1))  # pyright: ignore[reportReturnType]


def score_patches(logits: Tensor, values: Tensor, policy: Tensor, prefix: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """``score_assignment_step`` without smoothing, and with padding that scores 0, before all patches.

    Args:
        logits: of the class token, (B, h, 1, N).
        values: v, (B, h, N, d).
        policy: m, (B, N, 1).
        prefix: tokens in front that are no patches.

    Returns:
        Sorted scores, and which they belong to, (B, P) each; how many of them are padding, (B, 1).
    """
    absent = policy[..., 0] == 0  # (B, N)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    row = logits.masked_fill(absent[:, None, None], -torch.inf).softmax(3)
    length = torch.linalg.vector_norm(values, dim=(1, 3), dtype=row.dtype)
    scores = (row[:, :, 0].sum(1) * length)[:, prefix:].masked_fill(absent[:, prefix:], -1)
    scores, order = scores.sort(dim=1)
    scores = scores.clamp_min(0)
    total = scores.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return (scores / total, order), absent[:, prefix:].sum(1, keepdim=True)


def normalized_cdf(sorted_scores: Tensor) -> Tensor:
    """c of sorted scores s (B, N - 1): from 0 for the lowest score to 1 for the highest."""
    cdf = sorted_scores.cumsum(1)
    lowest, highest = cdf[:, :1], cdf[:, -1:]
    return (cdf - lowest) / (highest - lowest).clamp_min(torch.finfo(cdf.dtype).tiny)


def create_ys(cdf: Tensor, n_ref_tokens: int) -> Tensor:
    """Sampling points u (B, R - 1) for c (B, N - 1). There are always R - 1, however few tokens are left."""
    start = cdf.masked_fill(cdf == 0, 1.0).amin(1, keepdim=True)  # y0
    steps = torch.arange(n_ref_tokens - 1, device=cdf.device, dtype=cdf.dtype)
    return start + steps * ((1 - start) / max(n_ref_tokens - 2, 1))


def nearest_ranks(cdf: Tensor, ys: Tensor) -> Tensor:
    """Rank of the c (B, N - 1, ascending) nearest to each u (B, R - 1), the lowest of equally near ones."""
    above = _count_below(cdf, ys).clamp_max(cdf.shape[1] - 1)
    below = (above - 1).clamp_min(0)
    left, right = cdf.gather(1, below), cdf.gather(1, above)
    nearest = torch.where(ys - left <= right - ys, left, right)
    return _count_below(cdf, nearest).clamp_max(cdf.shape[1] - 1)  # the first of equal entries; NaN has none


def _count_below(ascending: Tensor, values: Tensor) -> Tensor:
    """How many of a row (B, P) are below each value (B, K)."""
    if torch.onnx.is_in_onnx_export():  # where there is no search
        return (ascending[:, None] < values[..., None]).sum(2)
    return torch.searchsorted(ascending, values)


def get_unique_indices(indices: Tensor, max_value: int, *, lose_one: bool = True) -> Tensor:
    """Distinct entries of each row, ascending, the rest filled with ``max_value``.

    Args:
        indices: whole numbers in 0 ... max_value - 1, (B, K).
        max_value: M.
        lose_one: as in the published code, a row whose largest entry is 1 loses it.

    Returns:
        (B, K).
    """
    present = torch.zeros(indices.shape[0], max_value, dtype=torch.bool, device=indices.device).scatter(
        1, indices, True
    )
    if lose_one and max_value > 1:
        higher = present[:, 2:].any(1, keepdim=True)
        present = torch.cat([present[:, :1], present[:, 1:2] & higher, present[:, 2:]], dim=1)
    numbers = torch.arange(max_value, device=indices.device)
    unique = torch.where(present, numbers, max_value).sort(dim=1).values[:, : indices.shape[1]]
    return F.pad(unique, (0, indices.shape[1] - unique.shape[1]), value=max_value)


def inverse_transform_sampling(
    sorted_scores: Tensor,
    sorted_indices: Tensor,
    n_ref_tokens: int,
    prefix: int = 1,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens that survive.

    Args:
        sorted_scores, sorted_indices: of ``score_assignment_step``, (B, P).
        n_ref_tokens: R.
        prefix: tokens in front that are no patches.
        padding: how many of the lowest scores are those of padding, (B, 1), which is 0 and not sampled among; None for
            the published sampling, where it takes the place of the lowest patch.

    Returns:
        Positions among the N tokens, (B, N): the prefix, then survivors by ascending score, then zeros; and how many
        survive, prefix included, (B,).

    Source: ATS, arXiv:2111.15667, Section 3, Adaptive Token Sampler: inverse transform sampling of the cumulative sum.
    """
    patches = sorted_scores.shape[1]
    if padding is not None:  # the lowest patch counts for nothing, as it does without padding
        sorted_scores = sorted_scores.scatter(1, padding.clamp_max(patches - 1), 0)
    cdf = normalized_cdf(sorted_scores)
    ranks = nearest_ranks(cdf, create_ys(cdf, n_ref_tokens))
    ranks = ranks if padding is None else (ranks - padding).clamp_min(0)
    ranks = get_unique_indices(ranks, patches, lose_one=padding is None)[:, :patches]
    ranks = F.pad(ranks, (0, patches - ranks.shape[1]), value=patches)
    ranks = ranks if padding is None else (ranks + padding).clamp_max(patches)
    positions = F.pad(sorted_indices + prefix, (0, 1)).gather(1, ranks)  # rank P is no token
    first = torch.arange(prefix, device=positions.device).expand(positions.shape[0], -1)
    return torch.cat([first, positions], dim=1), prefix + (ranks < patches).sum(1)


def find_samplers(sorted_scores: Tensor, order: Tensor, places: Tensor, policy: Tensor | None, prefix: int) -> Tensor:
    """Which sampled token a point at each token's own c would have sampled: the nearest c, the lower of equally near.

    Args:
        sorted_scores, order: of ``score_assignment_step``, (B, P).
        places: of the sampled tokens among the N, the prefix first, (B, U).
        policy: 1 for them, 0 for padding, (B, U, 1); None without padding.
        prefix: tokens in front that are no patches.

    Returns:
        For every token one of the U, (B, N): sampled tokens and the prefix themselves.

    Source: ATS, arXiv:2111.15667, section 3; that tokens follow the one that is sampled in their place is ours.
    """
    patches = order.shape[1]
    index = places if policy is None else torch.where(policy[..., 0] > 0, places, prefix + patches)
    numbers = torch.arange(places.shape[1], device=places.device).expand_as(places)
    own = numbers.new_full((order.shape[0], prefix + patches + 1), -1).scatter(1, index, numbers)  # -1: not sampled
    own = own[:, prefix:-1].gather(1, order)  # by ascending score
    ranks = torch.arange(patches, device=order.device)
    below = torch.where(own < 0, -1, ranks).cummax(1).values
    above = torch.where(own < 0, patches, ranks).flip(1).cummin(1).values.flip(1)
    cdf = sorted_scores.cumsum(1)
    left, right = cdf.gather(1, below.clamp_min(0)), cdf.gather(1, above.clamp_max(patches - 1))
    lower = (above == patches) | ((below >= 0) & (cdf - left <= right - cdf))
    chosen = own.gather(1, torch.where(lower, below, above).clamp_min(0)).clamp_min(0)  # none sampled: the class token
    return torch.cat([numbers[:, :prefix], torch.zeros_like(order).scatter(1, order, chosen)], dim=1)


def attend_with_policy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    eps: float = EPS,
) -> Tensor:
    """Rows of A times v, for some tokens' queries.

    With p the plain softmax over the image's tokens and z[i] = sum_j e[i,j], a row of A v is

        (z (p v) + eps mean(v)) / (z + eps)

    and z = 1 / max_j p[i,j], but for the published code's maximum, which runs over padding too, whose logits are 0.
    Without padding z >= 1, so that eps changes a result by at most 1e-6 of |mean(v) - p v|, no more than float32
    rounds: fused attention does then, except in float64.

    Args:
        q: (B, h, U, d).
        k, v: (B, h, N, d), v zero for padding.
        policy: m, (B, N, 1); None without padding.
        scale: of the logits; None for d^-0.5.
        dropout: rate at the weights.
        eps: smoothing.

    Returns:
        (B, h, U, d).
    """
    if policy is None and q.dtype != torch.float64:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    logits = (q * (q.shape[3] ** -0.5 if scale is None else scale)) @ k.transpose(2, 3)  # (B, h, U, N)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shift: Tensor | float = 1.0  # z max_j p[i,j]
    if policy is not None:
        padding = policy.view(-1, 1, 1, k.shape[2]) == 0
        logits = logits.masked_fill(padding, -torch.inf)
        largest = logits.amax(3, keepdim=True)
        shift = torch.where(padding.any(3, keepdim=True), -F.relu(-largest), largest.new_zeros(())).exp()
    weights = logits.softmax(3)
    share = eps * weights.amax(3, keepdim=True)
    share = share / (shift + share)  # eps / (z + eps)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.lerp(weights.to(v.dtype) @ v, v.mean(2, keepdim=True), share.to(v.dtype))


@torch.no_grad()
def sample_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    *,
    n_ref_tokens: int,
    drop_tokens: bool,
    prefix: int = 1,
    scale: float | None = None,
    see_padding: bool = True,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Sample among N tokens.

    Args:
        q, k, v: queries, keys, values, (B, h, N, d), keys and values zero for padding that is seen.
        policy: m, (B, N, 1); None without padding.
        n_ref_tokens: R, tokens that enter the network.
        drop_tokens: return only as many rows as the image with most survivors needs, instead of N. Their number is
            read back from the device, which is the only wait for it.
        prefix: tokens in front that are no patches; all of them stay.
        scale: of the logits; None for d^-0.5.
        see_padding: smooth the softmax and sample as published; else an image's tokens do not depend on its padding.

    Returns:
        Where the sampled tokens are among the N, (B, U); their policy (B, U, 1), or None if there is no padding; and
        the sorted scores of the patches and which they belong to, (B, P) each, or None if there is no patch.
    """
    number, fewest = q.shape[2], 0
    if number == prefix:  # no patch is left
        return torch.arange(prefix, device=q.device).expand(q.shape[0], -1), None, None
    logits = class_row_logits(q, k, scale)
    policy = v.new_ones(v.shape[0], number, 1) if policy is None else policy
    if see_padding:
        scored, padding = score_assignment_step(softmax_with_policy(logits, policy), v, prefix), None
    else:
        scored, padding = score_patches(logits, v, policy, prefix)
    positions, counts = inverse_transform_sampling(*scored, n_ref_tokens, prefix, padding)
    if drop_tokens and len(counts):
        fewest, number = torch.stack(torch.aminmax(counts)).tolist()
    if fewest == number:
        return positions[:, :number], None, scored
    numbers = torch.arange(number, device=counts.device)
    return positions[:, :number], (numbers < counts[:, None]).to(v.dtype)[..., None], scored
