"""Reading and writing weights: dense networks, our files of stage 1 and 2, published bare state dicts with masks.

A published file is the bare state dict of the gated network with ``.mask`` entries; ours hold it under ``model``, with
what else is to be known beside it. All are read without running code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.hosts.opening import create_timm, timm_state
from common.run.checkpoint import keep_own_heads, load_strict, read_checkpoint, save_atomic, select_state
from common.run.errors import CheckpointError
from common.run.program import get_logger
from common.sizes import TIMM
from uvc.models import MODELS, create
from uvc.models.gates import GatedTransformer, apply_masks_, register_masks
from uvc.structure import Structure

logger = get_logger(__name__)

OWN = ("*_gating", "gumbel.*", "*.mask")
"""Entries that a dense checkpoint lacks; then everything is kept."""
METADATA = "uvc"
"""Where our files say what they are, besides the flags of a training state under ``args``."""


@dataclass(frozen=True)
class Masked:
    """A masked network and the name of its architecture."""

    model: GatedTransformer
    model_type: str
    source: str = ""
    """file that it is of"""
    data: Mapping[str, Any] | None = None
    """what the file says of the images that it was trained on"""


def read_state(source: str | os.PathLike[str], *, prefer_ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a checkpoint file or URL, and what our own files say besides.

    Args:
        source: path or URL.
        prefer_ema: take the averaged weights of T2T-ViT's files first.

    Raises:
        CheckpointError: unreadable, or without weights.
    """
    if str(source).endswith(".safetensors") and _is_compact(Path(source)):
        raise CheckpointError(f"{source}: a compact network of compress.py; give the masked checkpoint it is from")
    content = read_checkpoint(source)
    keys = ("state_dict_ema", "model", "state_dict") if prefer_ema else ("model", "state_dict_ema", "state_dict")
    said: dict[str, Any] = {}
    for key in ("args", METADATA):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            said |= content[key]
    if isinstance(content, Mapping) and "data" in content:
        said["data"] = content["data"]
    return select_state(content, keys, source=str(source)), said


def _is_compact(file: Path) -> bool:
    """Whether a safetensors file is one of compress.py."""
    from uvc.compact_files import read_description  # needed here only, and it brings exporters along

    try:
        return bool(read_description(file))
    except CheckpointError:
        return False


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
    if model_type.startswith(TIMM):
        state = _in_timms_names(model, state, model_type)
    masks = [key for key in state if key.endswith(".mask")]
    for key in masks:
        weight, mask = f"{key.removesuffix('.mask')}.weight", state.pop(key)
        if weight in state and state[weight].shape == mask.shape:
            state[weight] = state[weight] * mask
    if masks:
        logger.info("%s: its masks are multiplied into its weights, and masks start anew", os.fspath(source))
    if new_head:
        state = keep_own_heads(model, state, source=source)
    if model_type.startswith("t2t") and "pos_embed" in state:
        state["pos_embed"] = own["pos_embed"]  # a fixed table of sines, whatever the number of patches
    if ("dist_token" in state) != (model.dist_token is not None):
        has = "has a" if "dist_token" in state else "has no"
        raise CheckpointError(
            f"{os.fspath(source)} {has} distillation token, --model_type {model_type} "
            f"{'has none' if 'dist_token' in state else 'has one'}: choose the plain or the distilled name to match"
        )
    load_strict(model, state, allow_missing=OWN, allow_unexpected=("patch_gating",), source=source)


def _in_timms_names(model: GatedTransformer, state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """A checkpoint translated as timm does it, unless it has all that a plain network has in its sizes, or is ours."""
    own = {key: value for key, value in model.state_dict().items() if not key.endswith(("_gating", ".mask"))}
    body = [key for key in own if not key.startswith("head")]
    if all(key in state and state[key].shape == own[key].shape for key in body):
        return dict(state)
    return dict(timm_state(model_type.removeprefix(TIMM), model, dict(state)))


def load_masked(source: str | os.PathLike[str], model_type: str = "", *, patch: str = "") -> Masked:
    """The network of a checkpoint with its weights masked and its blocks fixed, on the CPU, in evaluation mode.

    Sizes (classes, depth, resolution and so on) are those of the weights; the name says what they do not tell, such
    as the number of heads.

    Args:
        source: file or URL of stage 1 or 2, ours or published; a dense checkpoint keeps everything.
        model_type: name of the architecture; empty: from the file, or from its name, which both stages begin with it.
        patch: how patch gates act, see ``GateSettings.patch``; empty: as the file says, else softly if there are any.

    Raises:
        CheckpointError: not readable, of another architecture, or the name is not known; the message says what to do.
    """
    state, said = read_state(source)
    stated = said.get("model_type")
    name = model_type or str(stated or name_in(Path(source).name))
    if not name:
        raise CheckpointError(f"{source}: it does not say which architecture it is of; add --model_type NAME")
    try:
        model = create(name, **sizes_of(state, name, source=str(source)))
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}; name the right one with --model_type") from error
    if stated and stated != name:
        raise CheckpointError(f"{source} is of {stated}, not of {name}: give --model_type {stated}")
    if "patch_gating" in state:
        model.add_patch_gates()
        model.gates.patch = patch or said.get("patch_mode") or "soft"  # pyright: ignore[reportAttributeAccessIssue]
    elif patch not in ("", "off"):
        raise CheckpointError(f"{source}: it has no patch_gating, so its patches cannot be treated as {patch!r}")
    if "gumbel.weight" in state:
        model.add_token_scores()
    register_masks(model)
    load_strict(model, state, allow_missing=OWN, source=str(source))
    model.gates.jumping = bool(said.get("enable_jumping") or said.get("jumping"))
    apply_masks_(model)
    model.fix_blocks()
    return Masked(model.eval(), name, str(source), said.get("data"))


def sizes_of(state: Mapping[str, Tensor], name: str, *, source: str = "checkpoint") -> dict[str, Any]:
    """Arguments for ``create`` that differ from the named architecture's because the weights say so.

    Raises:
        CheckpointError: these are no weights of a DeiT or T2T-ViT, or their width is not that of ``name``.
    """
    if name.startswith(TIMM):
        return _sizes_of_timm(state, name.removeprefix(TIMM), source=source)
    try:
        classes, width = state["head.weight"].shape
        positions = state["pos_embed"].shape[1] - 1 - ("dist_token" in state)
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{source}: there is no {error.args[0]!r} in it, so it is no DeiT or T2T-ViT in the published names"
        ) from error
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    ratio = (hidden + 0.5) / width  # whose product with the width is rounded down
    sizes: dict[str, Any] = {"num_classes": classes, "depth": depth, "mlp_ratio": ratio}
    expected = MODELS[name][1].get("embed_dim") if name in MODELS else width
    if expected != width:
        raise CheckpointError(f"{source}: its width is {width}, that of {name} is {expected}; check --model_type")
    t2t, distilled = "tokens_to_token.project.weight" in state, "dist_token" in state
    if name in MODELS and t2t != name.startswith("t2t"):
        raise CheckpointError(f"{source}: it is {'a T2T-ViT' if t2t else 'a DeiT'}, not {name}; check --model_type")
    side = math.isqrt(positions)
    if side * side != positions:
        raise CheckpointError(f"{source}: {positions} patches are no square; only square images are handled here")
    if t2t:
        return sizes | {"img_size": 16 * side, "token_dim": state["tokens_to_token.project.weight"].shape[1] // 9}
    if name in MODELS and distilled != bool(MODELS[name][1].get("distilled")) and not name.startswith("deit_desk"):
        raise CheckpointError(
            f"{source}: it has {'a' if distilled else 'no'} distillation token, unlike {name}; check --model_type"
        )
    _, channels, patch, _ = state["patch_embed.proj.weight"].shape
    return sizes | {
        "img_size": patch * side, "patch_size": patch, "in_chans": channels, "distilled": distilled,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }  # fmt: skip


def _sizes_of_timm(state: Mapping[str, Tensor], name: str, *, source: str) -> dict[str, Any]:
    """Classes and resolution, which a name of timm leaves open."""
    with torch.device("meta"):
        net = create_timm(name)
    try:
        sizes: dict[str, Any] = {"num_classes": state["head.weight"].shape[0]}
        positions = 0 if net.pos_embed is None else state["pos_embed"].shape[1]
    except KeyError as error:
        raise CheckpointError(
            f"{source}: there is no {error.args[0]!r} in it, so it is not of timm's {name}"
        ) from error
    if net.pos_embed is None or positions == net.pos_embed.shape[1]:
        return sizes
    side = math.isqrt(patches := positions - (0 if net.no_embed_class else net.num_prefix_tokens))
    if side * side != patches:
        raise CheckpointError(f"{source}: {patches} patches are no square; only square images are handled here")
    return sizes | {"img_size": side * net.patch_embed.patch_size[0]}


def file_stem(model_type: str) -> str:
    """What names of a network's files begin with: ``timm:NAME`` without the colon, which is no letter of a file."""
    return model_type.replace(":", "-")


def name_in(file: str) -> str:
    """The longest known architecture that a file name begins with, or nothing."""
    return max((name for name in MODELS if file.startswith(name)), key=len, default="")


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
    structure = asdict(Structure.from_model(model, remove_patches=patch_mode == "remove"))
    metadata = {
        "model_type": model_type, "img_size": model.image_size[0], "patch_mode": patch_mode,
        "jumping": model.gates.jumping, "structure": structure, **more,
    }  # fmt: skip
    return save_atomic({"model": state, METADATA: metadata}, path)
