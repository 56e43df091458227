"""The class token's row of an attention: what EViT, Evo-ViT and ATS rank patches by. One small product."""

import torch
from torch import Tensor


def class_row_logits(q: Tensor, k: Tensor) -> Tensor:
    """Logits of token 0, (B, h, 1, N); q and k are (B, h, N, d)."""
    return (q[:, :, :1] * q.shape[3] ** -0.5) @ k.mT


def score_class_row(q: Tensor, k: Tensor) -> Tensor:
    """Attention of token 0 to every token, averaged over heads, (B, N), in float32 at least."""
    logits = class_row_logits(q, k)
    return logits.softmax(dim=3, dtype=torch.promote_types(q.dtype, torch.float32)).mean(1)[:, 0]
