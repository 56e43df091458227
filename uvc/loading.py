"""Reading weights: dense networks, files of stage 1 and 2 of ours, and official bare state dicts with masks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.run.checkpoint import CheckpointError, load_safely, load_strict, locate, save_atomic, select_state
from common.run.distributed import get_logger, main_process_first
from uvc import checkpoints
from uvc.models import MODELS
from uvc.models.gates import GatedTransformer, PatchMode, apply_masks_
from uvc.structure import Structure

logger = get_logger(__name__)

OWN = ("block_skip_gating", "*.attn_skip_gating", "*.mlp_skip_gating", "patch_gating", "gumbel.*", "*.mask")
"""Entries that a dense checkpoint lacks."""

METADATA = "uvc"


def read_state(source: str | os.PathLike[str], *, prefer_ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a checkpoint file or URL, and what our own files say besides.

    Args:
        source: path or URL.
        prefer_ema: take the averaged weights of T2T-ViT's files first.

    Raises:
        CheckpointError: unreadable, or without weights.
    """
    with main_process_first():
        path = locate(source)
    content = load_safely(path)
    keys = ("state_dict_ema", "model", "state_dict") if prefer_ema else ("model", "state_dict_ema", "state_dict")
    state = select_state(content, keys, source=str(path))
    metadata = content.get(METADATA) if isinstance(content, Mapping) else None
    return state, dict(metadata) if isinstance(metadata, Mapping) else {}


def load_dense(
    model: GatedTransformer, source: str | os.PathLike[str], *, model_type: str, new_head: bool = False
) -> None:
    """Load a dense checkpoint; gates and token scores that it lacks stay as they are.

    A file of stage 1 or 2 is taken too, to start again from it: its gates are loaded and its masks multiplied in.

    Args:
        model: takes the weights. T2T-ViT's position table is computed, not loaded.
        source: file or URL.
        model_type: name of the network.
        new_head: where the file's head is for another number of classes, leave the model's with a warning.

    Raises:
        CheckpointError: listing every difference.
    """
    state, _ = read_state(source, prefer_ema=model_type.startswith("t2t"))
    own = model.state_dict()
    masks = [key for key in state if key.endswith(".mask")]
    for key in masks:
        weight = f"{key.removesuffix('.mask')}.weight"
        mask = state.pop(key)
        if weight in state and state[weight].shape == mask.shape:
            state[weight] = state[weight] * mask
    if masks:
        logger.info("%s: its masks are multiplied into its weights, and masks start anew", os.fspath(source))
    for key in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"):
        if new_head and key in state and key in own and state[key].shape != own[key].shape:
            logger.warning(
                "%s: %s is for %d classes, the data has %d: this layer starts from random weights",
                os.fspath(source), key, len(state[key]), len(own[key]),
            )  # fmt: skip
            state[key] = own[key]
    if model_type.startswith("t2t") and "pos_embed" in state:
        state["pos_embed"] = own["pos_embed"]  # a fixed table of sines, whatever the number of patches
    if ("dist_token" in state) != (getattr(model, "dist_token", None) is not None):
        has = "has a" if "dist_token" in state else "has no"
        raise CheckpointError(
            f"{os.fspath(source)} {has} distillation token, --model_type {model_type} "
            f"{'has none' if 'dist_token' in state else 'has one'}: choose the plain or the distilled name to match"
        )
    load_strict(model, state, allow_missing=OWN, allow_unexpected=("patch_gating",), source=source)


@dataclass(frozen=True)
class Masked:
    """A masked network and what its file says: the names are those of ``save_masked``."""

    model: GatedTransformer
    model_type: str
    metadata: Mapping[str, Any]


def load_masked(
    source: str | os.PathLike[str], *, model_type: str | None = None, patch_mode: PatchMode | None = None
) -> Masked:
    """The network of a stage-1 or stage-2 file with its weights masked, blocks and patches fixed, gates frozen.

    Args:
        source: a file of ours, or an official bare state dict with ``.mask`` entries.
        model_type: needed for files that do not say it.
        patch_mode: what patch gates do; None takes what the file says, and ``soft`` where there are gates but no word.

    Raises:
        CheckpointError: no model type known, another network than the file's, or entries that do not fit, listed.
    """
    with main_process_first():
        path = locate(source)
    model, metadata = checkpoints.load_masked(path, model_type or "", patch=patch_mode or "")
    stated = metadata.get("model_type")
    if model_type is not None and stated is not None and stated != model_type:
        raise CheckpointError(f"{path} is of {stated}, not of {model_type}: give --model_type {stated}")
    apply_masks_(model)
    model.fix_blocks()
    freeze_structure(model)
    if all(bool(mask.all()) for name, mask in model.named_buffers() if name.endswith("mask")) and all(model.runs()):
        logger.warning("%s: no weight is masked and every block runs: this is the dense network", path)
    return Masked(model, str(model_type or stated or checkpoints.name_in(path.name)), metadata)


def freeze_structure(model: GatedTransformer) -> None:
    """No gradients for gates and for the blocks that are skipped: their values cannot change the output."""
    freeze_idle(model)
    model.block_skip_gating.requires_grad_(False)
    if model.patch_gating is not None:
        model.patch_gating.requires_grad_(False)
    for block, runs in zip(model.blocks, model.runs(), strict=True):
        if not runs:
            block.requires_grad_(False)


def freeze_idle(model: GatedTransformer, *, token_scores: bool = False) -> None:
    """No gradients for parameters that no forward pass reads: the gates of block halves, unused token scores."""
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_skip_gating", "mlp_skip_gating")) or (name.startswith("gumbel.") and not token_scores):
            parameter.requires_grad_(False)


def save_masked(
    path: str | os.PathLike[str],
    model: GatedTransformer,
    *,
    model_type: str,
    bare: bool = False,
    patch_mode: str = "off",
    **more: Any,
) -> Path:
    """Write weights and masks; call it on one rank.

    Args:
        path: of the file.
        model: its weights are written as they are; multiply them by their masks first where that is wanted.
        model_type: name of the network.
        bare: the state dict alone, as the official code writes it; else with ``model_type``, image size, structure
            and ``more`` beside it.
        patch_mode: what the patch gates mean.
    """
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    if bare:
        return save_atomic(state, path)
    remove = patch_mode == "remove"
    structure = Structure.from_state_dict(
        state, num_heads=model.num_heads, remove_patches=remove, num_prefix_tokens=model.num_prefix_tokens
    )
    metadata = {
        "model_type": model_type,
        "img_size": image_size(model),
        "patch_mode": patch_mode,
        "jumping": model.gates.jumping,
        "structure": json.loads(structure.to_json()),
        **more,
    }
    return save_atomic({"model": state, METADATA: metadata}, path)


def image_size(model: GatedTransformer) -> int:
    """Side of the network's input in pixels."""
    if hasattr(model, "patch_embed"):
        size: Any = model.patch_embed.img_size  # pyright: ignore[reportAttributeAccessIssue]
        return int(size[0])
    return int(model.img_size)  # pyright: ignore[reportArgumentType]


def default_image_size(model_type: str) -> int:
    """Side of the input of a network by its name."""
    return int(MODELS[model_type][1].get("img_size", 224)) if model_type in MODELS else 224
