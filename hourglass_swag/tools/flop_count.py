"""Operations of a model under the convention of the Hourglass repository, by the keys of its tool.

The published tool walks a trace made by torch 1.10, in which attention is spelled out. Under recent torch it is wrong:
attention has become a single operation that is not in its table, and einsum fails. This one weighs what
``common.measure.flops.count_operations`` sees. Fused attention counts as the two products, the softmax and the scaling
that it stands for. Work that does not reach the output counts too (a trace drops it); the models here do none.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.measure.flops import CONVENTIONS, RULES, Rule, count_operations

_log = logging.getLogger(__name__)

Handle = Callable[..., Mapping[str, int]]
"""Shapes of operands and results (behind the layer itself, for a layer) -> published key -> operations."""

SUPPORTED_OPS: dict[str, Rule] = {f"aten::{name}": rule for name, rule in RULES.items()}
"""Operation -> rule. Anything else is not counted by the convention and is named once in a warning."""

_KEYS = {
    **dict.fromkeys(("linear", "linear_bias"), "linear"),
    **dict.fromkeys(("layer_norm", "batch_norm"), "batchnorm"),
    "matmul": "bmm",
    "conv": "conv",
    "softmax": "softmax",
    "dropout": "dropout",
    "rsqrt": "rsqrt",
}
_OWN = "="  # before a key that a handle gave

# fmt: off
_MOVES = frozenset((
    "alias", "arange", "as_strided", "cat", "chunk", "clone", "constant_pad_nd", "contiguous", "copy_",
    "detach", "empty", "empty_like", "eq", "expand", "expand_as", "flatten", "full", "full_like", "gather",
    "index", "lift_fresh", "masked_fill", "movedim", "new_empty", "new_ones", "new_zeros", "ones", "ones_like",
    "pad", "permute", "repeat", "reshape", "scatter", "scatter_", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "view_as", "where", "zeros", "zeros_like", "_to_copy", "_unsafe_view",
))
# fmt: on
"""Operations that only move or create data: no warning."""

_reported: set[str] = set()


def flop_count(
    model: nn.Module,
    inputs: Sequence[Any],
    whitelist: Collection[str] | None = None,
    customized_ops: Mapping[str | type[nn.Module], Handle] | None = None,
) -> dict[str, float]:
    """Operations of one forward pass in units of 1e9, by the keys of the published tool; their sum is its total.

    Args:
        model, inputs: see ``count_operations``.
        whitelist: operations to count, such as ``aten::linear``; all that are supported if None. With a whitelist, no
            layer is counted as a whole.
        customized_ops: handles added to, or put in place of, ``SUPPORTED_OPS`` (operation name -> handle as those of
            ``jit_handles``), and for everything inside modules of a class (class -> handle).

    Returns:
        Key -> G: ``linear``, ``bmm``, ``conv``, ``softmax``, ``batchnorm`` (both normalisations), ``aten::add``, ...

    Raises:
        ValueError: if ``whitelist`` names an operation that is not supported (the published tool: AssertionError), or
            if the model's operations cannot be seen.
    """
    custom = dict(customized_ops or {})
    rules = {name: _rule_of(name, handle) for name, handle in custom.items() if isinstance(name, str)}
    layers = {
        module: (lambda inside, args, out, module=module, handle=handle: _named(handle(module, *_shapes(args, out))))
        for kind, handle in custom.items()
        if not isinstance(kind, str)
        for module in model.modules()
        if isinstance(module, kind)
    }
    supported = SUPPORTED_OPS | rules
    if whitelist is not None:
        if unknown := sorted(set(whitelist) - set(supported)):
            raise ValueError(
                f"whitelist must be a subset of the supported operations; {unknown} are not. "
                f"Supported: {sorted(supported)}"
            )
        rules |= {name: lambda args, out: {} for name in set(supported) - set(whitelist)}
    counted = count_operations(model, *inputs, rules=rules, published=layers)
    skipped = {name for name in counted.without_rule if name.removeprefix("aten::") not in _MOVES} - _reported
    if skipped and whitelist is None:
        _reported.update(skipped)
        _log.warning("operations that the convention does not count: %s", ", ".join(sorted(skipped)))
    by_key: Counter[str] = Counter()
    weights = CONVENTIONS["swag"].weights
    for kind, amount in (counted.published if whitelist is None else counted.executed).items():
        if kind.startswith(_OWN):
            by_key[kind.removeprefix(_OWN)] += amount
        elif weights.get(kind):
            by_key[_KEYS.get(kind, f"aten::{kind}")] += amount * weights[kind]
    return {key: count / 1e9 for key, count in by_key.items()}


def _rule_of(name: str, handle: Handle) -> Rule:
    """The rule that a handle on shapes is."""

    def rule(args: Sequence[Any], out: Any) -> Mapping[str, int]:
        if name == "aten::einsum":
            return _named(handle(*_shapes(args[1], out), equation=args[0]))
        return _named(handle(*_shapes(args, out)))

    return rule


def _named(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts under keys that no kind has."""
    return {_OWN + key: count for key, count in counts.items()}


def _shapes(args: Sequence[Any], out: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Shape of each operand and result; an empty list for one that is not a tensor."""
    operands, results = (
        [list(x.shape) if isinstance(x, Tensor) else [] for x in xs] for xs in (args, tree_leaves(out))
    )
    return operands, results
