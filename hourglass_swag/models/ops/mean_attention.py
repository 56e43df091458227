"""Mean attention that every key receives, over all heads and queries, as a GPU kernel that stores no N x N map.

The plain form writes and reads the map of every head five times, which costs more time than the attention itself. Here
one pass over the keys finds the logarithm of every query's softmax sum, and a second one, over the queries, adds up

    score[j] = 1 / (h N) sum over heads and queries i of exp(a[i,j] - log sum_j' exp(a[i,j']))

Both make the product of queries and keys, in tiles on the chip. Written in Triton, which comes with PyTorch for CUDA;
where it is missing, on other devices, in float32 and for gradients there is ``attend_and_score`` of ``models/evit.py``.

Letters: B images, h heads, N tokens, d channels of a head.
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from common.measure.flops import CUSTOM_OPERATORS

DTYPES = (torch.float16, torch.bfloat16)  # in float32 the repeated product costs more than the map
HAS_TRITON = find_spec("triton") is not None
MAX_CHANNELS = 128  # of a head: a tile of queries and one of keys stay on the chip


def has_kernel(q: Tensor, k: Tensor) -> bool:
    """Whether ``mean_attention`` takes these queries and keys: on a GPU, in half precision, without gradients."""
    wants_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return q.is_cuda and q.dtype in DTYPES and q.shape[3] <= MAX_CHANNELS and not wants_gradient and HAS_TRITON


@torch.library.custom_op("leanvit::mean_attention", mutates_args=())
def mean_attention(q: Tensor, k: Tensor) -> Tensor:
    """Mean over heads and queries of softmax(q k^T / sqrt(d)).

    Args:
        q, k: queries and keys, (B, h, N, d), with channels next to each other in memory.

    Returns:
        (B, N), float32.
    """
    from hourglass_swag.models.ops import mean_attention_triton as kernels

    batch, heads, tokens, channels = q.shape
    sums = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    scores = torch.empty_like(sums)
    grid = (math.ceil(tokens / kernels.TILE), batch * heads)
    shape: list[Any] = [heads, tokens, channels**-0.5 * math.log2(math.e), *q.stride()[:3], *k.stride()[:3]]
    options = kernels.options(channels)
    kernels.log_sums[grid](q, k, sums, *shape, **options)
    kernels.column_sums[grid](q, k, sums, scores, *shape, **options)
    return scores.sum(1) / (heads * tokens)


@mean_attention.register_fake
def _(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)


CUSTOM_OPERATORS["leanvit::mean_attention"] = lambda args, result: 2 * args[0].numel() * args[1].shape[2]
