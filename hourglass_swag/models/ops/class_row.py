"""The class token's row of an attention: what EViT, Evo-ViT and ATS rank patches by. One small product."""

import torch
from torch import Tensor


def class_row_logits(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Logits of token 0, (B, h, 1, N); q and k are (B, h, N, d), the scale d^-0.5 if None."""
    return (q[:, :, :1] * (q.shape[3] ** -0.5 if scale is None else scale)) @ k.mT


def score_class_row(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Attention of token 0 to every token, averaged over heads, (B, N), in float32 at least."""
    logits = class_row_logits(q, k, scale)
    return logits.softmax(dim=3, dtype=torch.promote_types(q.dtype, torch.float32)).mean(1)[:, 0]
