"""What of a network survives, as plain indices: blocks, heads, head dimensions, neurons and patches.

``Structure.from_model`` and ``from_state_dict`` read it from masks and gates; the compressed file carries it as JSON,
so that the smaller network can be traced to the masked one.

L blocks, H heads, d channels of a head, M hidden neurons, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from uvc.models.gates import GatedTransformer


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

    @property
    def head_dim(self) -> int:
        """d of the dense network, which sets the scale of attention in the compressed one too."""
        return self.embed_dim // self.num_heads

    @property
    def running(self) -> tuple[int, ...]:
        """Indices of the blocks that run."""
        return tuple(index for index, block in enumerate(self.blocks) if block.runs)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence that is left."""
        return self.num_prefix_tokens + (self.num_patches if self.patches is None else len(self.patches))

    @classmethod
    def from_model(cls, model: GatedTransformer, *, remove_patches: bool | None = None) -> Structure:
        """Read the masks and gates of a model; a model without masks keeps everything.

        Args:
            model: a gated backbone.
            remove_patches: take patches with a gate below one half as removed; None does so where the model's own
                forward pass removes them.
        """
        if remove_patches is None:
            remove_patches = model.gates.patch == "remove"
        state = dict(model.state_dict())
        return cls.from_state_dict(
            state,
            num_heads=model.num_heads,
            remove_patches=remove_patches,
            running=model.runs(),
            num_prefix_tokens=model.num_prefix_tokens,
        )

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        *,
        num_heads: int,
        remove_patches: bool = False,
        running: Sequence[bool] | None = None,
        num_prefix_tokens: int | None = None,
    ) -> Structure:
        """Read the masks and gates of a state dict in the published names.

        Args:
            state: weights, with or without ``.mask`` entries and gates.
            num_heads: H, which a state dict does not tell.
            remove_patches: see ``from_model``.
            running: overrides the gates.
            num_prefix_tokens: None counts the distillation token if there is one.

        Raises:
            KeyError: an entry that every such state has is missing; the message names it.
        """
        depth = 0
        while f"blocks.{depth}.attn.proj.weight" in state:
            depth += 1
        for key in ("pos_embed", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight"):
            if key not in state:
                raise KeyError(f"this state dict has no {key}: it is not of a DeiT or T2T-ViT in the published names")
        hidden, width = state["blocks.0.mlp.fc1.weight"].shape
        if width % num_heads:
            raise ValueError(f"the width {width} is no multiple of the number of heads {num_heads}")
        if running is None:
            gates = state.get("block_skip_gating")
            rows = [[-1.0, 1.0]] * depth if gates is None else gates.tolist()
            running = [run > skip for skip, run in rows]
        prefix = num_prefix_tokens if num_prefix_tokens is not None else 1 + ("dist_token" in state)
        num_patches = state["pos_embed"].shape[1] - prefix
        patches = None
        if remove_patches:
            if state.get("patch_gating") is None:
                raise KeyError("patches cannot be removed: this state dict has no patch_gating")
            patches = _indices(state["patch_gating"].flatten() >= 0)
        blocks = tuple(_read_block(state, index, bool(running[index]), num_heads) for index in range(depth))
        return cls(width, num_heads, hidden, num_patches, prefix, blocks, patches)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Structure:
        """Inverse of ``to_dict``.

        Raises:
            ValueError: naming the entry that is missing or unknown.
        """
        try:
            blocks = tuple(
                BlockStructure(
                    runs=bool(block["runs"]),
                    heads=tuple(block["heads"]),
                    dims=tuple(tuple(dims) for dims in block["dims"]),
                    neurons=tuple(block["neurons"]),
                    constant_neurons=tuple(block.get("constant_neurons", ())),
                )
                for block in content["blocks"]
            )
            patches = content.get("patches")
            sizes = {key: int(content[key]) for key in _SIZES}
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no structure of a compressed network: {error!r}") from error
        return cls(**sizes, blocks=blocks, patches=None if patches is None else tuple(patches))


_SIZES = ("embed_dim", "num_heads", "hidden_dim", "num_patches", "num_prefix_tokens")


def _indices(kept: Tensor) -> tuple[int, ...]:
    return tuple(kept.nonzero().flatten().tolist())


def _read_block(state: Mapping[str, Tensor], index: int, runs: bool, num_heads: int) -> BlockStructure:
    def kept(layer: str, dim: int) -> Tensor:
        """Whether any element of a column (dim 0 reduced) or row (dim 1) is unmasked."""
        mask = state.get(f"blocks.{index}.{layer}.mask")
        if mask is None:
            weight = state[f"blocks.{index}.{layer}.weight"]
            return torch.ones(weight.shape[1 - dim], dtype=torch.bool)
        return (mask != 0).any(dim)

    columns = kept("attn.proj", 0)
    columns = columns & kept("attn.qkv", 1)[2 * len(columns) :]  # a masked row of the values is a constant
    columns = columns.view(num_heads, -1)  # (H, d)
    heads = _indices(columns.any(1))
    outputs, inputs = kept("mlp.fc2", 0), kept("mlp.fc1", 1)
    return BlockStructure(
        runs=runs,
        heads=heads,
        dims=tuple(_indices(columns[head]) for head in heads),
        neurons=_indices(outputs & inputs),
        constant_neurons=_indices(outputs & ~inputs),
    )
