"""Start from a checkpoint of DeiT (``--finetune``): other image size, classes, or distillation token."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run.checkpoint import list_key_differences
from common.run.errors import CheckpointError
from common.run.program import get_logger

logger = get_logger(__name__)

HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
TOKENS = ("cls_token", "dist_token")


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], *, old_prefix: int, new_prefix: int) -> Tensor:
    """Position embedding for another grid of patches, or for other extra tokens.

    Args:
        pos_embed: (1, old_prefix + side^2, D); the patches must be a square.
        grid: rows and columns wanted.
        old_prefix, new_prefix: extra tokens in front, before and after. Those in common are kept; a distillation token
            that was not there starts from the class token's position.

    Returns:
        (1, new_prefix + rows * columns, D), bicubic, ``align_corners=False``.

    Raises:
        CheckpointError: the patches of ``pos_embed`` are no square.
    """
    prefix, patches = pos_embed[:, :old_prefix], pos_embed[:, old_prefix:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise CheckpointError(
            f"the position embedding has {patches.shape[1]} patches, which are no square; only square grids are resized"
        )
    if (side, side) != grid:
        patches = patches.transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2)
    if new_prefix > old_prefix:
        filler = prefix[:, -1:] if old_prefix else patches.mean(dim=1, keepdim=True)
        prefix = torch.cat([prefix, filler.expand(-1, new_prefix - old_prefix, -1)], dim=1)
    return torch.cat([prefix[:, :new_prefix], patches], dim=1)


def load_for_finetuning(model: Any, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load what fits; heads of other classes, and heads and tokens that only one side has, keep or lose their weights.

    Args:
        model: a network of ``models_scala``.
        state: of a DeiT or Scala network of the same width and depth.
        source: the file's name, for messages.

    Raises:
        CheckpointError: listing whatever else does not fit.
    """
    original, state = state, dict(state)
    own = model.state_dict()
    dropped = [key for key in HEADS if key in state and (key not in own or own[key].shape != state[key].shape)]
    dropped += [key for key in TOKENS if key in state and key not in own]
    if "pos_embed" in state and state["pos_embed"].shape[-1] == own["pos_embed"].shape[-1]:
        count = state["pos_embed"].shape[1]
        old_prefix = 2 if "dist_token" in state else 1 if "cls_token" in state else 0
        if math.isqrt(count) ** 2 == count:  # no_embed_class: positions of the patches only
            old_prefix = 0
        new_prefix = own["pos_embed"].shape[1] - model.patch_embed.num_patches
        grid = model.patch_embed.grid_size
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], grid, old_prefix=old_prefix, new_prefix=new_prefix)
    for key in dropped:
        del state[key]
    found = list_key_differences(model, state)
    fresh = [key for key in found.missing if key in (*HEADS, *TOKENS)]
    if found.mismatched or found.unexpected or len(fresh) != len(found.missing):
        raise CheckpointError(f"--finetune {source} does not fit the model:\n" + "\n".join(found.lines()))
    if "head.weight" in dropped and "head.weight" in own:
        logger.warning("--finetune %s: its head of %d classes is replaced by a fresh one of %d", source,
                       len(original["head.weight"]), model.num_classes)  # fmt: skip
    if dropped or fresh:
        logger.info("--finetune %s: not used: %s; freshly initialised: %s", source, ", ".join(dropped) or "nothing",
                    ", ".join(fresh) or "nothing")  # fmt: skip
    model.load_state_dict(state, strict=False)
