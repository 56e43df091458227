"""Reading checkpoints of DVT: packed ones, as published, and training files, ours and official ones.

The published format is a dictionary of five entries (``PACKED_KEYS``). Nothing in a file is run; see
:mod:`common.run.checkpoint`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from torch import Tensor, nn

from common.run.checkpoint import CheckpointError, TrainingState, load_strict, read_checkpoint, select_state
from common.run.program import get_logger
from dvt.models import EXITS, MODELS, create_model
from dvt.models.backbone import Backbone
from dvt.models.cascade import Cascade

logger = get_logger(__name__)

PACKED_KEYS = (
    "model_state_dict",
    "flops",
    "anytime_classification",
    "dynamic_threshold",
    "budgeted_batch_classification",
)
"""Entries of the published format: weights; cumulative GFLOPs per exit; top-1 in percent per exit; thresholds (59, 3);
[59 mean costs, 59 accuracies]."""

WEIGHT_KEYS = ("model_state_dict", "state_dict_ema", "model_ema", "state_dict", "model", "net")
"""Where the weights are, the average first: packed, official training, our training, CIFAR transfer."""

RAW_WEIGHT_KEYS = ("model_state_dict", "state_dict", "model", "net")
"""The same without averages."""


def select_weights(content: Any, source: str | os.PathLike[str], average: bool = True) -> Mapping[str, Tensor]:
    """The weights of any kind of checkpoint by their names; arguments as :func:`load_weights`."""
    return select_state(content, WEIGHT_KEYS if average else RAW_WEIGHT_KEYS, source=str(source))


def load_weights(model: nn.Module, content: Any, *, source: str | os.PathLike[str], average: bool = True) -> nn.Module:
    """Load the weights of any kind of checkpoint strictly: every key must be there, and no other.

    Args:
        content: of a file, from ``read_checkpoint``.
        source: the file, for messages.
        average: prefer the moving average of the weights where the file has one.

    Returns:
        ``model``.

    Raises:
        CheckpointError: listing what does not fit.
    """
    load_strict(model, select_weights(content, source, average), source=source)
    return model


def choose_reuse(state: Mapping[str, Any], feature_reuse: bool | None, relation_reuse: bool | None) -> dict[str, bool]:
    """Which reuse a cascade has, as options of ``create_model``.

    Args:
        state: weights by their names, which say what it was trained with; may be empty.
        feature_reuse, relation_reuse: what is asked for; None: as the weights say, on without any.
    """
    chosen: dict[str, bool] = {}
    for option, asked, part in (
        ("feature_reuse", feature_reuse, "feature_resuse_mlp"),
        ("relation_reuse", relation_reuse, "relation_reuse_conv"),
    ):
        chosen[option] = (not state or any(part in name for name in state)) if asked is None else asked
    return chosen


def load_network(
    name: str,
    content: Any,
    *,
    source: str | os.PathLike[str],
    device: torch.device,
    average: bool = True,
    feature_reuse: bool | None = None,
    relation_reuse: bool | None = None,
    **options: Any,
) -> Cascade | Backbone:
    """A network by its published name with the weights of a checkpoint, in evaluation mode.

    Args:
        content, source, average: see :func:`load_weights`.
        feature_reuse, relation_reuse: of a cascade; None: as the checkpoint was trained.
        options: of ``create_model``.
    """
    state = select_weights(content, source, average)
    if MODELS[name].stages:
        options |= choose_reuse(state, feature_reuse, relation_reuse)
    model = create_model(name, **options)
    load_strict(model, state, source=source)
    return model.to(device).eval()


def start_transfer(
    name: str,
    file: str,
    *,
    seed: int,
    feature_reuse: bool | None = None,
    relation_reuse: bool | None = None,
    **options: Any,
) -> Cascade | Backbone:
    """The network that a transfer begins with: fresh, and with a checkpoint's backbone where ``file`` names one.

    Args:
        feature_reuse, relation_reuse: of a cascade; None: as the checkpoint was trained, on without one.
        options: of ``create_model``.
    """
    state = select_weights(read_checkpoint(file), file) if file else {}
    if MODELS[name].stages:
        options |= choose_reuse(state, feature_reuse, relation_reuse)
    torch.manual_seed(seed)
    model = create_model(name, **options)
    if file:
        fresh = load_backbone(model, state, source=file)
        logger.info("weights of %s; %s", file, f"new: {', '.join(fresh)}" if fresh else "heads kept")
    return model


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> Sequence[str]:
    """Load pretrained weights into a network with other classes: heads whose shape differs start afresh.

    Position tables of another resolution are resized, bicubic.

    Args:
        model: network to fill.
        state: weights by published names.
        source: the file, for messages.

    Returns:
        Names of the weights that were not taken over.

    Raises:
        CheckpointError: if anything else does not fit.
    """
    own = model.state_dict()
    merged: dict[str, Tensor] = {}
    fresh: list[str] = []
    for name, value in state.items():
        parts = name.split(".")
        if name in own and "head" in parts and own[name].shape != value.shape:
            fresh.append(name)
            continue
        if name in own and parts[-1] == "pos_embed" and own[name].shape != value.shape:
            value = resize_table(value, own[name].shape[1], where=f"{source}: {name}")
        merged[name] = value
    load_strict(model, {**{name: own[name] for name in fresh}, **merged}, source=source)
    return fresh


def resize_table(table: Tensor, tokens: int, *, where: str) -> Tensor:
    """Resize a position table (1, M+1, D) to ``tokens`` rows, the class token's kept; bicubic over the grid.

    Raises:
        CheckpointError: if either number of patches is no square.
    """
    source, target = round((table.shape[1] - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if source**2 + 1 != table.shape[1] or target**2 + 1 != tokens:
        raise CheckpointError(
            f"{where} has {table.shape[1]} positions, the network {tokens}: not squares with a class token, so the "
            "table cannot be resized; give the --img-size that the checkpoint was trained at"
        )
    return resample_abs_pos_embed(table, [target, target], antialias=False)


@dataclass(frozen=True)
class Packed:
    """What a packed checkpoint says besides the weights.

    Attributes:
        flops: cumulative GFLOPs of each exit, (K,).
        anytime: top-1 of each exit in percent, (K,).
        thresholds: (P, K), float32; None where not asked for.
        curve: P mean costs in GFLOPs, P accuracies in percent; None where not asked for.
    """

    flops: list[float] | None = None
    anytime: list[float] | None = None
    thresholds: Tensor | None = None
    curve: list[list[float]] | None = None


def read_packed(content: Any, needed: Sequence[str], *, source: str | os.PathLike[str], why: str) -> Packed:
    """The entries of a packed checkpoint that something needs.

    Args:
        content: of a file, from ``read_checkpoint``.
        needed: keys out of ``PACKED_KEYS``.
        source: the file, for messages.
        why: what needs them, for messages.

    Raises:
        CheckpointError: naming the entries that are missing or of a wrong shape, and how to make them.
    """
    found = content if isinstance(content, Mapping) else {}
    missing = [key for key in needed if key not in found]
    if missing:
        present = ", ".join(str(key) for key in list(found)[:12]) or "no entries"
        raise CheckpointError(
            f"{os.fspath(source)} lacks {', '.join(missing)}, which {why} needs; found {present}. Make a packed "
            "checkpoint from trained weights with dvt/pack.py, or use --eval_mode 2, which needs only the weights"
        )
    values: dict[str, Any] = {}
    if "flops" in needed:
        values["flops"] = _numbers(found["flops"], EXITS, "flops", source)
    if "anytime_classification" in needed:
        values["anytime"] = _numbers(found["anytime_classification"], EXITS, "anytime_classification", source)
    if "dynamic_threshold" in needed:
        rows = torch.as_tensor(found["dynamic_threshold"], dtype=torch.float32)
        if rows.dim() != 2 or rows.shape[1] != EXITS or len(rows) == 0:
            raise CheckpointError(
                f"{os.fspath(source)}: dynamic_threshold has shape {tuple(rows.shape)}, expected (59, {EXITS})"
            )
        values["thresholds"] = rows
    if "budgeted_batch_classification" in needed:
        curve = found["budgeted_batch_classification"]
        if not isinstance(curve, (list, tuple)) or len(curve) != 2:
            raise CheckpointError(
                f"{os.fspath(source)}: budgeted_batch_classification must be [costs, accuracies], found "
                f"{type(curve).__name__}"
            )
        points = len(curve[0])
        values["curve"] = [_numbers(part, points, "budgeted_batch_classification", source) for part in curve]
    return Packed(**values)


def _numbers(value: Any, count: int, key: str, source: str | os.PathLike[str]) -> list[float]:
    """A list of plain numbers."""
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if len(numbers) != count or count == 0:
        raise CheckpointError(f"{os.fspath(source)}: {key} must hold {count} numbers, found {value!r:.80}")
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Continuing a run


def resume(
    state: TrainingState,
    *,
    path: str | os.PathLike[str],
    optimizer: bool = True,
    start_epoch: int | None = None,
) -> None:
    """Continue a run: ours exactly, an official one at its next epoch.

    Args:
        optimizer: False takes weights, average and epoch only (``--no-resume-opt``).
        start_epoch: begin at this epoch instead of the next one.

    Raises:
        CheckpointError: naming what the file lacks or what does not fit.
    """
    content = read_checkpoint(path)
    if isinstance(content, Mapping) and "state_dict" in content and "model" not in content:
        content = _from_official(content)
    if optimizer:
        state.load_state_dict(content, source=str(path))
    else:
        load_weights(state.model, content, source=path, average=False)
        if state.ema is not None:
            load_weights(state.ema.module, content, source=path)  # pyright: ignore[reportArgumentType] - timm's
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
