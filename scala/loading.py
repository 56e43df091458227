"""From a checkpoint to its network: which model, which slicing bound, which widths were trained.

Checkpoints of ``main_scala.py``, ``main_dinov2.py`` and the official trainer say all of it in ``args``; a file that
holds weights only needs it said.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor, nn

import scala.features
import scala.models_mobilenet
import scala.models_scala
import scala.models_uniformer  # noqa: F401 - the four register their networks with timm
from common.run.checkpoint import CheckpointError, load_safely, load_strict, locate, select_state
from common.run.launch import main_process_first
from common.run.program import get_logger
from scala.slicing import WidthGrid, find_ratio, make_grid

logger = get_logger(__name__)

BOUND = {"smallest_ratio": 0.25, "largest_ratio": 1.0}
"""Where neither the caller nor the checkpoint says it: that of every published network."""

PASSED_ON = ("embed_dim", "depth", "num_heads", "patch_size", "official_anchors")
"""Recorded arguments that the network takes under the same name; the DeiTs only."""


@dataclass(frozen=True)
class Trained:
    """A network with its trained weights, in evaluation mode.

    Attributes:
        ratios: the widths that were trained, ascending; None where the checkpoint does not say.
        name: registered name of the network.
        input_size: side of the pictures it was trained on, in pixels.
    """

    model: Any
    smallest_ratio: float
    largest_ratio: float
    ratios: list[float] | None
    name: str
    input_size: int

    def untrained(self, ratio: float) -> str | None:
        """What to say about a ratio that was not trained; None where it was, or where that is unknown."""
        if self.ratios is None or find_ratio(ratio, self.ratios) is not None:
            return None
        known = ", ".join(f"{known:g}" for known in self.ratios)
        return f"--ratio {ratio:g} was not trained; the trained ones are {known}"


def load_trained(
    source: str,
    *,
    weights: str = "model",
    model: str | None = None,
    smallest_ratio: float | None = None,
    largest_ratio: float | None = None,
    granularity: float | None = None,
    input_size: int | None = None,
    official_layer_scale: bool | None = None,
) -> Trained:
    """Build the network of a checkpoint and load it strictly.

    Args:
        source: path or URL.
        weights: ``model`` or ``model_ema``.
        model, ...: what the file does not say, or what replaces its own word (with a warning).

    Raises:
        CheckpointError: what the file lacks or what does not fit, and which flag says it.
    """
    with main_process_first():
        path = locate(source)
    content = load_safely(path)
    if weights == "model_ema" and isinstance(content, Mapping) and not content.get("model_ema"):
        raise CheckpointError(f"{path}: holds no average of the weights: give --weights model")
    state = select_state(content, (weights, "state_dict"), source=str(path))
    recorded = _recorded(content)
    given = {
        "model": model, "smallest_ratio": smallest_ratio, "largest_ratio": largest_ratio, "granularity": granularity,
        "input_size": input_size, "official_layer_scale": official_layer_scale,
    }  # fmt: skip
    for flag, value in given.items():
        if value is not None and recorded.get(flag, value) != value:
            logger.warning("--%s %s replaces %s, with which %s was trained", flag, value, recorded[flag], path)
    known = {**BOUND, **recorded, **{flag: value for flag, value in given.items() if value is not None}}
    network = _build(known, state, str(path))
    load_strict(network, state, source=str(path))
    return Trained(
        network.eval(), float(known["smallest_ratio"]), float(known["largest_ratio"]), _trained_ratios(known),
        known["model"], _side(network),
    )  # fmt: skip


def _recorded(content: Any) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint; those that were not given are left out."""
    found = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    return {name: value for name, value in (found or {}).items() if value is not None}


def _build(known: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> nn.Module:
    name = known.get("model")
    if not name:
        raise CheckpointError(f"{source}: does not say which network it is: give --model NAME")
    if not timm.is_model(name) or not name.endswith("_scala"):
        raise CheckpointError(f"{source}: no sliceable network {name!r}: --model takes one that ends in _scala")
    heads = (state[key] for key in ("head.weight", "classifier.weight") if key in state)
    options: dict[str, Any] = {
        "num_classes": next((len(weight) for weight in heads), 0),
        "smallest_ratio": float(known["smallest_ratio"]),
        "largest_ratio": float(known["largest_ratio"]),
    }
    if "input_size" in known:
        options["img_size"] = known["input_size"]
    if any("narrow_mean" in key for key in state):
        if "granularity" not in known:
            raise CheckpointError(f"{source}: batch statistics are kept per width: give --granularity")
        options["granularity"] = float(known["granularity"])
    else:
        options |= {flag: known[flag] for flag in PASSED_ON if known.get(flag)}
    if any(".ls1." in key for key in state):
        options |= {"init_values": 1.0, "official_layer_scale": bool(known.get("official_layer_scale"))}
    return timm.create_model(name, **options)


def _trained_ratios(known: Mapping[str, Any]) -> list[float] | None:
    """A run that never left its warm-up trained the largest width alone."""
    if known.get("full_warm_epoch", 0) >= known.get("epochs", float("inf")):
        return [float(known["largest_ratio"])]
    grid = trained_grid(known)
    return None if grid is None else grid.ratios


def trained_grid(known: Mapping[str, Any]) -> WidthGrid | None:
    if "granularity" not in known:
        return None
    try:
        return make_grid(*(float(known[name]) for name in ("smallest_ratio", "largest_ratio", "granularity")))
    except ValueError as error:
        raise CheckpointError(f"no set of widths: {error}") from error


def _side(network: Any) -> int:
    """Pixels of the pictures a network is built for."""
    if hasattr(network, "patch_embed"):
        return max(network.patch_embed.img_size)
    return network.img_size
