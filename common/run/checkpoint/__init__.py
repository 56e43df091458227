"""Checkpoints: safe reading, fetching, strict loading, exact resume."""

from common.run.checkpoint.fetching import fetch, hub_folder, locate, read_checkpoint
from common.run.checkpoint.loading import KeyDifferences, keep_own_heads, list_key_differences, load_strict
from common.run.checkpoint.positions import resize_pos_embed
from common.run.checkpoint.reading import load_safely, read_description, select_state
from common.run.checkpoint.training import CheckpointManager, Progress, Stateful, TrainingState
from common.run.checkpoint.writing import plain, save_atomic, save_described
from common.run.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "KeyDifferences",
    "Progress",
    "Stateful",
    "TrainingState",
    "fetch",
    "hub_folder",
    "keep_own_heads",
    "list_key_differences",
    "load_safely",
    "load_strict",
    "locate",
    "plain",
    "read_checkpoint",
    "read_description",
    "resize_pos_embed",
    "save_atomic",
    "save_described",
    "select_state",
]
