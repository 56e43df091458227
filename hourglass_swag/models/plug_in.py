"""What ACT and SMYRF share: which layers a method of attention replaces, and whom to warn of its settings."""

import sys
from itertools import count

NEVER = -1  # the plug-out index that never matches
BETWEEN = ("common.hosts", "hourglass_swag.host", "hourglass_swag.models", "leanvit")


def caller() -> int:
    """``stacklevel`` at which ``warnings.warn`` in the calling function names the line that gave the settings."""
    for level in count(1):
        try:
            name = sys._getframe(level).f_globals.get("__name__", "")  # pyright: ignore[reportPrivateUsage]
        except ValueError:
            return level - 1
        if not any(name == each or name.startswith(f"{each}.") for each in BETWEEN):
            return level
    raise AssertionError("frames end")


def plugged_in(num_layers: int, plug_in_index: int, plug_out_index: int, method: str) -> tuple[int, ...]:
    """Layers that use the method: [in, out), or [in, L) where ``out`` does not lie behind ``in``.

    Args:
        num_layers: L.
        plug_in_index: first layer with the method.
        plug_out_index: first layer after that without it; -1: never.
        method: beginning of the two flags' names, for errors.

    Raises:
        ValueError: if an index is beyond the layers.
    """
    if not 0 <= plug_in_index < num_layers:
        raise ValueError(f"{method}_plug_in_index must be 0 to {num_layers - 1}, got {plug_in_index}")
    if plug_out_index != NEVER and not 0 <= plug_out_index <= num_layers:
        raise ValueError(f"{method}_plug_out_index must be 0 to {num_layers}, or -1 for never, got {plug_out_index}")
    end = plug_out_index if plug_out_index > plug_in_index else num_layers
    return tuple(range(plug_in_index, end))
