"""Physical removal: from a network with masks and gates to a plain smaller one with the same outputs; what it saves.

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

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.measure.benchmark import choose_clock, compare, device_name, random_images
from common.measure.flops import CONVENTIONS, count_parameters
from uvc.cost_model import CostModel
from uvc.models.compact import BlockShape, CompactConfig, CompactViT
from uvc.models.gates import GatedTransformer
from uvc.models.t2t_vit import GatedT2TViT
from uvc.structure import Structure


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
    structure = Structure.from_model(model, remove_patches=drop_patches or None)
    state = _folded_state(model, structure)
    state["pos_embed"] = _kept_positions(state["pos_embed"], structure)
    sources: dict[str, Sequence[int]] = {}
    for place, index in enumerate(structure.running):  # blocks are renumbered
        old, new, block = f"blocks.{index}.", f"blocks.{place}.", structure.blocks[index]
        state |= {new + key.removeprefix(old): state[key] for key in list(state) if key.startswith(old)}
        state |= {f"{new}attn.bias": state[f"{new}attn.proj.bias"], f"{new}mlp.bias": state[f"{new}mlp.fc2.bias"]}
        columns, width = block.value_channels(structure.head_dim), structure.embed_dim
        keys = [head * structure.head_dim + dim for head in block.heads for dim in range(structure.head_dim)]
        sources[f"{new}attn.qkv"] = [*keys, *(width + row for row in keys), *(2 * width + row for row in columns)]
        sources[f"{new}attn.proj"] = columns
        sources[f"{new}mlp.fc1"] = sources[f"{new}mlp.fc2"] = block.neurons
    config = config_of(model, structure, multiple, name)
    if config.patch_scale:
        assert model.patch_gating is not None
        scale = model.patch_gating.sigmoid()
        state["patch_scale"] = scale if config.positions is None else scale[:, list(config.positions)]
    network = CompactViT(config).to(model.cls_token).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
    return Compressed(network.fill_(state, sources), structure)


def _folded_state(model: GatedTransformer, structure: Structure) -> dict[str, Tensor]:
    """State dict with masks multiplied in, and with what is constant under them added to the biases behind it."""
    state = {key: value.detach() for key, value in model.state_dict().items()}
    for key in [key for key in state if key.endswith(".mask")]:
        weight = f"{key.removesuffix('.mask')}.weight"
        state[weight] = state[weight] * state[key]
    for index, block in enumerate(structure.blocks):
        attn, mlp = f"blocks.{index}.attn.", f"blocks.{index}.mlp."
        mask, bias = state.get(f"{attn}qkv.mask"), state.get(f"{attn}qkv.bias")
        if mask is not None and bias is not None:
            dead = (mask[2 * structure.embed_dim :] == 0).all(1)  # (D,): value dimensions without a row
            constant = state[f"{attn}proj.weight"] @ (bias[2 * structure.embed_dim :] * dead)
            state[f"{attn}proj.bias"] = state[f"{attn}proj.bias"] + constant
        neurons = list(block.constant_neurons)
        constant = state[f"{mlp}fc2.weight"][:, neurons] @ F.gelu(state[f"{mlp}fc1.bias"][neurons])
        state[f"{mlp}fc2.bias"] = state[f"{mlp}fc2.bias"] + constant
    return state


def _kept_positions(table: Tensor, structure: Structure) -> Tensor:
    """Position embedding of the tokens that are left."""
    if structure.patches is None:
        return table
    prefix = structure.num_prefix_tokens
    kept = torch.tensor([*range(prefix), *(prefix + patch for patch in structure.patches)], device=table.device)
    return table.index_select(1, kept)


def config_of(model: GatedTransformer, structure: Structure, multiple: int = 1, name: str = "") -> CompactConfig:
    """Sizes of the compact network; arguments as ``compress``."""
    running, depth = structure.running, len(structure.blocks)
    blocks = tuple(
        BlockShape(
            tuple(len(dims) for dims in structure.blocks[index].dims),
            len(structure.blocks[index].neurons),
            multiple,
            repeats=end - index if model.gates.jumping else 1,
        )
        for index, end in zip(running, [*running, depth][1:], strict=True)
    )
    positions, mode = structure.patches, model.gates.patch
    if mode == "hard" and positions is None:  # the published code forces the first patch on
        positions = tuple(sorted({0, *model.find_kept_patches().tolist()}))
    block: Any = model.blocks[0]
    norm: Any = model.norm
    embedding: dict[str, Any]
    if isinstance(model, GatedT2TViT):
        first: Any = model.tokens_to_token.attention1
        embedding = {"patch_size": 0, "in_chans": first.kqv.in_features // 49, "token_dim": first.width}
    else:
        embed: Any = model.patch_embed
        embedding = {"patch_size": embed.patch_size[0], "in_chans": embed.proj.in_channels}
    return CompactConfig(
        architecture=name,
        image_size=model.image_size,
        embed_dim=model.embed_dim,
        head_dim=model.head_dim,
        num_classes=model.num_classes,
        blocks=blocks,
        patches=model.num_patches,
        qkv_bias=block.attn.qkv.bias is not None,
        norm_eps=norm.eps,
        scale=block.scale,
        distilled=model.num_prefix_tokens == 2,
        positions=positions,
        drop_tokens=structure.patches is not None,
        patch_scale=mode in ("soft", "remove"),
        sum_blocks=model.gates.jumping,
        skipped_first=running[0] if running else depth,
        **embedding,
    )


def dense_config(config: CompactConfig, structure: Structure) -> CompactConfig:
    """Sizes of the network before removal, in the same code: what a speed-up is measured against."""
    full = BlockShape((structure.head_dim,) * structure.num_heads, structure.hidden_dim)
    blocks = (full,) * len(structure.blocks)
    return replace(config, blocks=blocks, positions=None, drop_tokens=False, skipped_first=0)


def costs_of(model: GatedTransformer, compressed: Compressed) -> dict[str, float]:
    """Counted by the paper's rules and really there: GMACs, share of the dense network, parameters."""
    cost, network = CostModel(model, dtype=torch.float64), compressed.network
    ratio, full = cost.of_structure(compressed.structure), float(cost.full)
    with torch.device("meta"):
        dense = CompactViT(dense_config(network.config, compressed.structure))
    rules = CONVENTIONS["uvc"]
    counted = network.count()
    real, real_full = rules.total(counted.published), rules.total(dense.count().published)
    return {
        "remaining_percent": 100 * ratio,
        "counted_gmacs": ratio * full / 1e9,
        "dense_gmacs": full / 1e9,
        "real_gmacs": real / 1e9,
        "real_remaining_percent": 100 * real / real_full,
        "padding_gmacs": (counted.executed.macs - counted.published.macs) / 1e9,
        "params_m": count_parameters(network) / 1e6,
        "dense_params_m": count_parameters(dense) / 1e6,
    }


def measure_speeds(
    compressed: Compressed,
    versions: dict[str, CompactViT],
    *,
    device: torch.device,
    dtype: str,
    batch: int,
    rounds: int,
    processor_time: bool,
) -> list[dict[str, Any]]:
    """Speed-up of each version over the dense network, and what of the counted saving it realises.

    Args:
        compressed, versions: the network, and forms of it by name.
        device, dtype, batch, rounds: of the passes, all networks in turns.
        processor_time: time what one thread of a CPU computes instead of the time that passes.
    """
    config = compressed.network.config
    networks = {"dense": CompactViT(dense_config(config, compressed.structure))} | versions
    networks = {name: deepcopy(network).to(device, getattr(torch, dtype)).eval() for name, network in networks.items()}
    images = random_images(batch, config.image_size[0], device, getattr(torch, dtype))
    clock = choose_clock(processor_time, device)
    where = device_name(device) + (", processor time, 1 thread" if processor_time else "")
    speeds = compare(networks, images, baseline="dense", rounds=rounds, progress="benchmark", clock=clock)
    macs = {name: CONVENTIONS["uvc"].total(network.count().published) for name, network in networks.items()}
    rows = []
    for name, paired in speeds.items():
        share, speed = macs[name] / macs["dense"], paired.speed
        rows.append({
            "network": name, "latency_ms": speed.latency_ms, "throughput_ips": speed.throughput_ips,
            "speedup": paired.speedup, "flops_ratio": 1 / share, "realised": paired.speedup * share,
            "device": where, "dtype": dtype, "batch_size": batch,
        })  # fmt: skip
    return rows
