"""Physical removal: from a network with masks and gates to a plain smaller one with the same outputs.

Not in the official code. The rules (all exact, so that outputs agree to rounding):

- a block whose gate says skip is not there;
- a head goes when all its columns of ``attn.proj`` are masked; a masked column of a head that stays takes its value
  dimension along, and queries and keys keep all d;
- a value dimension whose own row of ``attn.qkv`` is masked is the constant of its bias, because the weights of
  attention sum to one: it goes into the bias of ``attn.proj``;
- a neuron goes when its column of ``mlp.fc2`` is masked; one whose row of ``mlp.fc1`` is masked is the constant
  gelu(bias), which goes into the bias of ``mlp.fc2``;
- a patch whose gate is zero still owns its position and takes part in attention: only its embedding is not computed.
  Where the network's own forward pass removes patches, their tokens are not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc.models.compact import BlockShape, CompactAttention, CompactBlock, CompactConfig, CompactViT
from uvc.models.gates import GatedTransformer
from uvc.models.t2t_vit import GatedT2TViT
from uvc.structure import BlockStructure, Structure


@dataclass(frozen=True)
class Compressed:
    """The compact network and what of the masked one it holds."""

    network: CompactViT
    structure: Structure


@torch.no_grad()
def compress(model: GatedTransformer, *, multiple: int = 1, drop_patches: bool = False, name: str = "") -> Compressed:
    """Remove what masks and gates switch off.

    Args:
        model: a gated backbone with its masks; weights need not have been multiplied by them. Untouched.
        multiple: pad kept value dimensions of a layer and kept neurons to multiples of this by zeros.
        drop_patches: also take tokens of patches whose gate is below one half out of the sequence. This changes the
            outputs, unless the model's own forward pass does so: fine-tune afterwards.
        name: of the architecture, for information.

    Returns:
        The compact network in evaluation mode, in the model's precision and on its device.

    Raises:
        ValueError: the gates of the blocks blend instead of deciding, or patches are to be dropped and have no gates.
    """
    if model.gates.block_gating:
        raise ValueError("the blocks' gates are soft (block_gating is on): only hard gates can be removed")
    if drop_patches and model.patch_gating is None:
        raise ValueError("patches cannot be dropped: the checkpoint has no patch_gating")
    state = _masked_state(model)
    _fold_constant_values(state, len(model.blocks))
    structure = Structure.from_state_dict(
        state,
        num_heads=model.num_heads,
        remove_patches=drop_patches or model.gates.patch == "remove",
        running=model.runs(),
        num_prefix_tokens=model.num_prefix_tokens,
    )
    network = CompactViT(_config(model, structure, multiple, name)).to(model.cls_token)  # pyright: ignore[reportCallIssue, reportArgumentType]
    _copy(network, "", state, ("cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias"))
    if network.config.distilled:
        _copy(network, "", state, ("dist_token", "head_dist.weight", "head_dist.bias"))
    embedding = "tokens_to_token." if network.config.token_dim else "patch_embed.proj."
    _copy(network, "", state, [key for key in state if key.startswith(embedding) and not key.endswith(".mask")])
    _copy_positions(network, model, structure)
    for block, index in zip(network.blocks, structure.running, strict=True):
        assert isinstance(block, CompactBlock)
        _copy_block(block, state, f"blocks.{index}.", structure.blocks[index], structure)
    return Compressed(network.eval(), structure)


def _masked_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict with every weight multiplied by its mask."""
    state = {key: value.detach() for key, value in model.state_dict().items()}
    for key in [key for key in state if key.endswith(".mask")]:
        weight = f"{key.removesuffix('.mask')}.weight"
        state[weight] = state[weight] * state[key]
    return state


def _fold_constant_values(state: dict[str, Tensor], depth: int) -> None:
    """Value dimensions whose row of ``qkv`` is masked: their bias goes into that of ``proj``."""
    for prefix in (f"blocks.{index}.attn." for index in range(depth)):
        mask = state.get(f"{prefix}qkv.mask")
        if mask is None:
            continue
        width = mask.shape[1]
        dead = (mask[2 * width :] == 0).all(1)  # (D,); ``Structure`` leaves these out
        bias = state.get(f"{prefix}qkv.bias")
        if bias is not None and bool(dead.any()):
            constant = state[f"{prefix}proj.weight"] @ (bias[2 * width :] * dead)
            state[f"{prefix}proj.bias"] = state[f"{prefix}proj.bias"] + constant


def _config(model: GatedTransformer, structure: Structure, multiple: int, name: str) -> CompactConfig:
    """Sizes of the compact network."""
    running = structure.running
    ends = [*running, len(structure.blocks)][1:]
    blocks = tuple(
        BlockShape(
            value_dims=tuple(len(dims) for dims in structure.blocks[index].dims),
            neurons=len(structure.blocks[index].neurons),
            multiple=multiple,
            repeats=end - index if model.gates.jumping else 1,
        )
        for index, end in zip(running, ends, strict=True)
    )
    block: Any = model.blocks[0]
    positions, mode = structure.patches, model.gates.patch
    if mode == "hard" and positions is None:
        assert model.patch_gating is not None
        kept = model.patch_gating.flatten() >= 0
        kept[0] = True  # the published code forces the first patch on
        positions = tuple(kept.nonzero().flatten().tolist())
    shared: dict[str, Any] = {
        "architecture": name,
        "embed_dim": model.embed_dim,
        "head_dim": model.head_dim,
        "num_classes": model.num_classes,
        "blocks": blocks,
        "patches": model.num_patches,
        "qkv_bias": block.attn.qkv.bias is not None,
        "norm_eps": model.norm.eps,  # pyright: ignore[reportAttributeAccessIssue]
        "scale": block.scale,
        "distilled": model.num_prefix_tokens == 2,
        "positions": positions,
        "drop_tokens": structure.patches is not None,
        "patch_scale": mode in ("soft", "remove"),
        "sum_blocks": model.gates.jumping,
        "skipped_first": running[0] if running else len(structure.blocks),
    }
    if isinstance(model, GatedT2TViT):
        stages = model.tokens_to_token
        channels = stages.attention1.kqv.in_features // 49
        size = {"image_size": model.image_size, "patch_size": 0, "in_chans": channels}
        return CompactConfig(**shared, **size, token_dim=stages.attention1.width)
    embed: Any = model.patch_embed
    size = {"image_size": model.image_size, "patch_size": embed.patch_size[0]}
    return CompactConfig(**shared, **size, in_chans=embed.proj.in_channels)


def _copy(module: nn.Module, prefix: str, state: dict[str, Tensor], keys: Iterable[str]) -> None:
    """Entries ``prefix + key`` of the state to the parameters ``key``."""
    for key in keys:
        module.get_parameter(key).copy_(state[prefix + key])


def _copy_positions(network: CompactViT, model: GatedTransformer, structure: Structure) -> None:
    """Position embedding of the tokens that are left, and the patches' constants."""
    table, prefix = model.get_parameter("pos_embed"), structure.num_prefix_tokens
    if structure.patches is None:
        network.pos_embed.copy_(table)
    else:
        kept = torch.tensor(structure.patches, dtype=torch.long, device=table.device)
        network.pos_embed.copy_(torch.cat([table[:, :prefix], table[:, prefix:].index_select(1, kept)], dim=1))
    if network.config.patch_scale:
        assert model.patch_gating is not None
        scale, positions = model.patch_gating.sigmoid(), network.config.positions
        network.patch_scale.copy_(scale if positions is None else scale[:, list(positions)])


def _copy_block(
    block: CompactBlock, state: dict[str, Tensor], prefix: str, kept: BlockStructure, structure: Structure
) -> None:
    """Weights of one block, with the constants folded into biases."""
    head_dim, width = structure.head_dim, structure.embed_dim
    columns = list(kept.value_channels(head_dim))
    bias = state[f"{prefix}attn.proj.bias"]
    if isinstance(block.attn, CompactAttention):
        _copy(block, prefix, state, ("norm1.weight", "norm1.bias"))
        channels = [head * head_dim + dim for head in kept.heads for dim in range(head_dim)]
        rows = [*channels, *(width + row for row in channels), *(2 * width + row for row in columns)]
        qkv_bias = state.get(f"{prefix}attn.qkv.bias")
        _fill_rows(
            block.attn.qkv, state[f"{prefix}attn.qkv.weight"][rows], None if qkv_bias is None else qkv_bias[rows]
        )
        _fill_columns(block.attn.proj, state[f"{prefix}attn.proj.weight"][:, columns], bias)
    else:
        block.attn.get_parameter("bias").copy_(bias)
    bias = state[f"{prefix}mlp.fc2.bias"]
    output = state[f"{prefix}mlp.fc2.weight"]
    if constants := list(kept.constant_neurons):
        bias = bias + output[:, constants] @ F.gelu(state[f"{prefix}mlp.fc1.bias"][constants])
    if kept.neurons:
        neurons = list(kept.neurons)
        _copy(block, prefix, state, ("norm2.weight", "norm2.bias"))
        first, second = block.get_submodule("mlp.fc1"), block.get_submodule("mlp.fc2")
        _fill_rows(first, state[f"{prefix}mlp.fc1.weight"][neurons], state[f"{prefix}mlp.fc1.bias"][neurons])
        _fill_columns(second, output[:, neurons], bias)
    else:
        block.mlp.get_parameter("bias").copy_(bias)


def _fill_rows(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """The first rows of a layer; the others, which only pad, become zero."""
    assert isinstance(layer, nn.Linear)
    layer.weight.zero_()
    layer.weight[: len(weight)] = weight
    if layer.bias is not None and bias is not None:
        layer.bias.zero_()
        layer.bias[: len(bias)] = bias


def _fill_columns(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """The first columns of a layer; the others, which only pad, become zero."""
    assert isinstance(layer, nn.Linear)
    layer.weight.zero_()
    layer.weight[:, : weight.shape[1]] = weight
    layer.bias.copy_(bias)


def dense_config(config: CompactConfig, structure: Structure) -> CompactConfig:
    """Sizes of the network before removal, in the same code: what a speed-up is measured against."""
    full = BlockShape((structure.head_dim,) * structure.num_heads, structure.hidden_dim)
    blocks = (full,) * len(structure.blocks)
    return replace(config, blocks=blocks, positions=None, drop_tokens=False, skipped_first=0)
