"""Checkpoints: safe reading, fetching, strict loading, exact resume."""

from common.run.checkpoint.fetching import fetch as fetch
from common.run.checkpoint.fetching import hub_folder as hub_folder
from common.run.checkpoint.fetching import locate as locate
from common.run.checkpoint.fetching import read_checkpoint as read_checkpoint
from common.run.checkpoint.loading import KeyDifferences as KeyDifferences
from common.run.checkpoint.loading import build_described as build_described
from common.run.checkpoint.loading import keep_own_heads as keep_own_heads
from common.run.checkpoint.loading import list_key_differences as list_key_differences
from common.run.checkpoint.loading import load_strict as load_strict
from common.run.checkpoint.positions import resize_pos_embed as resize_pos_embed
from common.run.checkpoint.reading import load_safely as load_safely
from common.run.checkpoint.reading import naming as naming
from common.run.checkpoint.reading import read_described as read_described
from common.run.checkpoint.reading import read_description as read_description
from common.run.checkpoint.reading import select_state as select_state
from common.run.checkpoint.training import CheckpointManager as CheckpointManager
from common.run.checkpoint.training import Progress as Progress
from common.run.checkpoint.training import Stateful as Stateful
from common.run.checkpoint.training import TrainingState as TrainingState
from common.run.checkpoint.training import read_state as read_state
from common.run.checkpoint.writing import plain as plain
from common.run.checkpoint.writing import save_atomic as save_atomic
from common.run.checkpoint.writing import save_described as save_described
from common.run.errors import CheckpointError as CheckpointError
