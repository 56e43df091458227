"""Token encoder of T2T-ViT with positive random features: attention whose cost is linear in the number of tokens.

Papers: T2T-ViT, arXiv:2101.11986; random features: Performer, arXiv:2009.14794.

Shapes: B batch, T tokens, e width inside, m random features.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from common.measure import flops
from common.measure.flops import OpCounts

EPSILON = 1e-8
"""Added to the denominator of the attention."""


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Full precision inside, on the device of ``x``; the meta device knows no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Token_performer(nn.Module):
    """One layer of linear attention; its skip connection starts at the values, as input and output differ in width.

    Args:
        dim: width of the input.
        in_dim: e, width of the output.
        kernel_ratio: m as a share of e.
        dp1, dp2: dropout of the attention and of the MLP, on in training whatever the network's dropout is.
    """

    def __init__(self, dim: int, in_dim: int, kernel_ratio: float = 0.5, dp1: float = 0.1, dp2: float = 0.1) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.m = int(in_dim * kernel_ratio)
        self.w = nn.Parameter(torch.empty(self.m, in_dim), requires_grad=False)
        nn.init.orthogonal_(self.w).mul_(math.sqrt(self.m))
        self.kqv = nn.Linear(dim, 3 * in_dim)
        self.dp = nn.Dropout(dp1)
        self.proj = nn.Linear(in_dim, in_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(in_dim)
        self.mlp = nn.Sequential(nn.Linear(in_dim, in_dim), nn.GELU(), nn.Linear(in_dim, in_dim), nn.Dropout(dp2))

    def prm_exp(self, x: Tensor) -> Tensor:
        """Positive random features ``exp(x w^T - |x|^2 / 2) / sqrt(m)``: (B, T, e) -> (B, T, m)."""
        norms = x.square().sum(dim=-1, keepdim=True) / 2
        return torch.exp(x @ self.w.to(x.dtype).T - norms) / math.sqrt(self.m)

    def attend(self, x: Tensor) -> Tensor:
        """Linear attention of normalised tokens, (B, T, dim) -> (B, T, e).

        From the features on, float32 at least, also under autocast: exp() overflows in half precision.
        """
        k, q, v = self.kqv(x).split(self.in_dim, dim=-1)  # in this order in the published weights
        exact = torch.promote_types(v.dtype, torch.float32)
        with without_autocast(x):
            kp, qp = self.prm_exp(k.to(exact)), self.prm_exp(q.to(exact))  # (B, T, m)
            denominator = qp @ kp.sum(dim=1)[..., None] + EPSILON  # (B, T, 1)
            summary = kp.transpose(1, 2) @ v.to(exact)  # (B, m, e)
            attended = (qp @ summary / denominator).to(v.dtype)
        return v + self.dp(self.proj(attended))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(self.norm1(x))
        return y + self.mlp(self.norm2(y))

    def count_ops(self, tokens: int) -> OpCounts:
        """Operations for one picture of ``tokens`` tokens."""
        e, m = self.in_dim, self.m
        return (
            flops.layer_norm(tokens * self.kqv.in_features)
            + flops.linear(tokens, self.kqv.in_features, 3 * e)
            + 2 * flops.matmul(1, tokens, m, e)  # the features of keys and queries
            + flops.elementwise("exp", 2 * tokens * m)
            + flops.matmul(1, tokens, 1, m)  # the denominator
            + 2 * flops.matmul(1, tokens, m, e)  # the summary, and what the queries take from it
            + flops.linear(tokens, e, e)
            + flops.layer_norm(tokens * e)
            + 2 * flops.linear(tokens, e, e)
            + flops.gelu(tokens * e)
        )
