"""Networks with masks and gates from files: those of our two stages, and the published ones.

A published file is the bare state dict of the gated network with ``.mask`` buffers; ours hold it under ``model``, with
what else is to be known beside it. Both are read without running code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.run.checkpoint import CheckpointError, load_safely, load_strict, locate, select_state
from uvc.models import MODELS, create
from uvc.models.gates import GatedTransformer, register_masks

STATE_KEYS = ("model", "state_dict_ema", "state_dict")
"""Where weights may lie inside a file; else they are the file."""

OPTIONAL = ("*.mask", "*_gating", "patch_gating", "gumbel.*")
"""What a file may lack: a dense DeiT has none of it, and then everything is kept."""


def load_masked(
    path: str | os.PathLike[str], model_type: str = "", *, patch: str = ""
) -> tuple[GatedTransformer, dict[str, Any]]:
    """The network of a checkpoint with its masks and hard gates, on the CPU, in evaluation mode.

    Sizes (classes, depth, resolution and so on) are those of the weights; the name says what they do not tell, such
    as the number of heads.

    Args:
        path: file or URL of stage 1 or 2, ours or published; a dense checkpoint keeps everything.
        model_type: name of the architecture; empty: from the file's arguments, or from its name, which both stages
            begin with it.
        patch: how patch gates act, see ``GateSettings.patch``; empty: as the file says, else softly if there are any.

    Returns:
        The network, and what the file says besides the weights (nothing in a published file).

    Raises:
        CheckpointError: not readable, of another architecture, or the name is not known; the message says what to do.
    """
    file = locate(path)
    content = load_safely(file)
    if Path(file).suffix == ".safetensors" and _is_compact(file):
        raise CheckpointError(f"{file}: it is a compact network of compress.py; give the masked checkpoint it is from")
    state = select_state(content, STATE_KEYS, source=str(file))
    arguments: dict[str, Any] = {}
    for key in ("args", "uvc"):  # flags of a training state; what stage 1 and 2 write into their results
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            arguments |= content[key]
    name = model_type or str(arguments.get("model_type") or name_in(Path(file).name))
    if not name:
        raise CheckpointError(f"{file}: it does not say which architecture it is of; add --model_type NAME")
    try:
        model = create(name, **sizes_of(state, name, source=str(file)))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; name the right one with --model_type") from error
    if "patch_gating" in state:
        model.add_patch_gates()
        model.gates.patch = patch or arguments.get("patch_mode") or "soft"  # pyright: ignore[reportAttributeAccessIssue]
    elif patch not in ("", "off"):
        raise CheckpointError(f"{file}: it has no patch_gating, so its patches cannot be treated as {patch!r}")
    if name.startswith("t2t") and "gumbel.weight" in state:
        model.add_token_scores()  # pyright: ignore[reportCallIssue]
    register_masks(model)
    load_strict(model, state, allow_missing=OPTIONAL, source=str(file))
    model.gates.jumping = bool(arguments.get("enable_jumping") or arguments.get("jumping"))
    return model.eval(), arguments


def sizes_of(state: Mapping[str, Tensor], name: str, *, source: str = "checkpoint") -> dict[str, Any]:
    """Arguments for ``create`` that differ from the named architecture's because the weights say so.

    Raises:
        CheckpointError: these are no weights of a DeiT or T2T-ViT, or their width is not that of ``name``.
    """
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


def _is_compact(file: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file is one of compress.py."""
    from uvc.compact_files import read_description  # needed here only, and it brings exporters along

    try:
        return bool(read_description(file))
    except CheckpointError:
        return False


def name_in(file: str) -> str:
    """The longest known architecture that a file name begins with, or nothing."""
    return max((name for name in MODELS if file.startswith(name)), key=len, default="")
