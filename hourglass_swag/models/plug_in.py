"""Which layers a method of attention replaces: the rule that ACT and SMYRF share."""

NEVER = -1  # the plug-out index that never matches


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
