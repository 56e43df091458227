"""What an adapter shows of a foreign network, and the check that it shows it rightly.

An adapter knows no method. Its block views call the host's own modules, never copies of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.hosts.runner import Parts, Plan, Rotation, Tokens
from common.measure.flops import evaluating
from common.run.errors import UsageError

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference from the network itself, of the largest value, by precision."""


class NotAHost(UsageError):
    """A network that no adapter can show rightly; the message names the module."""


@dataclass(frozen=True)
class Facts:
    """What methods may know of a host."""

    name: str
    depth: int
    prefix: int
    class_token: bool
    grid: tuple[int, int] | None
    """rows and columns of patches at the network's own resolution"""
    width: int
    heads: int
    image_size: tuple[int, int]

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1] if self.grid else 0


class BlockView(ABC):
    """One pre-norm block as parts."""

    @abstractmethod
    def block(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """The host's own forward, (B, N, C) to (B, N, C)."""

    @abstractmethod
    def qkv(self, x: Tensor, rotation: Rotation | None) -> Parts:
        """Norm, projections and rotation of tokens (B, N, C)."""

    @abstractmethod
    def project(self, heads: Tensor, parts: Parts) -> Tensor:
        """The update (B, N, C) that heads (B, h, N, d) make: gate, projection, layer scale, drop path."""

    @abstractmethod
    def mlp(self, x: Tensor) -> Tensor:
        """The update (B, N, C) of the second half."""


class Host(ABC):
    """A network as embed, blocks, finish. ``net`` is the network, or the lean one that shares its modules.

    Args:
        net: the network.

    Raises:
        NotAHost: naming the module that the adapter does not know.
    """

    lean_class: ClassVar[type]
    """mixin of the network that runs through the plan"""
    facts: Facts
    blocks: Sequence[BlockView]

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    @staticmethod
    @abstractmethod
    def accepts(net: nn.Module) -> bool:
        """Whether the network is of this family; what is wrong with it is then said by the constructor."""

    @abstractmethod
    def embed(self, net: Any, images: Tensor) -> Tokens:
        """Tokens that enter the first block, of images (B, 3, H, W)."""

    @abstractmethod
    def normalize(self, net: Any, x: Tensor) -> Tensor:
        """What the network does to tokens (B, N, C) behind its last block."""

    @abstractmethod
    def reads_prefix(self, net: Any) -> bool:
        """Whether ``finish`` reads prefix tokens alone, so that nothing needs to be restored for it."""

    @abstractmethod
    def finish(self, net: Any, x: Tensor) -> Any:
        """The network's output of normalised tokens (B, N, C), of which there may be fewer if it reads the prefix."""

    def check(self) -> None:
        """Run the network and its opened blocks on a small random image and compare.

        Raises:
            NotAHost: if they differ by more than ``TOLERANCES``.
        """
        parameter = next(self.net.parameters())
        if parameter.is_meta:
            return
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, 3, *self.facts.image_size, generator=generator, device="cpu").to(parameter)
        with torch.no_grad(), evaluating(self.net):
            expected = self.net(images)
            tokens = Plan(self, (), opened=True).run(self.embed(self.net, images))
            found = self.finish(self.net, self.normalize(self.net, tokens.x))
        difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if not difference <= TOLERANCES[parameter.dtype]:
            raise NotAHost(
                f"{self.facts.name} computes something else than its blocks say: the outputs differ by "
                f"{float(difference):.1e} of the largest value in {parameter.dtype}"
            )


def refuse_hooks(named: Sequence[tuple[str, nn.Module]]) -> None:
    """Modules that a runner opens are not called, so that hooks on them would be silent.

    Raises:
        NotAHost: naming the module.
    """
    for name, module in named:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise NotAHost(f"{name} has hooks, which would not be called: remove them first")
