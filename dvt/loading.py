"""Reading checkpoints of DVT: packed ones, as published, and training files, ours and official ones.

The published format is a dictionary of five entries (``PACKED_KEYS``). Nothing in a file is run; see
:mod:`common.run.checkpoint`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.run.checkpoint import (
    CheckpointError,
    TrainingState,
    load_strict,
    read_state,
    resize_pos_embed,
    select_state,
)
from common.run.program import get_logger
from dvt.models import EXITS, create_model, find_entry
from dvt.models.backbone import Stage
from dvt.models.cascade import Cascade

logger = get_logger(__name__)

PACKED_KEYS = (
    "model_state_dict", "flops", "anytime_classification", "dynamic_threshold", "budgeted_batch_classification"
)  # fmt: skip
"""Entries of the published format: weights; cumulative GFLOPs per exit; top-1 in percent per exit; thresholds (59, 3);
[59 mean costs, 59 accuracies]."""

WEIGHT_KEYS = ("model_state_dict", "state_dict_ema", "model_ema", "state_dict", "model", "net")
"""Where the weights are, the average first: packed, official training, our training, CIFAR transfer."""

AVERAGES = ("state_dict_ema", "model_ema")

File = str | os.PathLike[str]


def select_weights(content: Any, source: File, average: bool = True) -> Mapping[str, Tensor]:
    """The weights of any kind of checkpoint by their names.

    Args:
        content: of a file, from ``read_checkpoint``.
        source: the file, for messages.
        average: prefer the moving average of the weights where the file has one.
    """
    return select_state(content, [key for key in WEIGHT_KEYS if average or key not in AVERAGES], source=str(source))


def load_network(
    name: str,
    content: Any,
    *,
    source: File,
    average: bool = True,
    new_heads: bool = False,
    feature_reuse: bool | None = None,
    relation_reuse: bool | None = None,
    own: Mapping[str, Any] | None = None,
    **options: Any,
) -> Cascade | Stage:
    """A network by its name with the weights of a checkpoint.

    Args:
        content, source, average: see :func:`select_weights`; None for fresh weights. Without ``new_heads`` every key
            must be there, and no other.
        new_heads: begin a transfer, see :func:`load_backbone`.
        feature_reuse, relation_reuse: of a cascade; None: as the checkpoint was trained, on without one.
        own: options of a network of timm: ``grids``, and what it begins with.
        options: of ``create_model``; ``num_classes`` None: as the checkpoint's last head says.

    Raises:
        CheckpointError: listing what does not fit.
    """
    state = {} if content is None else select_weights(content, source, average)
    if content is not None and options.get("num_classes", 0) is None:
        heads = [value for key, value in state.items() if key.endswith("head.weight") and value.dim() == 2]
        if not heads:
            raise CheckpointError(f"{source} has no head that says the number of classes: give --num-classes")
        options["num_classes"] = len(heads[-1])
    options |= own or {}
    if find_entry(name, options.get("grids")).stages:
        names = " ".join(state) or "feature_resuse_mlp relation_reuse_conv"
        options["feature_reuse"] = "feature_resuse_mlp" in names if feature_reuse is None else feature_reuse
        options["relation_reuse"] = "relation_reuse_conv" in names if relation_reuse is None else relation_reuse
    model = create_model(name, **options)
    if new_heads and content is not None:
        fresh = load_backbone(model, state, source=source)
        logger.info("weights of %s; %s", source, f"new: {', '.join(fresh)}" if fresh else "heads kept")
    elif content is not None:
        load_strict(model, state, source=source)
    return model


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], *, source: File) -> Sequence[str]:
    """Load pretrained weights into a network with other classes: heads whose shape differs start afresh.

    Position tables of another resolution are resized, bicubic.

    Returns:
        Names of the weights that were not taken over.

    Raises:
        CheckpointError: if anything else does not fit.
    """
    state, fresh = dict(state), list[str]()
    for name, own in model.state_dict().items():
        if name not in state or state[name].shape == own.shape:
            continue
        if "head" in name.split("."):
            state[name] = own
            fresh.append(name)
        elif name.endswith("pos_embed"):
            stage: Any = model.get_submodule(name.rpartition(".")[0])
            state[name] = resize_pos_embed(state[name], stage.grid, source=f"{source}: {name}")
    load_strict(model, state, source=source)
    return fresh


def read_packed(content: Any, needed: Sequence[str], *, source: File, why: str, exits: int = EXITS) -> dict[str, Any]:
    """The entries of a packed checkpoint that something needs, by their keys, the weights left out.

    Args:
        content, source: see :func:`select_weights`.
        needed: keys out of ``PACKED_KEYS``.
        why: what needs them, for messages.
        exits: of the network.

    Returns:
        Lists of numbers; ``dynamic_threshold`` as a tensor (P, K), float32.

    Raises:
        CheckpointError: naming the entries that are missing or of a wrong shape, and how to make them.
    """
    found = content if isinstance(content, Mapping) else {}
    if missing := [key for key in needed if key not in found]:
        present = ", ".join(str(key) for key in list(found)[:12]) or "no entries"
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}, which {why} needs; found {present}. Make a packed "
            "checkpoint from trained weights with dvt/pack.py, or use --eval_mode 2, which needs only the weights"
        )
    values: dict[str, Any] = {}
    for key in needed:
        value = found[key]
        if key == "dynamic_threshold":
            values[key] = rows = torch.as_tensor(value, dtype=torch.float32)
            if rows.dim() != 2 or rows.shape[1] != exits or len(rows) == 0:
                raise CheckpointError(f"{source}: {key} has shape {tuple(rows.shape)}, expected (59, {exits})")
            if bool(rows.isnan().any()):
                raise CheckpointError(f"{source}: {key} holds what is no number (nan)")
        elif key == "budgeted_batch_classification":
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise CheckpointError(f"{source}: {key} must be [costs, accuracies], found {type(value).__name__}")
            values[key] = [_numbers(part, len(value[0]), f"{source}: {key}") for part in value]
        elif key != "model_state_dict":
            values[key] = _numbers(value, exits, f"{source}: {key}")
    return values


def _numbers(value: Any, count: int, where: str) -> list[float]:
    """A list of plain numbers."""
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if len(numbers) != count or count == 0 or not all(map(math.isfinite, numbers)):
        raise CheckpointError(f"{where} must hold {count} finite numbers, found {value!r:.80}")
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Continuing a run


def resume(state: TrainingState, *, path: File, optimizer: bool = True, start_epoch: int | None = None) -> None:
    """Continue a run: ours exactly, an official one at its next epoch.

    Args:
        optimizer: False takes weights, average and epoch only (``--no-resume-opt``).
        start_epoch: begin at this epoch instead of the next one.

    Raises:
        CheckpointError: naming what the file lacks or what does not fit.
    """
    content = read_state(path, state)
    if isinstance(content, Mapping) and "state_dict" in content and "model" not in content:
        content = _from_official(content)
    if optimizer:
        state.load_state_dict(content, source=str(path))
    else:
        load_strict(state.model, select_weights(content, path, average=False), source=path)
        if state.ema is not None:
            average: Any = state.ema
            load_strict(average.module, select_weights(content, path), source=path)
        state.progress.epoch = int(content.get("epoch", -1)) + 1
    exact = optimizer and "progress" in content
    if start_epoch is not None:
        state.progress.epoch, state.progress.batch, state.progress.trained = start_epoch, 0, False
        state.progress.sums, state.progress.position = {}, None
    if (start_epoch is not None or not exact) and state.scheduler is not None:
        scheduler: Any = state.scheduler
        scheduler.step(state.progress.epoch)
    logger.info("resumed from %s at epoch %d, step %d", path, state.progress.epoch, state.progress.step)


def _from_official(content: Mapping[str, Any]) -> dict[str, Any]:
    """An official training file under the names of ours; its ``args`` are left out."""
    names = {"state_dict": "model", "state_dict_ema": "model_ema", "optimizer": "optimizer", "amp_scaler": "scaler"}
    return {"epoch": content.get("epoch", -1)} | {names[key]: content[key] for key in names if key in content}
