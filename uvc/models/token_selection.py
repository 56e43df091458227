"""DeiT that selects tokens once before its blocks: one of the pruning baselines in UVC's release.

B batch, T tokens, class token included.
"""

import torch
from torch import Tensor

from uvc.models.deit import GatedDeiT


def select_best_tokens(
    tokens: Tensor, scores: Tensor, *, tau: float, number: int, generator: torch.Generator | None = None
) -> Tensor:
    """Zero all but the best-scored tokens; gradients pass straight through to the scores.

    Unlike ``uvc.models.gates.select_tokens``, the class token is scored like the others and kept besides.

    Args:
        tokens: with class token first and positions added, (B, T, D).
        scores: (B, T).
        tau: temperature of the relaxed choice, positive.
        number: tokens chosen.

    Raises:
        ValueError: if ``number`` is not from 1 to T.
    """
    if not 1 <= number <= scores.shape[1]:
        raise ValueError(f"the number of tokens to keep must be from 1 to {scores.shape[1]}, got {number}")
    noise = torch.empty_like(scores).exponential_(generator=generator)
    soft = ((scores.log_softmax(-1) - noise.log()) / tau).softmax(-1)  # (B, T)
    chosen = soft.topk(number, dim=-1).indices
    kept = torch.zeros_like(soft).scatter_(-1, chosen, 1.0) - soft.detach() + soft
    kept = torch.cat([torch.ones_like(kept[:, :1]), kept[:, 1:]], dim=1)
    return tokens * kept[..., None]


class TokenSelectingDeiT(GatedDeiT):
    """DeiT with a linear layer ``gumbel`` that scores all tokens."""

    def forward_features(self, images: Tensor, tau: float = -1.0, ratio: float = 197) -> Tensor:
        """Normalised tokens (B, T, D); ``ratio`` is the number of tokens kept, where ``tau`` is positive."""
        x = self.patch_embed(images)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        if tau > 0:
            x = select_best_tokens(x, self.gumbel(x).squeeze(-1), tau=tau, number=int(ratio))
        return self.norm(self.run_blocks(x))
