"""Files of compact networks: safetensors with its own description, timm's modules, torch.export and ONNX.

A file ``F.safetensors`` holds the weights and, in its header, everything that builds the network again; ``F.json`` says
the same for readers, with the kept indices of every block, which trace the file to the masked checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.run.checkpoint import (
    CheckpointError,
    build_described,
    load_strict,
    naming,
    read_described,
    save_described,
)
from common.run.errors import UsageError
from common.run.files import write_atomic
from common.sizes import TIMM
from uvc.models import create
from uvc.models.compact import LANES, CompactConfig, CompactViT, padded
from uvc.models.timm_vit import keep_blocks_, narrow_, ungated
from uvc.removal import Compressed
from uvc.structure import Structure

FORMAT = "uvc compact network 1"
KEY = "uvc"
"""The entry of the header that holds the description."""


def save_compact(compressed: Compressed, path: str | os.PathLike[str], **facts: Any) -> tuple[Path, Path]:
    """Write the network and, beside it, its description; each whole or not at all.

    Args:
        compressed: what ``uvc.removal.compress`` gave.
        path: of the weights; the suffix ``.safetensors`` is added where it lacks.
        facts: plain values for the description, such as costs and the source.

    Returns:
        Paths of the weights and of the description.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    network: Any = compressed.network
    structure = asdict(compressed.structure)
    if isinstance(network, CompactViT):
        config = asdict(network.config)
    else:
        config = {"architecture": compressed.name, "image_size": network.patch_embed.img_size,
                  "num_classes": network.num_classes,
                  "neurons": [block.mlp.fc1.out_features for block in network.blocks]}  # fmt: skip
    description = {"format": FORMAT, **facts, "config": config, "structure": structure}
    state = {key: value.detach().cpu().contiguous() for key, value in compressed.network.state_dict().items()}
    save_described(path, state, KEY, json.dumps(description))
    write_atomic(path.with_suffix(".json"), json.dumps(description, indent=1) + "\n")
    return path, path.with_suffix(".json")


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in the header of a file.

    Raises:
        CheckpointError: missing, damaged, or not written by ``save_compact``.
    """
    return _read(path, weights=False)[0]


def _read(path: str | os.PathLike[str], *, weights: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights."""
    content, state = read_described(path, KEY, weights=weights)
    if content is None or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: the header has no {FORMAT!r}, so this is no file of uvc/compress.py; for a masked checkpoint run "
            "uvc/compress.py first"
        )
    return content, state


def load_compact(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu", multiple: int = LANES
) -> Compressed:
    """The network of a file, in evaluation mode, and what it holds of the masked one.

    Args:
        path: of the weights.
        device: where the network goes.
        multiple: see ``padded``; 1 leaves the layers as they are in the file.

    Raises:
        CheckpointError: not such a file, or the weights do not fit its description.
    """
    content, state = _read(path)
    with naming(path, "its description is damaged"):
        config, structure = content["config"], Structure.from_dict(content["structure"])
        name = config["architecture"]

        def build() -> VisionTransformer | CompactViT:
            return (
                _pruned_timm(config, structure)
                if name.startswith(TIMM)
                else CompactViT(CompactConfig.from_dict(config))
            )

        network = build_described(build, config, state)
        network.to(next(iter(state.values())).dtype)
        load_strict(network, state, source=path)
    network = network.to(device).eval()
    if isinstance(network, CompactViT) and multiple > 1:
        network = padded(network, multiple)
    return Compressed(network, structure, name)


# timm


def _pruned_timm(config: Mapping[str, Any], structure: Structure) -> VisionTransformer:
    """The network of a description, with any weights."""
    size: Any = tuple(config["image_size"])
    network = ungated(create(config["architecture"], num_classes=config["num_classes"], img_size=size))
    keep_blocks_(network, structure.running)
    for block, index, neurons in zip(network.blocks, structure.running, config["neurons"], strict=True):
        narrow_(block, max(len(structure.blocks[index].heads), 1), neurons)
    return network


@torch.no_grad()
def to_timm(network: CompactViT | VisionTransformer) -> VisionTransformer:
    """The same function as a module of timm, in evaluation mode; distilled networks as timm's distilled class.

    timm's attention wants d value dimensions in every head, so those that were removed come back as zeros; branches
    without heads or neurons become one head or neuron of zeros. Heads, neurons and blocks stay removed. A network
    without pruned dimensions has the very same state dict on both sides.

    Raises:
        UsageError: naming what timm's VisionTransformer has no place for.
    """
    if not isinstance(network, CompactViT):
        return network
    config = network.config
    problems = {
        "T2T's tokens-to-token module": bool(config.token_dim),
        "a constant per patch position (soft patch gates)": config.patch_scale,
        "removed patches": config.positions is not None,
        "the sum of all blocks": config.sum_blocks,
        "another scale of attention": config.scale is not None,
    }
    if found := [what for what, present in problems.items() if present]:
        raise UsageError(f"timm's VisionTransformer has no place for {', '.join(found)}; use load_compact()")
    sizes: dict[str, Any] = {
        "img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.in_chans,
        "num_classes": config.num_classes, "embed_dim": config.embed_dim, "depth": len(config.blocks),
        "num_heads": config.embed_dim // config.head_dim, "qkv_bias": config.qkv_bias, "weight_init": "skip",
    }  # fmt: skip
    make = VisionTransformerDistilled if config.distilled else VisionTransformer
    model = make(**sizes, norm_layer=partial(nn.LayerNorm, eps=config.norm_eps))  # pyright: ignore[reportArgumentType]
    for block, shape in zip(model.blocks, config.blocks, strict=True):
        narrow_(block, max(shape.heads, 1), max(shape.neurons, 1))
    state = padded(network, 1, full_values=True).state_dict()
    for index in range(len(config.blocks)):  # the bias is all that is left of a branch that is a constant
        for branch, last in (("attn", "proj"), ("mlp", "fc2")):
            if (bias := state.get(f"blocks.{index}.{branch}.bias")) is not None:
                state[f"blocks.{index}.{branch}.{last}.bias"] = bias
    model.to(network.cls_token)  # pyright: ignore[reportCallIssue, reportArgumentType] - dtype and device
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name]) if name in state else parameter.zero_()
    return model.eval()


# Checks


def difference(network: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Largest difference of the logits, relative to the largest logit of the other."""
    with torch.no_grad():
        want, got = other(images), network(images)
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def example_images(shape: tuple[int, int, int], batch: int = 2, *, seed: int = 0) -> Tensor:
    """Normal numbers in the shape of a batch of images (channels, height, width)."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
