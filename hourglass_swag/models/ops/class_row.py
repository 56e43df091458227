"""The class token's row of an attention: what EViT, Evo-ViT and ATS rank patches by. One small product."""

import torch
from torch import Tensor


def class_row_logits(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Logits of token 0, (B, h, 1, N); q and k are (B, h, N, d), the scale d^-0.5 if None."""
    return (q[:, :, :1] * (q.shape[3] ** -0.5 if scale is None else scale)) @ k.mT


def score_class_row(q: Tensor, k: Tensor, scale: float | None = None, key_bias: Tensor | None = None) -> Tensor:
    """Attention of token 0 to every token, (B, N), averaged over heads, in float32 at least; the bias is (B, N)."""
    logits = class_row_logits(q, k, scale)
    logits = logits if key_bias is None else logits + key_bias[:, None, None]
    return logits.softmax(dim=3, dtype=torch.promote_types(q.dtype, torch.float32)).mean(1)[:, 0]
