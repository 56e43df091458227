"""The order of a block, in the one place that knows it, and the plan that says which method acts where.

    x = x + project(attend(qkv(x)));  x = x + mlp(x)

A method is asked *before* a block, may *attend* in the place of its attention, and is asked *between* its halves (after
the attention's residual, before the MLP) and *after* it. What a pass carries is ``Tokens``; no module holds anything of
it. A block in which no method acts runs as the host's own forward.

Letters: B images, N tokens (prefix first: class, distillation, registers), C width, h heads, d channels of a head.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from common.hosts.host import BlockView, Facts, Host, Parts, Tokens, refuse_hooks
from common.hosts.settings import checked_settings
from common.measure.attention import attention
from common.measure.flops import OpCounts
from common.run.errors import UsageError

HOOKS = ("before", "attend", "between", "after")


class PlanError(UsageError):
    """Methods that cannot work on this host, or not with each other; known before any image is read."""


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
    swag: ClassVar[Mapping[str, Any]] = {}
    """settings in which the published rows on SWAG differ from the defaults, which are what the method's paper means"""
    cores: ClassVar[Mapping[int, nn.Module]] = {}
    """layer -> the module, without parameters, that a resolved method calls there"""
    learned: ClassVar[Sequence[str]] = ()
    """names under which a lean network, and its file, hold modules that the method has learned"""
    weights: ClassVar[Mapping[str, nn.Module]] = {}
    """name, one of ``learned`` -> the module of this method, which the lean network shares; see ``with_weights``"""
    hinders_onnx: ClassVar[str | None] = None
    """what it needs that torch cannot write as ONNX"""

    def resolve(self, facts: Facts) -> Self:
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

    def attend(self, layer: int, tokens: Tokens, parts: Parts) -> tuple[Tensor, Tokens, Parts]:
        """Heads (B, h, N, d) in place of the host's attention, the tokens they update, and what ``between`` gets."""
        raise NotImplementedError

    def between(self, layer: int, tokens: Tokens, parts: Parts) -> Tokens:
        """Change the tokens between the halves of a block."""
        raise NotImplementedError

    def after(self, layer: int, tokens: Tokens) -> Tokens:
        """Change the tokens that leave a block."""
        raise NotImplementedError

    def with_cores(self, cores: Mapping[int, nn.Module]) -> Self:
        """Itself, with modules of its own."""
        object.__setattr__(self, "cores", cores)
        return self

    def with_weights(self, weights: Mapping[str, nn.Module]) -> Self:
        """A copy with modules that were learned, by names of ``learned``; its settings do not tell of them."""
        made = copy.copy(self)
        object.__setattr__(made, "weights", dict(weights))
        return made

    @classmethod
    def build_weights(cls, state: Mapping[str, Tensor]) -> Mapping[str, nn.Module]:
        """Modules for ``with_weights`` in the shapes of a state, whose keys begin with their names; any numbers.

        Raises:
            KeyError: the key that the state lacks.
        """
        raise NotImplementedError

    @property
    def hinders_export(self) -> str | None:
        """Why ``torch.export`` cannot follow the method, and what to do; None if it can."""
        return None

    @property
    def hinders_any_batch(self) -> str | None:
        """Why a file for any number of images cannot hold the method, and what to do; None if it can."""
        return None

    @property
    def depends_on_data(self) -> bool:
        """Whether the cost depends on weights and images."""
        return False

    @property
    def drops_by_data(self) -> bool:
        """Whether the number of tokens does."""
        return False

    def published_ops(self, hook: str, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """What the paper's tool counts where ``inside`` is executed in a hook, which got ``args``."""
        return inside


class Step(nn.Module):
    """What one method does at one place of one block: a module, so that hooks and counts see it."""

    def __init__(self, method: Method, layer: int, hook: str) -> None:
        super().__init__()
        self.method, self.layer, self.hook = method, layer, hook
        self.core = method.cores.get(layer)

    def extra_repr(self) -> str:
        return f"{self.method.name}, {self.hook} block {self.layer}"

    def forward(self, *operands: Any) -> Any:
        """The method's hook."""
        return getattr(self.method, self.hook)(self.layer, *operands)

    def published_ops(self, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        return self.method.published_ops(self.hook, inside, args, result)


class Plan(nn.Module):
    """A host and resolved methods, checked together. It has no parameters.

    Args:
        host: the network as blocks.
        methods: in the order in which they act where several act at the same place.
        opened: run every block through its view, also those in which nothing acts; to verify a host.
        restores: give the network's output the full grid again where it reads patches; published rows read those left.

    Raises:
        PlanError: if a method cannot work on the host, or needs what another has broken before.
    """

    def __init__(self, host: Host, methods: Sequence[Method], *, opened: bool = False, restores: bool = True) -> None:
        super().__init__()
        facts = host.facts
        self.host, self.opened, self.restores = host, opened, restores
        self.methods = tuple(_resolve(method, facts) for method in methods)
        self.acting: list[dict[str, list[Step]]] = [{hook: [] for hook in HOOKS} for _ in range(facts.depth)]
        found = [(effect, method) for method in self.methods for effect in method.effects()]
        for effect, method in found:
            if not isinstance(effect.layer, int) or not 0 <= effect.layer < facts.depth:
                raise PlanError(
                    f"{method.name} acts at layer {effect.layer}, but {facts.name} has layers 0 to {facts.depth - 1}"
                )
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
                    f"{places[0].method.name} and {method.name} both take the place of the attention of layer "
                    f"{effect.layer}"
                )
            if effect.hook == "between" and places:
                raise PlanError(
                    f"{places[0].method.name} and {method.name} both reduce the tokens between the halves of layer "
                    f"{effect.layer}, where one knows what the attention saw: give them different layers"
                )
            places.append(Step(method, effect.layer, effect.hook))
            broken |= {what: (effect.layer, method) for what in effect.breaks if what not in broken}
        self.steps = nn.ModuleList(step for acting in self.acting for steps in acting.values() for step in steps)

    def run(self, tokens: Tokens, *, seen: list[Tokens] | None = None) -> Tokens:
        """All blocks.

        Args:
            tokens: as the host embeds images.
            seen: takes the tokens that enter each block and, last, those that leave the last one.

        Raises:
            NotAHost: if a module that is opened here has got a hook since the plan was made.
            PlanError: while exporting what cannot be exported.
        """
        if torch.compiler.is_exporting():
            self._check_export()
        refuse_hooks(self.host.opened)
        for view, acting in zip(self.host.blocks, self.acting, strict=True):
            for step in acting["before"]:
                tokens = step(tokens)
            if seen is not None:
                seen.append(tokens)
            if acting["attend"] or acting["between"] or tokens.key_bias is not None or self.opened:
                tokens = self._attend(view, acting, tokens)
                tokens = tokens.update(x=tokens.x + view.mlp(tokens.x))
            else:
                tokens = tokens.update(x=view.block(tokens.x, tokens.rotation))
            for step in acting["after"]:
                tokens = step(tokens)
        if seen is not None:
            seen.append(tokens)
        return tokens

    def _check_export(self) -> None:
        for method in self.methods:
            if why := method.hinders_export:
                raise PlanError(f"{method.name} cannot be exported: {why}")

    def _attend(self, view: BlockView, acting: dict[str, list[Step]], tokens: Tokens) -> Tokens:
        """The first half of a block."""
        refuse_hooks(view.opened)
        parts = view.qkv(tokens.x, tokens.rotation)
        if acting["attend"]:
            heads, tokens, parts = acting["attend"][0](tokens, parts)
        else:
            heads = attend(parts, tokens)
        tokens = tokens.update(x=tokens.x + view.project(heads, parts))
        for step in acting["between"]:
            tokens = step(tokens, parts)
        return tokens


def attend(parts: Parts, tokens: Tokens) -> Tensor:
    """The host's attention, aware of the sizes of its keys: (B, h, N, d)."""
    return attention(parts.q, parts.k, parts.v, tokens.key_bias, dropout=parts.dropout, scale=parts.scale)


def _resolve(method: Any, facts: Facts) -> Method:
    """A method with every setting filled in; whatever a setting of a wrong kind raises is said as its mistake."""
    if not isinstance(method, Method):
        raise PlanError(f"expected a method with its settings, such as leanvit.ToMe(r=16), or a name, got {method!r}")
    try:
        checked = checked_settings(method).with_weights(method.weights)
        return checked.resolve(facts).with_weights(method.weights)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{method.name}: {error}") from error
