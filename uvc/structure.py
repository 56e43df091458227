"""What of a network survives, as plain indices: blocks, heads, head dimensions, neurons and patches.

``Structure.from_model`` reads it from masks and gates; the compressed file carries it as JSON, so that the smaller
network can be traced to the masked one.

L blocks, H heads, d channels of a head, M hidden neurons, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.run.errors import UsageError
from uvc.models.deit import Block
from uvc.models.gates import GatedTransformer
from uvc.pruning import blocks_of


@dataclass(frozen=True)
class BlockStructure:
    """One block.

    Attributes:
        runs: False where the gate skips the block; the rest then describes its masks all the same.
        heads: heads of which any output dimension survives, ascending: its column of ``attn.proj`` and its value row of
            ``attn.qkv`` are unmasked.
        dims: for each of ``heads``, the surviving dimensions 0..d-1 of its values, ascending. Queries and keys of a
            surviving head keep all d.
        neurons: hidden neurons that are computed: column of ``mlp.fc2`` and row of ``mlp.fc1`` unmasked.
        constant_neurons: column of ``mlp.fc2`` unmasked, row of ``mlp.fc1`` masked: each gives gelu(bias of fc1).
    """

    runs: bool
    heads: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    neurons: tuple[int, ...]
    constant_neurons: tuple[int, ...] = ()

    def check(self, name: str, num_heads: int, head_dim: int, hidden_dim: int) -> None:
        """Refuse indices that a block has not, or has once.

        Raises:
            ValueError: naming the entry.
        """
        if not isinstance(self.runs, bool):
            raise ValueError(f"{name}.runs: expected true or false, got {self.runs!r}")
        _check_indices(f"{name}.heads", self.heads, num_heads)
        if len(self.dims) != len(self.heads):
            raise ValueError(f"{name}.dims: expected those of each of {len(self.heads)} heads, got {len(self.dims)}")
        for head, dims in zip(self.heads, self.dims, strict=True):
            _check_indices(f"{name}.dims of head {head}", dims, head_dim)
        _check_indices(f"{name}.neurons", self.neurons, hidden_dim)
        _check_indices(f"{name}.constant_neurons", self.constant_neurons, hidden_dim)
        if twice := set(self.neurons) & set(self.constant_neurons):
            raise ValueError(f"{name}: neuron {min(twice)} is among neurons and constant_neurons")

    def value_channels(self, head_dim: int) -> tuple[int, ...]:
        """Surviving input channels of ``attn.proj``: head * d + dimension, ascending."""
        return tuple(head * head_dim + dim for head, dims in zip(self.heads, self.dims, strict=True) for dim in dims)

    @property
    def num_values(self) -> int:
        """V: surviving value dimensions of all heads."""
        return sum(len(dims) for dims in self.dims)


@dataclass(frozen=True)
class Structure:
    """A whole network.

    Attributes:
        embed_dim, num_heads, hidden_dim, num_patches, num_prefix_tokens: of the dense network.
        blocks: one per block of the dense network.
        patches: surviving patch positions where patches are removed from the sequence; None where all stay.
    """

    embed_dim: int
    num_heads: int
    hidden_dim: int
    num_patches: int
    num_prefix_tokens: int
    blocks: tuple[BlockStructure, ...] = field(repr=False)
    patches: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_heads", "hidden_dim", "num_patches", "num_prefix_tokens"):
            if not isinstance(value := getattr(self, name), int):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")
        for index, block in enumerate(self.blocks):
            block.check(f"blocks[{index}]", self.num_heads, self.head_dim, self.hidden_dim)
        if self.patches is not None:
            _check_indices("patches", self.patches, self.num_patches)

    @property
    def head_dim(self) -> int:
        """d of the dense network, which sets the scale of attention in the compressed one too."""
        return self.embed_dim // self.num_heads

    @property
    def running(self) -> tuple[int, ...]:
        """Indices of the blocks that run."""
        return tuple(index for index, block in enumerate(self.blocks) if block.runs)

    @classmethod
    def from_model(cls, model: GatedTransformer, *, remove_patches: bool | None = None) -> Structure:
        """Read the masks and gates of a model; a model without masks keeps everything. Waits for the device.

        Args:
            model: a gated backbone.
            remove_patches: take patches with a gate below one half as removed; None does so where the model's own
                forward pass removes them.

        Raises:
            UsageError: patches are to be removed and have no gates.
        """
        patches = None
        if model.gates.patch == "remove" if remove_patches is None else remove_patches:
            if model.patch_gating is None:
                raise UsageError("patches cannot be removed: the network has no patch_gating")
            patches = tuple(model.find_kept_patches().tolist())
        pairs = zip(blocks_of(model), model.runs(), strict=True)
        return cls(
            model.embed_dim, model.num_heads, model.hidden_dim, model.num_patches, model.num_prefix_tokens,
            tuple(_read_block(block, runs, model.num_heads) for block, runs in pairs), patches,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Structure:
        """Inverse of ``dataclasses.asdict``, perhaps through JSON.

        Raises:
            ValueError: naming the entry that is missing, unknown, or wrong.
        """
        try:
            blocks = tuple(BlockStructure(**frozen(block)) for block in content["blocks"])
            values: dict[str, Any] = {**frozen(content), "blocks": blocks}
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"this is no structure of a compressed network: {error!r}") from error


def frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values whose lists, at any depth, are tuples again, which JSON does not know."""

    def convert(value: Any) -> Any:
        return tuple(map(convert, value)) if isinstance(value, (list, tuple)) else value

    return {name: convert(value) for name, value in values.items()}


def _check_indices(name: str, indices: Any, number: int) -> None:
    whole = isinstance(indices, tuple) and all(type(index) is int for index in indices)
    if not whole or any(not 0 <= index < number for index in indices) or list(indices) != sorted(set(indices)):
        raise ValueError(f"{name}: expected whole numbers from 0 to {number - 1}, ascending, got {indices!r:.80}")


def _indices(kept: Tensor) -> tuple[int, ...]:
    return tuple(kept.nonzero().flatten().tolist())


def _read_block(block: Block, runs: bool, num_heads: int) -> BlockStructure:
    def kept(layer: nn.Module, dim: int) -> Tensor:
        """Whether any element of a column (dim 0 reduced) or row (dim 1) is unmasked."""
        mask: Tensor | None = vars(layer)["_buffers"].get("mask")
        return (torch.ones_like(layer.get_parameter("weight")) if mask is None else mask != 0).any(dim)

    columns = kept(block.attn.proj, 0)
    columns = columns & kept(block.attn.qkv, 1)[2 * len(columns) :]  # a masked row of the values is a constant
    columns = columns.view(num_heads, -1)  # (H, d)
    heads = _indices(columns.any(1))
    outputs, inputs = kept(block.mlp.fc2, 0), kept(block.mlp.fc1, 1)
    return BlockStructure(
        runs, heads, tuple(_indices(columns[head]) for head in heads), _indices(outputs & inputs),
        _indices(outputs & ~inputs),
    )  # fmt: skip
