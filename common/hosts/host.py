"""What an adapter shows of a foreign network, and what a pass through it carries.

An adapter knows no method. Its block views call the host's own modules, never copies of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
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
    mask: Tensor | None = None
    """1 for tokens, 0 for padding behind an image that has fewer of them than others, (B, N, 1); None for no padding"""
    carried: Mapping[str, Any] = field(default_factory=dict)  # pyright: ignore[reportUnknownVariableType] - compilers follow no other
    """what a method takes along to a later block, by its name"""
    undo: tuple[Callable[[Tensor], Tensor], ...] | None = ()
    """the way back: each undoes one reduction, (B, U, C) to (B, N, C); None where nobody will ask for it"""

    def update(self, **changes: Any) -> "Tokens":
        """A copy with other fields; a function given as ``undone_by`` is put on the way back."""
        if (step := changes.pop("undone_by", None)) is not None and self.undo is not None:
            changes["undo"] = (*self.undo, step)
        return replace(self, **changes)

    def take(self, index: Tensor) -> "Tokens":
        """Some of the tokens with all that belongs to them: ``index`` (B, K) among the N, the prefix first."""
        size, mask, bias = (
            None if each is None else each.flatten(1).gather(1, index) for each in (self.size, self.mask, self.key_bias)
        )
        return replace(
            self,
            x=take_tokens(self.x, index),
            grid=None,
            size=None if size is None else size[..., None],
            mask=None if mask is None else mask[..., None],
            key_bias=bias,
            rotation=None if self.rotation is None else self.rotation.take(index[:, self.prefix :] - self.prefix),
        )

    def behind_prefix(self, places: Tensor) -> Tensor:
        """The places of the prefix, then ``places`` (B, K): an index for ``take``."""
        prefix = torch.arange(self.prefix, device=places.device).expand(places.shape[0], -1)
        return torch.cat([prefix, places], dim=1)

    def head(self, number: int) -> "Tokens":
        """The first tokens with all that belongs to them, views."""
        x, size, mask, bias = (
            None if each is None else each[:, :number] for each in (self.x, self.size, self.mask, self.key_bias)
        )
        rotation = None if self.rotation is None else self.rotation.part(slice(number - self.prefix))
        assert x is not None
        return replace(self, x=x, grid=None, size=size, mask=mask, key_bias=bias, rotation=rotation)

    def append(self, x: Tensor, weights: Tensor, members: Rotation | None) -> "Tokens":
        """One token more, ``x`` (B, 1, C), that stands for M patches: ``weights`` (B, M), and where ``members`` are.

        It counts as one key, and sits at their weighted mean place.
        """
        rotation = self.rotation
        if rotation is not None and members is not None:
            total = weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
            share = (weights / total)[..., None]
            place = (members.coordinates * share).sum(1, keepdim=True)
            rotation = rotation.at(torch.cat([rotation.coordinates, place], dim=1))
        size, mask, bias = self.size, self.mask, self.key_bias
        return replace(
            self,
            x=torch.cat([self.x, x], dim=1),
            grid=None,
            size=None if size is None else torch.cat([size, torch.ones_like(size[:, :1])], dim=1),
            mask=None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
            key_bias=None if bias is None else torch.cat([bias, torch.zeros_like(bias[:, :1])], dim=1),
            rotation=rotation,
        )

    def restored(self, x: Tensor | None = None) -> Tensor:
        """Features on the full grid again, (B, N, C) with the N of the embedding; of ``x`` (B, U, C) in place of them.

        Restored rows of the identity say which tokens a patch is made of.
        """
        assert self.undo is not None
        x = self.x if x is None else x
        for step in reversed(self.undo):
            x = step(x)
        return x

    def membership(self) -> Tensor:
        """Share of each token of the embedding in each that is left, (B, U, N)."""
        batch, left, width = self.x.shape
        columns = left + (left == width)  # other than features, which a patch that stays as it was would keep
        ones = torch.eye(left, columns, dtype=self.x.dtype, device=self.x.device)
        return self.restored(ones.expand(batch, -1, -1))[..., :left].mT


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
    normalized: Tensor | None = None
    """what was projected, (B, N, C)"""
    gate: Tensor | None = None
    """of the heads' output, (B, N, C), where the host has one; ``project`` applies it"""
    scores: Tensor | None = None
    """of the tokens, (B, N), where a method's ``attend`` made them for its ``between``"""

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
    def tokens(self) -> int:
        """Tokens of one image, the prefix included."""
        return self.prefix + self.patches

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1] if self.grid else 0


class BlockView(ABC):
    """One pre-norm block as parts."""

    opened: "Opened"
    """modules that are not called where the parts are asked for, with names; the block first"""

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
    layers: str
    """name of the module that holds the blocks"""
    facts: Facts
    blocks: Sequence[BlockView]
    opened: "Opened" = ()
    """modules around the blocks that are not called, with names"""

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

    def check_blocks(self, net: nn.Module) -> None:
        """Refuse a network whose blocks were replaced since the views were made, which would run the old ones.

        Raises:
            NotAHost: naming where they are.
        """
        if torch.compiler.is_exporting():  # torch.export may run copies of the modules
            return
        modules = list(vars(net.get_submodule(self.layers))["_modules"].values())  # children() has none twice
        if len(modules) != len(self.blocks) or any(
            view.opened[0][1] is not module for view, module in zip(self.blocks, modules, strict=True)
        ):
            raise NotAHost(
                f"{self.layers}: modules were replaced since lean was called: change fast.restore(), then call lean"
            )

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


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (B, N, C) at ``index`` (B, K), each image its own: (B, K, C).

    As ``gather`` does, but copying whole rows, which takes a CPU a third of the time.
    """
    batch, tokens, width = x.shape
    if batch > 1:
        index = index + tokens * torch.arange(batch, device=x.device)[:, None]  # first row of each image
    return x.reshape(-1, width).index_select(0, index.flatten()).view(*index.shape, width)


Opened = Sequence[tuple[str, nn.Module]]
WATCHERS = ("transformers.utils.output_capturing", "common.measure.benchmark", "common.measure.flops")
"""Where hooks come from that may be silent: hidden states, which are refused when asked for; a bar; a count, which sees
the operations themselves."""


def refuse_hooks(opened: Opened) -> Opened:
    """Modules that a runner opens are not called, so that hooks on them would be silent.

    Returns:
        The modules, to ask again in every pass: where there are no hooks, that takes a microsecond.

    Raises:
        NotAHost: naming the module.
    """
    for name, module in opened:
        for kind in _hooks_of(module):
            if kind and not all(_watches(hook) for hook in kind.values()):
                raise NotAHost(f"{name} has hooks, which would not be called: remove them first")
        if "forward" in module.__dict__:
            raise NotAHost(f"{name} has a forward of its own, which would not be called")
    return opened


def refuse_shared(net: nn.Module) -> None:
    """Parameters that two modules hold cannot become smaller for each of them.

    Raises:
        NotAHost: naming both.
    """
    names: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise NotAHost(f"{name} is {first}, shared: copy one of them first, such as by copy.deepcopy of its module")


def _hooks_of(module: Any) -> Sequence[Mapping[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _watches(hook: Any) -> bool:
    return getattr(getattr(hook, "func", hook), "__module__", None) in WATCHERS


def channels_of(net: nn.Module) -> int:
    """Channels of the images that a network takes: those of its first convolution."""
    return next((parameter.shape[1] for parameter in net.parameters() if parameter.dim() == 4), 3)
