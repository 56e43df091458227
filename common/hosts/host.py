"""What an adapter shows of a foreign network, and what a pass through it carries.

An adapter knows no method. Its block views call the host's own modules, never copies of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from common.hosts.rotation import Rotation
from common.run.errors import UsageError


class NotAHost(UsageError):
    """A network that no adapter can show rightly; the message names the module."""


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
    channels: int = 3
    """of an image"""

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

    def graft(self, fast: Any) -> None:
        """Put lean parts into a lean network whose host holds a smaller host."""
        return


def check_images(images: Tensor) -> None:
    """Before anything of a network sees them.

    Raises:
        UsageError: if there is no image, or no batch of images.
    """
    if images.dim() != 4:
        raise UsageError(f"expected images (B, C, H, W), got a tensor of {images.dim()} dimensions")
    if images.shape[0] == 0:
        raise UsageError("the batch is empty: expected images (B, C, H, W) with B of at least 1")


def refuse_hooks(named: Sequence[tuple[str, nn.Module]]) -> None:
    """Modules that a runner opens are not called, so that hooks on them would be silent.

    Those with which transformers records hidden states are idle unless these are asked for, which is refused.

    Raises:
        NotAHost: naming the module.
    """
    for name, module in named:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values())
        if any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks):
            raise NotAHost(f"{name} has hooks, which would not be called: remove them first")
        if "forward" in vars(module):
            raise NotAHost(f"{name} has a forward of its own, which would not be called")


def channels_of(net: nn.Module) -> int:
    """Channels of the images that a network takes: those of its first convolution."""
    return next((parameter.shape[1] for parameter in net.parameters() if parameter.dim() == 4), 3)
