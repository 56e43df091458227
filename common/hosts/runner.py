"""The order of a block, in the one place that knows it, and the plan that says which method acts where.

    x = x + project(attend(qkv(x)));  x = x + mlp(x)

A method is asked *before* a block, may *attend* in the place of its attention, and is asked *between* its halves (after
the attention's residual, before the MLP) and *after* it. What a pass carries is ``Tokens``; no module holds anything of
it. A block in which no method acts runs as the host's own forward.

Letters: B images, N tokens (prefix first: class, distillation, registers), C width, h heads, d channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from common.measure.attention import attention
from common.run.errors import UsageError

if TYPE_CHECKING:
    from common.hosts.host import Facts, Host

HOOKS = ("before", "attend", "between", "after")


class PlanError(UsageError):
    """Methods that cannot work on this host, or not with each other; known before any image is read."""


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of the patches: angles that are linear in a patch's row and column."""

    table: Tensor
    """sines, then cosines, of the angles: (P, 2 d) for all images, or (B, 1, P, 2 d)"""
    coordinates: Tensor
    """rows and columns, whole numbers until tokens merge, (1 or B, P, 2)"""
    first: Tensor
    """angles of the patch in row 0 and column 0, (d,)"""
    rates: Tensor
    """angles per row and per column, (2, d)"""

    def take(self, index: Tensor) -> "Rotation":
        """That of some patches, exactly: ``index`` is (B, K)."""
        rows = index[..., None]
        table = self.table.expand(index.shape[0], 1, *self.table.shape[-2:])[:, 0]
        table = table.gather(1, rows.expand(-1, -1, table.shape[2]))[:, None]
        coordinates = self.coordinates.expand(index.shape[0], -1, -1).gather(1, rows.expand(-1, -1, 2))
        return replace(self, table=table, coordinates=coordinates)

    def at(self, coordinates: Tensor) -> "Rotation":
        """That of tokens elsewhere: ``coordinates`` is (B, K, 2)."""
        angles = self.first + coordinates.to(self.rates.dtype) @ self.rates
        table = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None]
        return replace(self, table=table.to(self.table.dtype), coordinates=coordinates)


@dataclass(frozen=True)
class Tokens:
    """What a pass carries from block to block."""

    x: Tensor
    """(B, N, C)"""
    prefix: int
    """tokens in front that stand for no patch; they never merge, cluster or drop"""
    grid: tuple[int, int] | None
    """rows and columns of the patches as long as there is one token for each, in order"""
    size: Tensor | None = None
    """patches that each token stands for, (B, N, 1); None for one each"""
    key_bias: Tensor | None = None
    """added to the attention scores of each key, (B, N)"""
    rotation: Rotation | None = None
    """of the patches, where the host rotates queries and keys"""
    undo: tuple[Callable[[Tensor], Tensor], ...] | None = ()
    """the way back: each undoes one reduction, (B, U, C) to (B, N, C); None where nobody will ask for it"""

    def update(self, **changes: Any) -> "Tokens":
        """A copy with other fields; a function given as ``undone_by`` is put on the way back."""
        if (step := changes.pop("undone_by", None)) is not None and self.undo is not None:
            changes["undo"] = (*self.undo, step)
        return replace(self, **changes)

    def restored(self) -> Tensor:
        """Features on the full grid again, (B, N, C) with the N of the embedding."""
        assert self.undo is not None
        x = self.x
        for step in reversed(self.undo):
            x = step(x)
        return x


@dataclass(frozen=True)
class Parts:
    """Inside of an attention: what its input was projected to."""

    q: Tensor
    k: Tensor
    v: Tensor
    """each (B, h, N, d), queries and keys rotated where the host does"""
    scale: float
    dropout: float = 0.0
    """rate at the attention weights, 0 in evaluation"""
    keys: Tensor | None = None
    """keys before their rotation, by which tokens are compared; None where they are ``k``"""
    extra: Any = None
    """what the view needs again in ``project``"""

    @property
    def metric(self) -> Tensor:
        """Keys without positions, (B, h, N, d)."""
        return self.k if self.keys is None else self.keys


@dataclass(frozen=True)
class Effect:
    """Where a method acts, and what that needs and breaks: words of ``grid``, ``class token``, ``attention``."""

    layer: int
    hook: str
    needs: frozenset[str] = frozenset()
    breaks: frozenset[str] = frozenset()


class Method:
    """A token method. Subclasses are frozen dataclasses whose fields are its settings, None standing for a default."""

    name: ClassVar[str]

    def resolve(self, facts: "Facts") -> Self:
        """A copy with every setting filled in and checked for a host.

        Raises:
            PlanError: naming the setting, what it may be, and what it was.
        """
        raise NotImplementedError

    def effects(self) -> Sequence[Effect]:
        """Where a resolved method acts, in the order of the layers."""
        raise NotImplementedError

    def before(self, layer: int, tokens: Tokens) -> Tokens:
        """Change the tokens that enter a block."""
        raise NotImplementedError

    def attend(self, layer: int, tokens: Tokens, parts: Parts) -> tuple[Tensor, Any]:
        """Heads (B, h, N, d) in place of the host's attention, and anything for ``between`` of the same block."""
        raise NotImplementedError

    def between(self, layer: int, tokens: Tokens, parts: Parts, memo: Any) -> Tokens:
        """Change the tokens between the halves of a block."""
        raise NotImplementedError

    def after(self, layer: int, tokens: Tokens) -> Tokens:
        """Change the tokens that leave a block."""
        raise NotImplementedError


@dataclass
class Plan:
    """A host and resolved methods, checked together.

    Args:
        host: the network as blocks.
        methods: in the order in which they act where several act at the same place.
        opened: run every block through its view, also those in which nothing acts; to verify a host.

    Raises:
        PlanError: if a method cannot work on the host, or needs what another has broken before.
    """

    host: "Host"
    methods: Sequence[Method]
    opened: bool = False
    acting: list[dict[str, list[Method]]] = field(init=False)
    """layer -> hook -> methods"""

    def __post_init__(self) -> None:
        facts = self.host.facts
        self.methods = tuple(method.resolve(facts) for method in self.methods)
        self.acting = [{hook: [] for hook in HOOKS} for _ in range(facts.depth)]
        found = [(effect, method) for method in self.methods for effect in method.effects()]
        found.sort(key=lambda pair: (pair[0].layer, HOOKS.index(pair[0].hook)))
        broken: dict[str, tuple[int, Method]] = {}
        for effect, method in found:
            if "class token" in effect.needs and not facts.class_token:
                raise PlanError(f"{method.name} needs a class token, which {facts.name} has not")
            if "grid" in effect.needs and facts.grid is None:
                raise PlanError(f"{method.name} needs a grid of patches, which {facts.name} has not")
            for what in sorted(effect.needs & set(broken)):
                layer, other = broken[what]
                raise PlanError(
                    f"{other.name} at layer {layer} breaks the {what} that {method.name} needs at layer {effect.layer}"
                )
            places = self.acting[effect.layer][effect.hook]
            if effect.hook == "attend" and places:
                raise PlanError(
                    f"{places[0].name} and {method.name} both take the place of the attention of layer {effect.layer}"
                )
            places.append(method)
            broken |= {what: (effect.layer, method) for what in effect.breaks if what not in broken}

    def run(self, tokens: Tokens, *, lengths: list[int] | None = None) -> Tokens:
        """All blocks.

        Args:
            tokens: as the host embeds images.
            lengths: takes the number of tokens that enter each block and, last, of those that leave the last one.
        """
        for layer, (view, acting) in enumerate(zip(self.host.blocks, self.acting, strict=True)):
            for method in acting["before"]:
                tokens = method.before(layer, tokens)
            if lengths is not None:
                lengths.append(tokens.x.shape[1])
            if acting["attend"] or acting["between"] or tokens.key_bias is not None or self.opened:
                parts, memo = view.qkv(tokens.x, tokens.rotation), None
                if acting["attend"]:
                    heads, memo = acting["attend"][0].attend(layer, tokens, parts)
                else:
                    heads = attend(parts, tokens)
                tokens = tokens.update(x=tokens.x + view.project(heads, parts))
                for method in acting["between"]:
                    tokens = method.between(layer, tokens, parts, memo)
                tokens = tokens.update(x=tokens.x + view.mlp(tokens.x))
            else:
                tokens = tokens.update(x=view.block(tokens.x, tokens.rotation))
            for method in acting["after"]:
                tokens = method.after(layer, tokens)
        if lengths is not None:
            lengths.append(tokens.x.shape[1])
        return tokens


def attend(parts: Parts, tokens: Tokens) -> Tensor:
    """The host's attention, aware of the sizes of its keys: (B, h, N, d)."""
    return attention(parts.q, parts.k, parts.v, tokens.key_bias, dropout=parts.dropout, scale=parts.scale)
