"""What the token methods share as plug-ins of ``common.hosts``; each of them is a file of ``models/``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.hosts import Facts, PlanError, Tokens
from common.hosts.host import take_tokens
from common.run.precision import without_autocast

CLASS_TOKEN = frozenset({"class token"})
GRID = frozenset({"grid"})
REDUCES = frozenset({"grid", "number of tokens"})
"""What a method breaks that changes which tokens there are."""
FIXED = frozenset({"number of tokens", "plain attention"})
"""What a method needs that keeps scores of all patches."""
ATTENTION = frozenset({"plain attention", "equal lengths"})
"""What a method needs that looks at attention weights, or makes them."""
EQUAL = frozenset({"equal lengths"})
"""What a method needs that knows no padding."""


def check_layer(name: str, layer: int, facts: Facts) -> int:
    """The layer itself.

    Raises:
        PlanError: if the host has none of this number.
    """
    if not 0 <= layer < facts.depth:
        raise PlanError(f"{name} must be a layer, 0 to {facts.depth - 1}, got {layer!r}")
    return layer


def check_layers(name: str, layers: Sequence[int], facts: Facts) -> tuple[int, ...]:
    """The layers, ascending.

    Raises:
        PlanError: if there is one twice, or one that the host has not.
    """
    layers = tuple(sorted(check_layer(name, layer, facts) for layer in layers))
    if len(set(layers)) < len(layers):
        raise PlanError(f"{name} must differ, got {layers}")
    return layers


def check_choice(name: str, value: object, valid: Sequence[object]) -> None:
    """Refuse a setting that is none of ``valid``.

    Raises:
        PlanError: naming them.
    """
    if value not in valid:
        raise PlanError(f"{name} must be one of {', '.join(map(str, valid))}, got {value!r}")


class Undrop:
    """Puts dropped patches back: (B, U or more, C) to (B, N, C).

    Args:
        tokens: before some were dropped.
        index: which were kept, (B, U) among the N, the prefix first.
        mask: 0 for padding behind them, (B, U, 1); None without.
        restore: "nearest", a dropped patch becomes the kept one most like it then (cosine); "frozen", it stays.
        some_fused: some of the tokens are sums of dropped patches, which nothing is restored from while there is
            another that was kept.
    """

    def __init__(
        self, tokens: Tokens, index: Tensor, mask: Tensor | None, restore: str, *, some_fused: bool = False
    ) -> None:
        self.before, self.prefix, self.restore = tokens.x, tokens.prefix, restore
        self.index, self.mask = index, mask
        self.some_fused = tokens if some_fused else None

    def __call__(self, x: Tensor) -> Tensor:
        batch, number = self.before.shape[:2]
        index = self.index if self.mask is None else torch.where(self.mask[..., 0] > 0, self.index, number)
        ranks = torch.arange(index.shape[1], device=x.device).expand_as(index)
        row = ranks.new_full((batch, number + 1), -1).scatter(1, index, ranks)[:, :number]  # -1: dropped
        if self.restore == "frozen" or self.index.shape[1] == self.prefix:  # or no patch was kept
            before = self.before.to(x.dtype) if x.shape[2] == self.before.shape[2] else x.new_zeros(())  # a membership
            return torch.where(row[..., None] < 0, before, take_tokens(x, row.clamp_min(0)))
        with without_autocast(self.before):
            features = F.normalize(self.before.to(torch.promote_types(self.before.dtype, torch.float32)), dim=2)
            likeness = features @ take_tokens(features, self.index).mT  # (B, N, U)
        likeness[..., : self.prefix] = -torch.inf
        if self.mask is not None:
            likeness = likeness.masked_fill(self.mask.mT == 0, -torch.inf)
        if self.some_fused is not None:
            stands = (self.some_fused.membership() > 0).any(2).gather(1, self.index)[:, None]  # for a patch, (B, 1, U)
            alone = ~stands[..., self.prefix :].any(2, keepdim=True)
            likeness = likeness.masked_fill(~(stands | alone), -torch.inf)
        return take_tokens(x, torch.where(row < 0, likeness.argmax(2), row))
