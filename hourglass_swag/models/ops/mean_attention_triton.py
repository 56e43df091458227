"""The two kernels of ``mean_attention``; imported when first used, because Triton is not everywhere."""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# A kernel is a program for Triton's compiler, which finds the types of its arguments when it is called.

from typing import Any

import triton
import triton.language as tl

TILE = 128  # queries or keys that a program keeps
STEP = 64  # of the others that it meets at a time


def options(channels: int) -> dict[str, Any]:
    """Compile-time arguments for heads of ``channels``."""
    return {
        "channels": channels,
        "WIDTH": max(triton.next_power_of_2(channels), 16),
        "TILE": TILE,
        "STEP": STEP,
        "num_warps": 4 if channels <= 64 else 8,
    }


@triton.jit
def load_rows(base, rows, tokens, stride, channels: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a (tokens, channels) matrix, (len(rows), WIDTH), zero beyond either side."""
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < tokens) & (columns[None, :] < channels)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def log_sums(
    q,
    k,
    sums,
    heads,
    tokens,
    scale,
    q_image,
    q_head,
    q_token,
    k_image,
    k_head,
    k_token,
    channels: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Base-2 logarithm of every query's sum of 2^logit, for a tile of queries of one head; q k^T times ``scale``."""
    head = tl.program_id(1).to(tl.int64)
    q += (head // heads) * q_image + (head % heads) * q_head
    k += (head // heads) * k_image + (head % heads) * k_head
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    queries = load_rows(q, rows, tokens, q_token, channels, WIDTH)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, tokens, STEP):
        columns = start + tl.arange(0, STEP)
        keys = load_rows(k, columns, tokens, k_token, channels, WIDTH)
        logits = tl.dot(queries, tl.trans(keys)) * scale
        logits = tl.where(columns[None, :] < tokens, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)
        largest = larger
    tl.store(sums + head * tokens + rows, largest + tl.log2(total), mask=rows < tokens)


@triton.jit
def column_sums(
    q,
    k,
    sums,
    scores,
    heads,
    tokens,
    scale,
    q_image,
    q_head,
    q_token,
    k_image,
    k_head,
    k_token,
    channels: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sum over all queries of the softmax weights of a tile of keys of one head."""
    head = tl.program_id(1).to(tl.int64)
    q += (head // heads) * q_image + (head % heads) * q_head
    k += (head // heads) * k_image + (head % heads) * k_head
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    keys = load_rows(k, columns, tokens, k_token, channels, WIDTH)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, tokens, STEP):
        rows = start + tl.arange(0, STEP)
        queries = load_rows(q, rows, tokens, q_token, channels, WIDTH)
        # beyond the last query the sum is infinite, so that its weights are zero
        row_sums = tl.load(sums + head * tokens + rows, mask=rows < tokens, other=float("inf"))
        logits = tl.dot(keys, tl.trans(queries)) * scale
        total += tl.sum(tl.exp2(logits - row_sums[None, :]), 1)
    tl.store(scores + head * tokens + columns, total, mask=columns < tokens)
