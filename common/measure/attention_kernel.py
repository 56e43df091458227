"""Fused attention with a bias per key, for half precision on NVIDIA GPUs: forward only, written in Triton.

torch's flash kernel takes no bias, and cuDNN's takes two to three times as long with one as without. A bias per key
costs nothing here: it is read with the keys, and it is also what masks the places behind the last key.

Letters: B images, h heads, N queries, M keys, d channels of a head, split as D0 + D1 into two powers of two.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# A kernel is a program for Triton's compiler, which finds the types of its arguments when it is called.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 128
LOG2E = 1.4426950408889634


@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_bias,
    heads, queries, keys, scale,
    D0: tl.constexpr, D1: tl.constexpr, D1_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all keys."""
    block, row = tl.program_id(0), tl.program_id(1)
    image, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    q_ptr += image * stride_qb + head * stride_qh
    k_ptr += image * stride_kb + head * stride_kh
    v_ptr += image * stride_vb + head * stride_vh
    out_ptr += image * stride_ob + head * stride_oh
    bias_ptr += image * stride_bias
    m, n = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d0, d1 = tl.arange(0, D0), D0 + tl.arange(0, D1_PAD)
    rows = (m < queries)[:, None]
    q0 = tl.load(q_ptr + m[:, None] * stride_qn + d0[None, :], mask=rows, other=0.0)
    q1 = q0
    if D1 > 0:
        q1 = tl.load(q_ptr + m[:, None] * stride_qn + d1[None, :], mask=rows, other=0.0)
    k0_ptr, k1_ptr = k_ptr + n[None, :] * stride_kn + d0[:, None], k_ptr + n[None, :] * stride_kn + d1[:, None]
    v0_ptr, v1_ptr = v_ptr + n[:, None] * stride_vn + d0[None, :], v_ptr + n[:, None] * stride_vn + d1[None, :]
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out0, out1 = tl.zeros([BLOCK_M, D0], tl.float32), tl.zeros([BLOCK_M, D1_PAD], tl.float32)
    # One loop whose loads are all masked: with the last keys in a branch behind it, Triton 3.6 computed widths of two
    # parts wrongly on an H200 (a relative error of 0.03), and was not faster.
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < keys
        k0 = tl.load(k0_ptr + start * stride_kn, mask=inside[None, :], other=0.0)
        scores = tl.dot(q0, k0)
        if D1 > 0:
            k1 = tl.load(k1_ptr + start * stride_kn, mask=inside[None, :], other=0.0)
            scores += tl.dot(q1, k1)
        bias = tl.load(bias_ptr + n, mask=inside, other=-float("inf"))
        scores = scores * scale + bias[None, :]
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_highest[:, None])
        shrink = tl.math.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        highest = new_highest
        v0 = tl.load(v0_ptr + start * stride_vn, mask=inside[:, None], other=0.0)
        weights = weights.to(v0.dtype)
        out0 = tl.dot(weights, v0, out0 * shrink[:, None])
        if D1 > 0:
            v1 = tl.load(v1_ptr + start * stride_vn, mask=inside[:, None], other=0.0)
            out1 = tl.dot(weights, v1, out1 * shrink[:, None])
    out0 = out0 / total[:, None]
    tl.store(out_ptr + m[:, None] * stride_on + d0[None, :], out0.to(out_ptr.dtype.element_ty), mask=rows)
    if D1 > 0:
        out1 = out1 / total[:, None]
        tl.store(out_ptr + m[:, None] * stride_on + d1[None, :], out1.to(out_ptr.dtype.element_ty), mask=rows)


def split_width(width: int) -> tuple[int, int] | None:
    """Two powers of two of at least 16 (the second may be 0) that make up a head's width; None if there are none."""
    first = 1 << (width.bit_length() - 1)
    second = width - first
    if first < 16 or width > MAX_WIDTH or second & (second - 1) or 0 < second < 16:
        return None
    return first, second


def launch(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float, **options: Any) -> Tensor:
    """Attention (B, h, N, d) of queries (B, h, N, d), keys and values (B, h, M, d), with ``key_bias`` (B, M), finite.

    The result lies as (B, N, h, d) in memory, so that joining the heads copies nothing.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    parts = split_width(width)
    assert parts is not None
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(batch, queries, heads, width, device=q.device, dtype=q.dtype).transpose(1, 2)
    bias = (key_bias.float() * LOG2E).contiguous()
    chosen = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3} | options
    grid = (triton.cdiv(queries, chosen["BLOCK_M"]), batch * heads)
    kernel: Any = _attention
    kernel[grid](
        q, k, v, bias, out,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1),
        v.stride(2), out.stride(0), out.stride(1), out.stride(2), keys,
        heads, queries, keys, scale * LOG2E,
        D0=parts[0], D1=parts[1], D1_PAD=max(parts[1], 16), **chosen,
    )  # fmt: skip
    return out
