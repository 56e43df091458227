"""From a checkpoint to its network: which model, which slicing bound, which widths were trained.

Checkpoints of ``main_scala.py``, ``main_dinov2.py`` and the official trainer say all of it in ``args``; a file that
holds weights only needs it said.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from common.run.checkpoint import load_strict, naming, select_state
from common.run.errors import CheckpointError, UsageError
from common.run.program import get_logger
from scala.arguments import DEFAULTS, NETWORK_FLAGS, NetworkSettings
from scala.build import BATCH_NORM_MODELS, build_model
from scala.slicing import WidthGrid, find_ratio, make_grid

logger = get_logger(__name__)


def recorded_arguments(content: Any) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint, ours or the official one; those not given are left out."""
    found = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    return {name: value for name, value in found.items() if value is not None} if isinstance(found, Mapping) else {}


def resolve_grid(flags: Mapping[str, Any], recorded: Mapping[str, Any], source: str) -> WidthGrid:
    """Slicing bound and granularity: of the flags, else of the checkpoint, else the defaults.

    Raises:
        UsageError: a flag contradicts the checkpoint, which would silently cut the wrong channels.
    """
    values = {}
    for name, default in DEFAULTS.items():
        given, known = flags.get(name), recorded.get(name)
        if given is not None and known is not None and float(known) != given:
            raise UsageError(
                f"--{name} {given:g} contradicts {source}, which was trained with {known:g}: bound and granularity "
                f"decide which channels a width uses and which widths there are; leave the flag out or give {known:g}"
            )
        values[name] = float(next(value for value in (given, known, default) if value is not None))
    return make_grid(values["smallest_ratio"], values["largest_ratio"], values["granularity"])


@dataclass(frozen=True)
class Trained:
    """A network with its trained weights, in evaluation mode.

    Attributes:
        ratios: the widths that were trained, ascending; None where the checkpoint does not say.
        name: registered name of the network.
        input_size: side of the images it was trained on, in pixels.
    """

    model: Any
    ratios: list[float] | None
    name: str
    input_size: int

    def choose(self, wanted: Sequence[float], *, allow_untrained: bool, flag: str) -> list[float]:
        """The trained ratios that ``wanted`` means; one that was not trained is refused, or warned of.

        Raises:
            UsageError: such a ratio without ``--allow-untrained``, or one that the network cannot have.
        """
        chosen = []
        for ratio in wanted:
            near = find_ratio(ratio, self.ratios if self.ratios is not None else [ratio])
            if near is None:
                known = ", ".join(f"{known:g}" for known in self.ratios or ())
                problem = f"{flag} {ratio:g} was not trained; the trained ones are {known}"
                if not allow_untrained:
                    raise UsageError(
                        f"{problem}. Its accuracy would be chance: --allow-untrained takes it all the same"
                    )
                logger.warning("%s: expect the accuracy of chance", problem)
            chosen.append(ratio if near is None else near)
        for ratio in chosen:
            self.model.check_ratio(ratio)
        return chosen


def load_trained(
    content: Any, source: str, *, weights: str | None = None, flags: Mapping[str, Any] | None = None
) -> Trained:
    """Build the network of a checkpoint and load it strictly.

    Args:
        content: of ``common.run.checkpoint.read_checkpoint``.
        source: the file's name, for messages.
        weights: ``model`` or ``model_ema``; None for the first that is there.
        flags: what the file does not say, or what replaces its own word (with a warning): fields of
            ``NetworkSettings`` and ``num_classes``.

    Raises:
        CheckpointError: what the file lacks or what does not fit, and which flag says it.
        UsageError: a network that does not exist, or does not take one of the flags.
    """
    if weights == "model_ema" and isinstance(content, Mapping) and not content.get("model_ema"):
        raise CheckpointError(f"{source}: holds no average of the weights: give --weights model")
    with naming(source, "what it says of its network is damaged", (UsageError,)):
        state = select_state(content, *([(weights, "state_dict")] if weights else []), source=source)
        recorded, flags = recorded_arguments(content), flags or {}
        resolve_grid(flags, recorded, source)  # another bound cuts other channels than were trained
        for flag, value in flags.items():
            if recorded.get(flag, value) != value:
                logger.warning("--%s %s replaces %s, with which %s was trained", flag, value, recorded[flag], source)
        known: dict[str, Any] = (
            {name: DEFAULTS[name] for name in ("smallest_ratio", "largest_ratio")} | recorded | dict(flags)
        )
        network = _build(known, state, source, flags)
        try:
            load_strict(network, state, source=source)
        except CheckpointError as error:
            raise CheckpointError(f"{error}\n{_advice(network, state)}") from error
        return Trained(network.eval(), _trained_ratios(known), known["model"], max(network.input_shape[1:]))


def _build(known: Mapping[str, Any], state: Mapping[str, Tensor], source: str, flags: Mapping[str, Any]) -> Any:
    """The network that recorded arguments, flags and the shapes of the weights describe."""
    if not known.get("model"):
        raise CheckpointError(f"{source}: does not say which network it is: give --model NAME")
    if known["model"] in BATCH_NORM_MODELS and "granularity" not in known:
        raise CheckpointError(f"{source}: batch statistics are kept per width: give --granularity")
    scaled = {"init_values": 1.0, "official_layer_scale": known.get("official_layer_scale")}
    values = {name: known[name] for name in NETWORK_FLAGS if name in known} | dict(flags)
    values |= scaled if any(".ls1." in key for key in state) else dict.fromkeys(scaled)
    names = {field.name for field in fields(NetworkSettings)}
    settings = NetworkSettings(**{name: value for name, value in values.items() if name in names})
    largest = max(len(state), *(size for value in state.values() for size in value.shape))
    for name in ("embed_dim", "depth", "num_heads", "patch_size"):
        if (size := getattr(settings, name)) is not None and size > largest:  # and would take all memory or time
            raise CheckpointError(f"{source}: its {name} {size} is larger than anything in its weights")
    return build_model(settings, flags.get("num_classes") or count_head(state))


def count_head(state: Mapping[str, Tensor]) -> int:
    """Classes of a checkpoint's classifier, 0 without one."""
    return next((len(state[key]) for key in ("head.weight", "classifier.weight") if key in state), 0)


def _trained_ratios(known: Mapping[str, Any]) -> list[float] | None:
    """A run that never left its warm-up trained the largest width alone."""
    if known.get("full_warm_epoch", 0) >= known.get("epochs", float("inf")):
        return [float(known["largest_ratio"])]
    if "granularity" not in known:
        return None
    return make_grid(*(float(known[name]) for name in DEFAULTS)).ratios


def _advice(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Which flags make the network that a checkpoint belongs to, as far as its shapes tell."""
    found = []
    if "pos_embed" in state and state["pos_embed"].shape[-1] != getattr(model, "embed_dim", None):
        found.append(f"a width of {state['pos_embed'].shape[-1]} (--model or --embed-dim)")
    if count_head(state) not in (0, model.num_classes):
        found.append(f"{count_head(state)} classes (--num-classes)")
    if ("dist_token" in state) != hasattr(model, "dist_token"):
        distilled = "a distillation token (a *_distilled_* model)"
        found.append(distilled if "dist_token" in state else "no distillation token")
    about = "; ".join(found) or "another shape"
    return f"the checkpoint's network has {about}; name its model with --model"
