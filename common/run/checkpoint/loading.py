"""Strict loading: everything that does not fit is said."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.run.errors import CheckpointError
from common.run.program import get_logger

logger = get_logger(__name__)

Network = TypeVar("Network", bound=nn.Module)

MOST_LISTED = 10
"""Differences of a kind that a message lists: a file of another network has hundreds."""


@dataclass(frozen=True)
class KeyDifferences:
    """How a state differs from a model.

    ``mismatched`` holds (key, shape in the model, shape in the state), ``kinds`` (key, type in the model, in the
    state).
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    kinds: tuple[tuple[str, str, str], ...] = ()
    tolerated: tuple[str, ...] = field(default=(), compare=False)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched or self.kinds)

    def lines(self) -> Iterable[str]:
        """The differences by kind, one per line; of many the first, and how many more."""
        shapes = [f"{key}: model {list(model)}, file {list(file)}" for key, model, file in self.mismatched]
        for kind, found in (
            ("missing, in the model but not in the file", self.missing),
            ("unexpected, in the file but not in the model", self.unexpected),
            ("different shape", shapes),
            ("different kind of numbers", [f"{key}: model {model}, file {file}" for key, model, file in self.kinds]),
        ):
            if found:
                yield f"{kind} ({len(found)}):"
                yield from (f"  {each}" for each in found[:MOST_LISTED])
            if len(found) > MOST_LISTED:
                yield f"  ... and {len(found) - MOST_LISTED} more"


def list_key_differences(model: nn.Module, state: Mapping[str, Any]) -> KeyDifferences:
    """Compare names and shapes, touching neither side. A value that is no tensor counts as a shape of ()."""
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}  # no extra state
    shapes = {key: tuple(value.shape) if isinstance(value, Tensor) else () for key, value in state.items()}
    differ = [
        key
        for key, value in own.items()
        if key in state and (shapes[key] != tuple(value.shape) or not isinstance(state[key], Tensor))
    ]
    return KeyDifferences(
        missing=tuple(key for key in own if key not in state),
        unexpected=tuple(str(key) for key in state if key not in own),
        mismatched=tuple((key, tuple(own[key].shape), shapes[key]) for key in differ),
        kinds=tuple(
            (key, _kind(value), _kind(state[key]))
            for key, value in own.items()
            if key in state and key not in differ and value.is_floating_point() != state[key].is_floating_point()
        ),
    )


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def load_strict(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    source: str | os.PathLike[str] = "checkpoint",
) -> KeyDifferences:
    """Load ``state`` into ``model`` or say everything that does not fit; nothing is ignored silently.

    Args:
        allow_missing, allow_unexpected: patterns (``fnmatch``) of keys the file may lack or hold besides; those found
            are logged and returned as ``tolerated``.
        source: the file's name, for messages.

    Raises:
        CheckpointError: listing all missing and unexpected keys and all shape mismatches; the model is untouched.
    """
    found = list_key_differences(model, state)

    def allowed(keys: Sequence[str], patterns: Sequence[str]) -> list[str]:
        return [key for key in keys if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)]

    tolerated = (*allowed(found.missing, allow_missing), *allowed(found.unexpected, allow_unexpected))
    missing, unexpected = (
        tuple(key for key in keys if key not in tolerated) for keys in (found.missing, found.unexpected)
    )
    rest = KeyDifferences(missing, unexpected, found.mismatched, found.kinds, tolerated)
    if rest:
        raise CheckpointError(f"{os.fspath(source)} does not fit {type(model).__name__}:\n" + "\n".join(rest.lines()))
    if any(value.is_meta for value in model.state_dict().values() if isinstance(value, Tensor)):
        raise CheckpointError(
            f"{type(model).__name__} is on the meta device and holds no weights; build it on a device"
        )
    if tolerated:
        shown = ", ".join(tolerated) if len(tolerated) <= 8 else summarise(tolerated)
        logger.info("%s: left as they are: %s", os.fspath(source), shown)
    model.load_state_dict({key: value for key, value in state.items() if key not in tolerated}, strict=False)
    return rest


MOST = 100_000
"""The largest whole number that a network's description may name: images, widths and depths are far smaller."""


def build_described(build: Callable[[], Network], description: Any, state: Mapping[str, Tensor]) -> Network:
    """``build()``, a network of which a file says how it is built, unless it is far larger than the weights beside it.

    Args:
        build: constructs it by ``description``, on the meta device first; it may be larger before it is pruned.
        description: nested dicts, lists and plain values.
        state: the weights.

    Raises:
        ValueError: for a depth of a thousand million, say, which would take all memory or time.
    """
    waiting = [description]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (Mapping, list, tuple)):
            waiting += value.values() if isinstance(value, Mapping) else value
        elif isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"{value} is larger than anything in a network")
    sizes = [value.numel() for value in state.values()]
    left = {"parameters": 20 * len(sizes) + 1000, "values": 20 * sum(sizes) + 10_000_000}

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        left["parameters"] -= 1
        left["values"] -= 0 if parameter is None else parameter.numel()
        if min(left.values()) < 0:
            raise ValueError(f"it describes a network that is far larger than the {len(state)} weights in the file")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            build()
    finally:
        hook.remove()
    return build()


def summarise(keys: Sequence[str]) -> str:
    """``rtsm.0 to rtsm.13 (168 keys), tsm.0 to tsm.2 (21 keys)``: every module that holds some of the keys."""
    groups: dict[str, list[int]] = {}
    for key in keys:
        name, _, rest = key.partition(".")
        index = rest.split(".")[0]
        groups.setdefault(name, []).append(int(index) if index.isdigit() else -1)
    words = []
    for name, found in groups.items():
        first, last = min(found), max(found)
        modules = name if first < 0 else f"{name}.{first}" + (f" to {name}.{last}" if last > first else "")
        words.append(f"{modules} ({len(found)} key{'s' * (len(found) > 1)})")
    return ", ".join(words)


def keep_own_heads(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    names: Sequence[str] = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"),
    source: str | os.PathLike[str] = "checkpoint",
) -> dict[str, Any]:
    """``state`` with the model's own layers ``names`` where the file's are for another number of classes; says so."""
    own, state = model.state_dict(), dict(state)
    for key in names:
        if key in state and key in own and state[key].shape != own[key].shape:
            logger.warning(
                "%s: %s is for %d classes, the network has %d: this layer starts from random weights",
                os.fspath(source), key, len(state[key]), len(own[key]),
            )  # fmt: skip
            state[key] = own[key]
    return state
