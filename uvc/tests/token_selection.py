"""DeiT that selects tokens before its blocks, or there and inside every attention: networks of UVC's release.

No program here trains them; the reference vectors compare their outputs.

B batch, T tokens, class token included.
"""

from typing import Any

import torch
from timm.layers import Attention  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from uvc.models.deit import Block, GatedDeiT


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


class SelectingAttention(Attention):
    """Self-attention whose queries, keys and values see zeros in place of the tokens that its scores leave out."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias)
        self.gumbel = nn.Linear(dim, 1)

    def forward(self, x: Tensor, tau: float = -1.0, number: int = 197) -> Tensor:
        """(B, T, D) -> (B, T, D); ``number`` tokens are chosen where ``tau`` is positive."""
        if tau > 0:
            x = select_best_tokens(x, self.gumbel(x).squeeze(-1), tau=tau, number=number)
        return super().forward(x)


class SelectingBlock(Block):
    """Block around ``SelectingAttention``. Its residual stream keeps all tokens."""

    def __init__(self, dim: int, num_heads: int, hidden: int, *, qkv_bias: bool = True, **options: Any) -> None:
        super().__init__(dim, num_heads, hidden, qkv_bias=qkv_bias, **options)
        self.attn = SelectingAttention(dim, num_heads, qkv_bias=qkv_bias)

    def forward(self, x: Tensor, tau: float = -1.0, number: int = 197) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.drop_path1(self.attn(self.norm1(x), tau, number))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class TokenSelectingDeiT(GatedDeiT):
    """DeiT with a linear layer ``gumbel`` that scores all tokens."""

    def forward_features(self, images: Tensor, tau: float = -1.0, ratio: float = 197) -> Tensor:
        """Normalised tokens (B, T, D); ``ratio`` is the number of tokens kept, where ``tau`` is positive."""
        x = self.patch_embed(images)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        if tau > 0:
            x = select_best_tokens(x, self.gumbel(x).squeeze(-1), tau=tau, number=int(ratio))
        options = (tau, int(ratio)) if self.block_class is SelectingBlock else ()
        return self.norm(self.run_blocks(x, *options))


class EachLayerSelectingDeiT(TokenSelectingDeiT):
    """Selects before the blocks and, with scores of its own on the normalised tokens, in every attention anew."""

    block_class = SelectingBlock
