"""Token slimming as a method of ``common.hosts``: before some blocks of a network the patches become fewer.

The modules are those of ``slimming.py``, learned by ``sit/main.py --model timm:NAME``; a file of ``leanvit.save`` holds
them under their published names, ``tsm.*`` and ``rtsm.*``.

Letters: B images, N patches in, M out, T patches of the network, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from common.hosts.host import Facts, Tokens
from common.hosts.runner import Effect, Method, PlanError
from common.run.errors import UsageError
from sit.models.slimming import ReverseTSM, TokenSlimmingModule

REDUCES = frozenset({"grid", "number of tokens"})


class Unmix:
    """Each patch again, the mean of the slimmed tokens that hold some of it: (B, prefix + M, C) to (B, prefix + N, C).

    Args:
        mixing: share of each patch in each token, (B, M, N).
        prefix: tokens in front, which stay.
    """

    def __init__(self, mixing: Tensor, prefix: int) -> None:
        self.mixing, self.prefix = mixing, prefix

    def __call__(self, x: Tensor) -> Tensor:
        taken = self.mixing.sum(1, keepdim=True).clamp_min(torch.finfo(self.mixing.dtype).tiny)
        shares = (self.mixing / taken).mT.to(x.dtype)  # (B, N, M)
        return torch.cat([x[:, : self.prefix], shares @ x[:, self.prefix :]], dim=1)


class Recalibrate:
    """All patches again, as a reverse module makes them of those behind the last block.

    Args:
        reverse: the module, (B, M, C) to (B, T, C).
        tokens: before the last slimming; its ``undo`` and ``last`` say what a patch is made of, where that is asked.
    """

    def __init__(self, reverse: nn.Module, tokens: Tokens, last: Unmix) -> None:
        assert tokens.undo is not None
        self.reverse, self.prefix, self.width = reverse, tokens.prefix, tokens.x.shape[2]
        self.steps: Sequence[Callable[[Tensor], Tensor]] = (*tokens.undo, last)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[2] == self.width:
            return torch.cat([x[:, : self.prefix], self.reverse(x[:, self.prefix :])], dim=1)
        for step in reversed(self.steps):  # a membership
            x = step(x)
        return x


@dataclass(frozen=True)
class Slim(Method):
    """SiT: before some blocks a learned module mixes the patches into fewer.

    It has ``weights``: ``tsm``, a module for each of the layers, and perhaps ``rtsm``, the reverse modules of all
    blocks, of which the last one is used. Tokens that come out count as one patch each, whatever went in.

    Args:
        layers: before which blocks, ascending.
        restore: "recalibration", what the last reverse module says, the default where there is one; or "mixing", each
            patch is the mean of the tokens that hold some of it, by its shares in them. A network that pools patches
            was trained with "mixing", and answers otherwise with the other one.

    Source: SiT, arXiv:2111.12624, token slimming between stages: TSM in front of any block of any host.
    """

    name = "slim"
    learned: ClassVar = ("tsm", "rtsm")
    layers: tuple[int, ...] | None = None
    restore: Literal["recalibration", "mixing"] | None = None

    @property
    def modules(self) -> Sequence[TokenSlimmingModule]:
        """One for each of the layers."""
        return cast(Sequence[TokenSlimmingModule], self.weights.get("tsm", ()))

    @property
    def reverse(self) -> ReverseTSM | None:
        """The reverse module of the last block."""
        found = list(cast(Sequence[nn.Module], self.weights.get("rtsm", ())))
        return found[-1] if found and isinstance(found[-1], ReverseTSM) else None

    @classmethod
    def build_weights(cls, state: Mapping[str, Tensor]) -> Mapping[str, nn.Module]:
        def indices(name: str) -> list[int]:
            return sorted({int(key.split(".")[1]) for key in state if key.startswith(f"{name}.")})

        tsm = [
            TokenSlimmingModule(len(state[f"tsm.{index}.weight.0.weight"]), len(state[f"tsm.{index}.weight.3.bias"]))
            for index in range(len(indices("tsm")))
        ]
        rtsm: list[nn.Module] = [nn.Identity() for _ in range(max(indices("rtsm"), default=-1) + 1)]
        for index in indices("rtsm"):
            own = f"rtsm.{index}"
            recovered, kept = len(state[f"{own}.mlp1.fc2.bias"]), state[f"{own}.mlp1.fc1.weight"].shape[1]
            rtsm[index] = ReverseTSM(len(state[f"{own}.norm1.weight"]), kept, recovered)
        return {"tsm": nn.ModuleList(tsm)} | ({"rtsm": nn.ModuleList(rtsm)} if rtsm else {})

    def resolve(self, facts: Facts) -> Slim:
        if not self.modules:
            raise PlanError(
                "slim has modules that must be learned, and this one has none: sit/main.py --model timm:NAME trains "
                "them, sit/export.py --output FILE.safetensors writes the network, and leanvit.load opens it"
            )
        layers, number = self.layers or (), len(self.modules)
        if list(layers) != sorted(set(layers)) or len(layers) != number:
            raise PlanError(f"slim: layers must be {number}, ascending, one for each learned module, got {self.layers}")
        for module in self.modules:
            if (width := module.layers()[1].in_features) != facts.width:
                raise PlanError(f"slim: its modules are of width {width}, {facts.name} is of width {facts.width}")
        restore = self.restore or ("mixing" if self.reverse is None else "recalibration")
        if restore == "recalibration":
            if self.reverse is None:
                raise PlanError("slim: restore 'recalibration' needs a reverse module (rtsm), which a stripped file "
                                "has not; take 'mixing'")  # fmt: skip
            if self.reverse.recovered_patches != facts.patches:
                raise PlanError(
                    f"slim: its reverse module recovers {self.reverse.recovered_patches} patches, {facts.name} has "
                    f"{facts.patches}: take restore 'mixing'"
                )
        return replace(self, restore=restore)

    def effects(self) -> Sequence[Effect]:
        assert self.layers is not None
        needs = frozenset({"equal lengths"})
        return [
            Effect(layer, "before", needs | {"grid"} if layer == self.layers[0] else needs, REDUCES)
            for layer in self.layers
        ]

    def before(self, layer: int, tokens: Tokens) -> Tokens:
        """The prefix, then what ``slim_tokens`` gives, whose mixing weights the way back needs."""
        assert self.layers is not None
        index, prefix, rotation = self.layers.index(layer), tokens.prefix, tokens.rotation
        patches = tokens.x[:, prefix:]
        mixing = self.modules[index].mixing_weights(patches)  # (B, M, N)
        if rotation is not None:
            places = rotation.coordinates
            rotation = rotation.at((mixing[..., None].to(places.dtype) * places[:, None]).sum(2))
        slimmed = tokens.update(
            x=torch.cat([tokens.x[:, :prefix], mixing @ patches], dim=1), grid=None, size=None, key_bias=None,
            rotation=rotation,
        )  # fmt: skip
        if tokens.undo is None:
            return slimmed
        back = Unmix(mixing, prefix)
        if self.restore == "mixing":
            return slimmed.update(undone_by=back)
        reverse = self.reverse
        assert reverse is not None
        if index == 0 and patches.shape[1] != reverse.recovered_patches:
            raise UsageError(
                f"slim: its reverse module recovers {reverse.recovered_patches} patches, these images have "
                f"{patches.shape[1]}: take restore 'mixing'"
            )
        if index < len(self.layers) - 1:
            return slimmed.update(undone_by=back)
        return slimmed.update(undo=(Recalibrate(reverse, tokens, back),))
