"""The three kernels of ``ops``, written in Triton; imported when first used, because Triton is not everywhere.

Letters as in ``merge``: N tokens in, ``a`` of them at even and ``b`` at odd positions, U rows out, r merged away.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# A kernel is a program for Triton's compiler, which finds the types of its arguments when it is called.

import triton
import triton.language as tl


@triton.jit
def load_units(base, positions, tokens, stride_token, stride_channel, channels: tl.constexpr, WIDTH: tl.constexpr):
    """Vectors of length one at ``positions``, (len(positions), WIDTH), float32; zero beyond the last token."""
    columns = tl.arange(0, WIDTH)
    inside = (positions[:, None] < tokens) & (columns[None, :] < channels)
    x = tl.load(base + positions[:, None] * stride_token + columns[None, :] * stride_channel, mask=inside, other=0.0)
    x = x.to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1))
    return x / tl.maximum(length, 1.1754943508222875e-38)[:, None]


@triton.jit
def propose(
    metric, best, partner, tokens, stride_image, stride_token, stride_channel, rows, columns,
    channels: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """For a tile of a-tokens the largest cosine with a b-token, and the number of that b-token.

    The first ``rows`` a-tokens and the first ``columns`` b-tokens take no part.
    """
    image = tl.program_id(1).to(tl.int64)
    metric += image * stride_image
    num_a, num_b = (tokens + 1) // 2, tokens // 2
    a = tl.program_id(0) * TILE + tl.arange(0, TILE)
    units = load_units(metric, 2 * a, tokens, stride_token, stride_channel, channels, WIDTH)
    highest, chosen = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.int64)
    for start in range(0, num_b, STEP):
        b = start + tl.arange(0, STEP)
        others = load_units(metric, 2 * b + 1, tokens, stride_token, stride_channel, channels, WIDTH)
        cosine = tl.dot(units, tl.trans(others), input_precision="ieee")
        cosine = tl.where((b >= columns) & (b < num_b), cosine, float("-inf"))
        largest, place = tl.max(cosine, 1, return_indices=True)
        better = largest > highest
        highest, chosen = tl.where(better, largest, highest), tl.where(better, start + place, chosen)
    highest = tl.where(a < rows, float("-inf"), highest)
    tl.store(best + image * num_a + a, highest, mask=a < num_a)
    tl.store(partner + image * num_a + a, chosen, mask=a < num_a)


@triton.jit
def accept(
    best, partner, keep, source, into, num_a, num_b, r,
    ORDERED: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The r best proposals of an image, equals in their order: positions that stay and leave, and rows joined.

    The a-tokens that stay come first, in their order or (not ORDERED) by falling cosine; then the b-tokens.
    """
    image = tl.program_id(0).to(tl.int64)
    best += image * num_a
    a = tl.arange(0, WIDTH)
    mine = tl.load(best + a, mask=a < num_a, other=float("-inf"))
    rank = tl.zeros([WIDTH], tl.int32)
    for start in range(0, num_a, STEP):
        b = start + tl.arange(0, STEP)
        others = tl.load(best + b, mask=b < num_a, other=float("-inf"))
        ahead = (others[None, :] > mine[:, None]) | ((others[None, :] == mine[:, None]) & (b[None, :] < a[:, None]))
        rank += tl.sum((ahead & (b[None, :] < num_a)).to(tl.int32), 1)
    leaves, stays = (rank < r) & (a < num_a), (rank >= r) & (a < num_a)
    place = rank - r
    if ORDERED:
        place = tl.cumsum(stays.to(tl.int32), 0) - 1
    rows = num_a - r
    keep += image * (rows + num_b)
    b = tl.load(partner + image * num_a + a, mask=leaves, other=0)
    tl.store(source + image * r + rank, 2 * a.to(tl.int64), mask=leaves)
    tl.store(into + image * r + rank, b + rows, mask=leaves)
    tl.store(keep + place, 2 * a.to(tl.int64), mask=stays)
    tl.store(keep + rows + a, 2 * a.to(tl.int64) + 1, mask=a < num_b)


@triton.jit
def average(
    x, size, keep, source, into, out, total, tokens, rows, r, channels,
    MERGED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row: the token that it starts from and those that join it, weighted by their sizes, summed in float32."""
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += image * tokens * channels
    size += image * tokens
    columns = tl.arange(0, WIDTH)
    inside = columns < channels
    first = tl.load(keep + image * rows + row)
    alone = tl.load(x + first * channels + columns, mask=inside, other=0.0)
    weights = tl.load(size + first)
    sums = alone.to(tl.float32) * weights
    pair = tl.arange(0, MERGED)
    joins = (tl.load(into + image * r + pair, mask=pair < r, other=-1) == row).to(tl.int32)
    number = tl.sum(joins, 0)
    position = tl.argmax(joins, 0)
    for _ in range(number):  # pyright: ignore[reportArgumentType] - a scalar of Triton
        token = tl.load(source + image * r + position)
        weight = tl.load(size + token)
        sums += tl.load(x + token * channels + columns, mask=inside, other=0.0).to(tl.float32) * weight
        weights += weight
        joins = tl.where(pair == position, 0, joins)
        position = tl.argmax(joins, 0)
    result = alone
    if number > 0:  # pyright: ignore[reportOperatorIssue]
        result = (sums / weights).to(alone.dtype)
    tl.store(out + (image * rows + row) * channels + columns, result, mask=inside)
    tl.store(total + image * rows + row, weights)
