"""Token methods as small as they can be, to test hosts and the runner with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.hosts import Effect, Facts, Method, Parts, Tokens


@dataclass(frozen=True)
class Halve(Method):
    """Averages neighbouring pairs of patches."""

    name = "halve"
    layer: int = 1
    hook: str = "between"
    proportional: bool = True

    def resolve(self, facts: Facts) -> "Halve":
        return self

    def effects(self) -> Sequence[Effect]:
        grid = frozenset({"grid"})
        return [Effect(self.layer, self.hook, grid if self.hook == "before" else frozenset(), grid)]

    def _reduce(self, tokens: Tokens) -> Tokens:
        prefix, patches = tokens.x[:, : tokens.prefix], tokens.x[:, tokens.prefix :]
        size = torch.ones_like(tokens.x[..., :1]) if tokens.size is None else tokens.size
        pairs, sizes = (y.unflatten(1, (-1, 2)) for y in (patches, size[:, tokens.prefix :]))
        size = torch.cat([size[:, : tokens.prefix], sizes.sum(2)], 1)
        return tokens.update(
            x=torch.cat([prefix, (pairs * sizes).sum(2) / sizes.sum(2)], 1),
            size=size,
            key_bias=size[..., 0].log() if self.proportional else None,
            grid=None,
            undone_by=lambda x: torch.cat([x[:, : tokens.prefix], x[:, tokens.prefix :].repeat_interleave(2, 1)], 1),
        )

    def before(self, layer: int, tokens: Tokens) -> Tokens:
        return self._reduce(tokens)

    def between(self, layer: int, tokens: Tokens, parts: Parts) -> Tokens:
        return self._reduce(tokens)

    def after(self, layer: int, tokens: Tokens) -> Tokens:
        return self._reduce(tokens)


@dataclass(frozen=True)
class Replace(Halve):
    """Takes the place of the attention, exactly."""

    name = "replace"
    hook: str = "attend"

    def effects(self) -> Sequence[Effect]:
        return [Effect(self.layer, "attend"), Effect(self.layer, "between")]

    def attend(self, layer: int, tokens: Tokens, parts: Parts) -> tuple[Tensor, Tokens, Parts]:
        weights = (parts.q @ parts.k.mT * parts.scale).softmax(-1)
        return weights @ parts.v, tokens, replace(parts, scores=weights.mean((1, 2)))

    def between(self, layer: int, tokens: Tokens, parts: Parts) -> Tokens:
        assert parts.scores is not None
        return tokens


@dataclass(frozen=True)
class Drop(Halve):
    """Drops every second patch, and with it its rotation."""

    name = "drop"
    hook: str = "after"

    def _reduce(self, tokens: Tokens) -> Tokens:
        batch, number = tokens.x.shape[:2]
        kept = torch.arange(tokens.prefix, number, 2, device=tokens.x.device)
        index = torch.cat([torch.arange(tokens.prefix, device=tokens.x.device), kept]).expand(batch, -1)
        return tokens.take(index).update(
            undone_by=lambda x: torch.cat([x[:, : tokens.prefix], x[:, tokens.prefix :].repeat_interleave(2, 1)], 1)
        )
