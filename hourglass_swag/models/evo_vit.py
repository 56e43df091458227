"""Evo-ViT: from some layer on, only the patches that the class token attends to enter a block.

Paper: Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer, arXiv:2108.01390. There are no parameters
beyond the backbone's, so any of its checkpoints fits. The published rows on SWAG have a reduced form
(arXiv:2210.01035): patches that skip a block are carried over unchanged, where Evo-ViT gives them the update of a
representative token. In both they may come back in a later layer.

Letters: B images, N tokens, P patches, C width, h heads; p the kept fraction ("prune ratio"), n = floor(p P) the
patches that go through, t the trade-off, a the running class attention of the patches, A the class row of a layer's
attention, averaged over heads.

    unpruned layer:  a = (1 - t) a + t A
    pruned layer:    sort the patches by a, descending; the block sees the prefix and the first n;
                     their a = (1 - t) a + t A; the others keep theirs
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.hosts import Effect, Facts, Method, Parts, PlanError, Tokens
from common.hosts.host import take_tokens
from common.measure.flops import OpCounts
from hourglass_swag.host import publish
from hourglass_swag.methods import ATTENTION, CLASS_TOKEN, FIXED, GRID
from hourglass_swag.models.ops.class_row import score_class_row
from hourglass_swag.models.vision_transformer import VisionTransformer

UNRANKED = "the first layer cannot prune, because no class attention has ranked the patches yet"


def count_processed(num_patches: int, prune_ratio: float) -> int:
    """n: patches of ``num_patches`` that go through a block with this ratio."""
    return num_patches if prune_ratio == 1 else math.floor(prune_ratio * num_patches)


@dataclass(frozen=True)
class Evolution:
    """What travels from layer to layer."""

    attention: Tensor
    """a, (B, P), in the order of the tokens"""
    order: Tensor | None = None
    """which patch of the embedding each is, (B, P); None for their own order"""
    all_tokens: Tokens | None = None
    """inside a pruned layer: the tokens that enter it, sorted"""
    representative: Tensor | None = None
    """inside a pruned layer: the token that stands for those that skip it, as it enters, (B, 1, C)"""


@dataclass(frozen=True)
class EvoViT(Method):
    """Evo-ViT: the least attended patches skip blocks, and take the update of their representative.

    Args:
        keep: fraction of the patches that go through from ``layer`` on; or one number per layer of the network.
        layer: the first that prunes, at least 1; default: a third of the depth.
        tradeoff: weight of a layer's own class attention in the running one; or one number per layer.
        representative: one token more in pruned layers, the mean of the others by their class attention, whose update
            they take; otherwise they are carried over unchanged.

    Source: arXiv:2108.01390, section 3.
    """

    name = "evo_vit"
    swag: ClassVar = {"representative": False}
    keep: float | tuple[float, ...] = 0.5
    layer: int | None = None
    tradeoff: float | tuple[float, ...] = 0.5
    representative: bool = True

    def resolve(self, facts: Facts) -> "EvoViT":
        depth, keep, tradeoff = facts.depth, self.keep, self.tradeoff
        first = max(depth // 3, 1) if self.layer is None else self.layer
        prunes = not isinstance(keep, tuple) and keep != 1
        if not prunes <= first < depth and (prunes or self.layer is not None):
            raise PlanError(
                f"evo_vit: layer (--evo_prune_location) must be {int(prunes)} to {depth - 1}, got {first!r}"
                + f": {UNRANKED}" * prunes
            )
        if not isinstance(keep, tuple):
            keep = tuple(1.0 if index < first else float(keep) for index in range(depth))
        tradeoff = tradeoff if isinstance(tradeoff, tuple) else (tradeoff,) * depth
        for name, values in (("keep (--evo_prune_ratio)", keep), ("tradeoff (--evo_tradeoff)", tradeoff)):
            if len(values) != depth:
                raise PlanError(
                    f"evo_vit: {name} must be a number or one for each of {depth} layers, got {len(values)}"
                )
        if wrong := [value for value in keep if not 0 < value <= 1]:
            raise PlanError(f"evo_vit: keep (--evo_prune_ratio), the kept fraction, must be in (0, 1], got {wrong[0]}")
        if wrong := [value for value in tradeoff if not 0 <= value <= 1]:
            raise PlanError(f"evo_vit: tradeoff (--evo_tradeoff) must be in [0, 1], got {wrong[0]}")
        if keep[0] != 1:
            raise PlanError(f"evo_vit: keep (--evo_prune_ratio) must begin with 1, got {keep[0]}: {UNRANKED}")
        return replace(self, keep=keep, tradeoff=tradeoff)

    def effects(self) -> Sequence[Effect]:
        assert isinstance(self.keep, tuple)
        pruned = [layer for layer, keep in enumerate(self.keep) if keep != 1]
        found: list[Effect] = []
        for layer in range(max(pruned, default=-1) + 1):
            if layer in pruned:
                found += [Effect(layer, "before", needs=FIXED, breaks=GRID), Effect(layer, "after", needs=FIXED)]
            if layer < pruned[-1]:
                found.append(Effect(layer, "between", needs=CLASS_TOKEN | ATTENTION | FIXED))
        return found

    def before(self, layer: int, tokens: Tokens) -> Tokens:
        """The prefix and the n patches of largest a, and the representative of the others behind them."""
        assert isinstance(self.keep, tuple)
        state: Evolution = tokens.carried[self.name]
        attention, index = state.attention.sort(dim=1, descending=True)
        order = index if state.order is None else state.order.gather(1, index)
        everyone = tokens.take(tokens.behind_prefix(index + tokens.prefix))
        number, representative = count_processed(index.shape[1], self.keep[layer]), None
        fast = everyone.head(tokens.prefix + number)
        if self.representative and number < index.shape[1]:
            slow = everyone.x[:, tokens.prefix + number :]
            weights = attention[:, number:]
            share = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
            representative = (slow * share[..., None].to(slow.dtype)).sum(1, keepdim=True)
            places = None if everyone.rotation is None else everyone.rotation.part(slice(number, None))
            fast = fast.append(representative, share, places)
        return fast.update(carried={**tokens.carried, self.name: Evolution(attention, order, everyone, representative)})

    def between(self, layer: int, tokens: Tokens, parts: Parts) -> Tokens:
        """(1 - t) a + t A for the patches that are here.

        Source: Evo-ViT, arXiv:2108.01390, class attention carried over layers: (1 - t) a + t A.
        """
        assert isinstance(self.keep, tuple)
        assert isinstance(self.tradeoff, tuple)
        state: Evolution | None = tokens.carried.get(self.name)
        row = score_class_row(parts.q, parts.k, parts.scale)[:, tokens.prefix :]
        if state is None:
            state = Evolution(row)
        else:
            number, t = count_processed(state.attention.shape[1], self.keep[layer]), self.tradeoff[layer]
            mixed = (1 - t) * state.attention[:, :number] + t * row[:, :number]
            state = replace(state, attention=torch.cat([mixed, state.attention[:, number:]], dim=1))
        return tokens.update(carried={**tokens.carried, self.name: state})

    def after(self, layer: int, tokens: Tokens) -> Tokens:
        """The patches that skipped the block, behind those that did not."""
        assert isinstance(self.keep, tuple)
        state: Evolution = tokens.carried[self.name]
        everyone, order, prefix = state.all_tokens, state.order, tokens.prefix
        assert everyone is not None
        assert order is not None
        number = prefix + count_processed(order.shape[1], self.keep[layer])
        slow = everyone.x[:, number:]
        if state.representative is not None:
            slow = slow + (tokens.x[:, number:] - state.representative)
        last = all(keep == 1 for keep in self.keep[layer + 1 :])

        def undo(x: Tensor) -> Tensor:
            return torch.cat([x[:, :prefix], take_tokens(x[:, prefix:], order.argsort(dim=1))], dim=1)

        return everyone.update(
            x=torch.cat([tokens.x[:, :number], slow], dim=1),
            carried={**tokens.carried, self.name: Evolution(state.attention, order)},
            undone_by=undo if last else None,
        )

    def published_ops(self, hook: str, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """As executed, but for the class row and the order.

        The published code averages the whole map over the heads, (n + 1)^2 quotients, where here one row more is
        multiplied out: (n + 1) C, its softmax and scaling. Its tool counts N - 1 sums for indices.
        """
        tokens = args[0]
        B, N, C = tokens.x.shape
        if hook == "before":
            return inside + OpCounts(add=B * (N - tokens.prefix))
        if hook == "between":
            h, T = args[1].k.shape[1:3]
            return inside + {"div": B * T * T, "mul": -B * C, "matmul": -B * T * C, "softmax": -B * h * T}
        return inside


def published(
    net: VisionTransformer,
    *,
    prune_ratio: float | Sequence[float] = 1.0,
    tradeoff: float | Sequence[float] = 0.5,
    prune_location: int | None = None,
) -> VisionTransformer:
    """The network of a published row, under the published names of the settings.

    Args:
        net: the backbone, with a class token.
        prune_ratio: p, the kept fraction from the layer ``prune_location`` on; or one number per layer.
        tradeoff: t; or one number per layer.
        prune_location: first pruned layer, unless there is one ratio per layer; default: 3.

    Raises:
        ValueError: if a number is out of range, or the first layer were to prune, which nothing has scored yet.
    """
    keep, weight = (
        float(value) if isinstance(value, (int, float)) else tuple(value) for value in (prune_ratio, tradeoff)
    )
    if prune_location is None and keep != 1 and not isinstance(keep, tuple):
        prune_location = 3
    return publish(net, EvoViT(keep=keep, layer=prune_location, tradeoff=weight, **EvoViT.swag))
