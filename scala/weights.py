"""Start from a checkpoint of DeiT (``--finetune``): other image size, classes, or distillation token."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.run.checkpoint import list_key_differences, resize_pos_embed
from common.run.errors import CheckpointError
from common.run.program import get_logger

logger = get_logger(__name__)

HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
TOKENS = ("cls_token", "dist_token")


def fit_positions(table: Tensor, grid: tuple[int, int], *, old: int, new: int, source: str) -> Tensor:
    """Position embedding for another grid of patches, or for other extra tokens.

    Args:
        table: (1, old + side^2, D); the patches must be a square.
        grid: rows and columns wanted.
        old, new: extra tokens in front, before and after. Those in common are kept; a distillation token that was not
            there starts from the class token's position.
        source: the file's name, for messages.

    Returns:
        (1, new + rows * columns, D).
    """
    table = resize_pos_embed(table, grid, prefix=old, source=source)
    prefix, patches = table[:, :old], table[:, old:]
    if new > old:
        filler = prefix[:, -1:] if old else patches.mean(dim=1, keepdim=True)
        prefix = torch.cat([prefix, filler.expand(-1, new - old, -1)], dim=1)
    return torch.cat([prefix[:, :new], patches], dim=1)


def load_for_finetuning(model: Any, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load what fits; heads of other classes, and heads and tokens that only one side has, keep or lose their weights.

    Args:
        model: a network of ``models_scala``, or a ViT of timm.
        state: of a DeiT, Scala network or such a ViT of the same width and depth.
        source: the file's name, for messages.

    Raises:
        CheckpointError: listing whatever else does not fit.
    """
    original, state = state, dict(state)
    own = model.state_dict()
    dropped = [key for key in HEADS if key in state and (key not in own or own[key].shape != state[key].shape)]
    dropped += [key for key in TOKENS if key in state and key not in own]
    table, fits = state.get("pos_embed"), own.get("pos_embed")
    if table is not None and fits is not None and fits.shape != table.shape and fits.shape[-1] == table.shape[-1]:
        count = table.shape[1]
        old = 2 if "dist_token" in state else 1 if "cls_token" in state else 0
        if math.isqrt(count) ** 2 == count:  # no_embed_class: positions of the patches only
            old = 0
        new = fits.shape[1] - model.patch_embed.num_patches
        grid = model.patch_embed.grid_size
        state["pos_embed"] = fit_positions(table, grid, old=old, new=new, source=source)
    for key in dropped:
        del state[key]
    found = list_key_differences(model, state)
    fresh = [key for key in found.missing if key in (*HEADS, *TOKENS)]
    if found.mismatched or found.kinds or found.unexpected or len(fresh) != len(found.missing):
        raise CheckpointError(f"--finetune {source} does not fit the model:\n" + "\n".join(found.lines()))
    if "head.weight" in dropped and "head.weight" in own:
        logger.warning("--finetune %s: its head of %d classes is replaced by a fresh one of %d", source,
                       len(original["head.weight"]), model.num_classes)  # fmt: skip
    if dropped or fresh:
        logger.info("--finetune %s: not used: %s; freshly initialised: %s", source, ", ".join(dropped) or "nothing",
                    ", ".join(fresh) or "nothing")  # fmt: skip
    model.load_state_dict(state, strict=False)
