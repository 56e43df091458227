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

A network of timm stays one: ``prune``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.hosts.host import channels_of
from common.measure.benchmark import choose_clock, compare, device_name, random_images
from common.measure.flops import CONVENTIONS, Counted, count_operations, count_parameters
from common.run.errors import UsageError
from uvc.cost_model import CostModel
from uvc.models.compact import BlockShape, CompactConfig, CompactViT, fill_, padded, round_up
from uvc.models.gates import GatedTransformer
from uvc.models.t2t_vit import GatedT2TViT
from uvc.models.timm_vit import GatedTimm, check_prunable, keep_blocks_, narrow_, ungated
from uvc.structure import Structure


@dataclass(frozen=True)
class Compressed:
    """The compact network and what of the masked one it holds.

    Attributes:
        network: plain modules; timm's where the masked network's are.
        name: of the architecture, for information; of a timm network, for building it again.
    """

    network: CompactViT | VisionTransformer
    structure: Structure
    name: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        if isinstance(self.network, CompactViT):
            return self.network.config.in_chans, *self.network.config.image_size
        height, width = self.network.patch_embed.img_size
        return channels_of(self.network), height, width


def compress(model: GatedTransformer, *, multiple: int = 1, drop_patches: bool = False, name: str = "") -> Compressed:
    """Remove what masks and gates switch off.

    Args:
        model: a gated backbone with its masks; weights need not have been multiplied by them. Untouched.
        multiple: pad kept value dimensions of a layer and kept neurons to multiples of this by zeros.
        drop_patches: also take tokens of patches whose gate is below one half out of the sequence. This changes the
            outputs, unless the model's own forward pass does so: fine-tune afterwards.
        name: of the architecture.

    Returns:
        The compact network in evaluation mode, in the model's precision and on its device.

    Raises:
        ValueError: the gates of the blocks blend instead of deciding, or patches are to be dropped and have no gates.
    """
    if model.gates.block_gating:
        raise ValueError("the blocks' gates are soft (block_gating is on): only hard gates can be removed")
    structure = Structure.from_model(model, remove_patches=drop_patches or None)
    if isinstance(model, GatedTimm):
        return Compressed(prune(model, structure, multiple=multiple).eval(), structure, name)
    config = config_of(model, structure, multiple, name)
    state, sources = _kept_state(model, structure)
    if config.patch_scale:
        assert model.patch_gating is not None
        scale = model.patch_gating.detach().sigmoid()
        state["patch_scale"] = scale if config.positions is None else scale[:, list(config.positions)]
    network = CompactViT(config).to(model.cls_token).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
    return Compressed(network.fill_(state, sources), structure, name)


def prune(model: nn.Module, structure: Structure | Mapping[str, Any], *, multiple: int = 1) -> VisionTransformer:
    """A plain ViT of timm less heads, neurons and blocks: the model's own class, smaller, with plain modules.

    What is left computes what ``model`` does with the columns of ``attn.proj`` and ``mlp.fc2`` that go set to zero and
    without the blocks that are skipped. Single dimensions that go from a head that stays are zeros, as timm's heads
    have as many values as queries; a block of which no head or neuron is left keeps one of zeros.

    Args:
        model: timm's ``VisionTransformer`` or a subclass, or a gated one with its masks. Untouched.
        structure: what to keep; also as the dict that ``uvc/compress.py`` writes as JSON.
        multiple: pad kept neurons to multiples of this by zeros.

    Returns:
        A network in the model's precision and mode, on its device.

    Raises:
        NotAHost: a module hinders it; the message names it and says why.
        UsageError: the structure is of another network, or keeps no block.
        ValueError: the dict is no structure.
    """
    if isinstance(structure, Mapping):
        structure = Structure.from_dict(structure.get("structure", structure))
    if not isinstance(structure, Structure):
        raise UsageError(
            f"structure: expected a Structure or the dict of a file of uvc/compress.py, got {structure!r:.80}"
        )
    if type(multiple) is not int or multiple < 1:
        raise UsageError(f"multiple: expected a whole number of at least 1, got {multiple!r}")
    net = ungated(model)
    check_prunable(net)
    _check_fits(net, structure)
    state, sources = _kept_state(model, structure)
    targets: dict[str, Sequence[int]] = {}
    for place, index in enumerate(structure.running):
        kept, width, name = structure.blocks[index], structure.head_dim, f"blocks.{place}."
        heads = max(len(kept.heads), 1)
        narrow_(net.blocks[index], heads, round_up(max(len(kept.neurons), 1), multiple))
        values = [place * width + dim for place, dims in enumerate(kept.dims) for dim in dims]
        keys = range(len(kept.heads) * width)
        first = heads * width
        targets[f"{name}attn.qkv"] = [*keys, *(first + row for row in keys), *(2 * first + row for row in values)]
        targets[f"{name}attn.proj"] = values
        targets[f"{name}mlp.fc1"] = targets[f"{name}mlp.fc2"] = range(len(kept.neurons))
    keep_blocks_(net, structure.running)
    fill_(net, state, sources, targets)
    return net.train(model.training)


def _check_fits(net: VisionTransformer, structure: Structure) -> None:
    block: Any = net.blocks[0]
    own = {
        "embed_dim": net.embed_dim, "num_heads": block.attn.num_heads, "hidden_dim": block.mlp.fc1.out_features,
        "blocks": len(net.blocks),
    }  # fmt: skip
    other = {name: getattr(structure, name) for name in own} | {"blocks": len(structure.blocks)}
    if wrong := [f"{name} {other[name]} instead of {own[name]}" for name in own if own[name] != other[name]]:
        raise UsageError(f"the structure is of another network than this {type(net).__name__}: {', '.join(wrong)}")
    if structure.patches is not None:
        raise UsageError("the structure removes patches, for which a network of timm has no place")
    if not structure.running:
        raise UsageError("the structure skips every block: nothing but the embedding would be left")


def _kept_state(model: nn.Module, structure: Structure) -> tuple[dict[str, Tensor], dict[str, Sequence[int]]]:
    """Weights with blocks renumbered, and where each layer of theirs holds what is kept."""
    state = _folded_state(model, structure)
    if structure.patches is not None:
        state["pos_embed"] = _kept_positions(state["pos_embed"], structure)
    sources: dict[str, Sequence[int]] = {}
    for place, index in enumerate(structure.running):
        old, new, block = f"blocks.{index}.", f"blocks.{place}.", structure.blocks[index]
        state |= {new + key.removeprefix(old): state[key] for key in list(state) if key.startswith(old)}
        state |= {f"{new}attn.bias": state[f"{new}attn.proj.bias"], f"{new}mlp.bias": state[f"{new}mlp.fc2.bias"]}
        columns, width = block.value_channels(structure.head_dim), structure.embed_dim
        keys = [head * structure.head_dim + dim for head in block.heads for dim in range(structure.head_dim)]
        sources[f"{new}attn.qkv"] = [*keys, *(width + row for row in keys), *(2 * width + row for row in columns)]
        sources[f"{new}attn.proj"] = columns
        sources[f"{new}mlp.fc1"] = sources[f"{new}mlp.fc2"] = block.neurons
    return state, sources


@torch.no_grad()
def _folded_state(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
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
        neurons, act = list(block.constant_neurons), model.get_submodule(f"{mlp}act")
        constant = state[f"{mlp}fc2.weight"][:, neurons] @ act(state[f"{mlp}fc1.bias"][neurons])
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


def dense_network(model: GatedTransformer, compressed: Compressed) -> CompactViT | VisionTransformer:
    """The network before removal as the compact one is built: what a speed-up is measured against; random weights."""
    if isinstance(compressed.network, CompactViT):
        return CompactViT(dense_config(compressed.network.config, compressed.structure))
    return ungated(model)


def versions_of(compressed: Compressed, multiple: int) -> dict[str, nn.Module]:
    """The compact network in the forms that differ in speed, by name; ``multiple`` is what it was padded to."""
    network = compressed.network
    if not isinstance(network, CompactViT):
        return {"compact": network}
    versions: dict[str, nn.Module] = {"compact": padded(network), "compact, exact sizes": padded(network, 1)}
    return versions | ({f"compact, multiples of {multiple}": network} if multiple > 1 else {})


def count(network: nn.Module, image_shape: tuple[int, int, int]) -> Counted:
    """Operations of one image, without weights or data; of a timm network all that it executes is published."""
    if isinstance(network, CompactViT):
        return network.count()
    dtype = next(network.parameters()).dtype
    return count_operations(network, torch.empty(1, *image_shape, dtype=dtype, device="meta"))


def costs_of(model: GatedTransformer, compressed: Compressed) -> dict[str, float]:
    """Counted by the cost model and really there: GMACs, share of the dense network, parameters."""
    cost, network, shape = CostModel(model, dtype=torch.float64), compressed.network, compressed.image_shape
    ratio, full = cost.of_structure(compressed.structure), float(cost.full)
    with torch.device("meta"):
        dense = dense_network(model, compressed)
    rules = CONVENTIONS["uvc"]
    counted = count(network, shape)
    real, real_full = rules.total(counted.published), rules.total(count(dense, shape).published)
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
    dense: nn.Module,
    versions: Mapping[str, nn.Module],
    image_shape: tuple[int, int, int],
    *,
    device: torch.device,
    dtype: str,
    batch: int,
    rounds: int,
    processor_time: bool,
) -> list[dict[str, Any]]:
    """Speed-up of each version over the dense network, and what of the counted saving it realises.

    Args:
        dense, versions: the network before removal, and forms of the compact one by name.
        image_shape: of an image.
        device, dtype, batch, rounds: of the passes, all networks in turns.
        processor_time: time what one thread of a CPU computes instead of the time that passes.
    """
    networks = {"dense": dense, **versions}
    networks = {name: deepcopy(network).to(device, getattr(torch, dtype)).eval() for name, network in networks.items()}
    images = random_images(batch, image_shape[1], device, getattr(torch, dtype))
    clock = choose_clock(processor_time, device)
    where = device_name(device) + (", processor time, 1 thread" if processor_time else "")
    speeds = compare(networks, images, baseline="dense", rounds=rounds, progress="benchmark", clock=clock)
    macs = {name: CONVENTIONS["uvc"].total(count(net, image_shape).published) for name, net in networks.items()}
    rows = []
    for name, paired in speeds.items():
        share, speed = macs[name] / macs["dense"], paired.speed
        rows.append({
            "network": name, "latency_ms": speed.latency_ms, "throughput_ips": speed.throughput_ips,
            "speedup": paired.speedup, "flops_ratio": 1 / share, "realised": paired.speedup * share,
            "device": where, "dtype": dtype, "batch_size": batch,
        })  # fmt: skip
    return rows
