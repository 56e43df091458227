"""Operations of a model under the convention of the Hourglass repository, counted from what is really executed.

The published tool walks a trace made by torch 1.10, in which attention is spelled out. Under recent torch it is wrong:
attention has become a single operation that is not in its table, and einsum fails. This one watches the operations that
a forward pass dispatches, before torch splits them up, and applies the same rules (``jit_handles``). Fused attention
counts as the two products, the softmax and the scaling that it stands for. Work that does not reach the output counts
too (a trace drops it); the models here do none.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.measure.flops import CONVENTIONS, OpCounts, check_countable, no_fastpath, unwrap
from hourglass_swag.models.ats_vision_transformer import ATSBlock
from hourglass_swag.models.evo_vit import EvoEncoderBlock
from hourglass_swag.models.ops.ACT.ada_clustering_attention import AdaClusteringAttention
from hourglass_swag.models.ops.cluster import TokenClusteringBlock
from hourglass_swag.models.ops.smyrf.attn import SmyrfAttention
from hourglass_swag.tools import jit_handles as handles

_log = logging.getLogger(__name__)

_NAMED = ("add", "add_", "mul", "sub", "div", "exp_", "floor_divide", "relu", "relu_", "gelu", "linalg_norm", "cumsum")

Rule = Callable[..., Mapping[str, int]]

SUPPORTED_OPS: dict[str, Rule] = {
    "aten::linear": handles.linear_flop_jit,
    "aten::addmm": handles.addmm_flop_jit,
    **dict.fromkeys(
        ("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", "aten::_convolution"),
        handles.conv_flop_jit,
    ),
    "aten::matmul": handles.matmul_flop_jit,
    "aten::mm": handles.matmul_flop_jit,
    "aten::bmm": handles.bmm_flop_jit,
    "aten::baddbmm": lambda inputs, outputs=(): handles.bmm_flop_jit(inputs[1:], outputs),
    "aten::einsum": handles.einsum_flop_jit,
    "aten::scaled_dot_product_attention": handles.scaled_dot_product_attention_flop,
    **dict.fromkeys(("aten::batch_norm", "aten::layer_norm"), handles.batchnorm_flop_jit),
    "aten::softmax": handles.softmax_flop_jit,
    **dict.fromkeys(("aten::dropout", "aten::dropout_"), handles.dropout_flop_jit),
    "aten::rsqrt": handles.rsqrt_flop_jit,
    "tome::merge_wavg": handles.merge_wavg_flop,
    **{f"aten::{name}": partial(handles.basic_binary_op_flop_jit, name=f"aten::{name}") for name in _NAMED},
}
"""Operation -> rule. Anything else is not counted by the convention and is named once in a warning."""

_KEYS = {
    "linear_bias": "linear",
    "matmul": "bmm",
    "matmul_saved": "bmm",
    "layer_norm": "batchnorm",
    "batch_norm": "batchnorm",
}
_UNPREFIXED = ("linear", "conv", "softmax", "dropout", "rsqrt")


def count_clustering(
    layer: nn.Module, inputs_shapes: Sequence[Sequence[int]], outputs_shapes: Sequence[Sequence[int]]
) -> Counter[str]:
    """The clustering layer by the published formulas; it executes the same matrix products, but less around them."""
    assert isinstance(layer, TokenClusteringBlock)
    images, channels, height, width = inputs_shapes[0]
    ops = layer.count_ops(height * width, channels, outputs_shapes[0][1] if layer.grid is None else None)
    return _by_key(ops * images)


def count_sampling(
    layer: nn.Module, inputs_shapes: Sequence[Sequence[int]], outputs_shapes: Sequence[Sequence[int]]
) -> Counter[str]:
    """An ATS layer by the published formula; it attends from the sampled tokens alone, the published one from all."""
    assert isinstance(layer, ATSBlock)
    (entering, images, _), leaving = inputs_shapes[0], outputs_shapes[0][0]
    return _by_key(layer.count_ops(entering, leaving) * images)


def count_clustered_attention(
    layer: nn.Module, inputs_shapes: Sequence[Sequence[int]], outputs_shapes: Sequence[Sequence[int]]
) -> Counter[str]:
    """The attention of ACT or SMYRF on queries (B, h, N, d) or (R, N, d) by the published formulas."""
    assert isinstance(layer, (AdaClusteringAttention, SmyrfAttention))
    *rows, tokens, width = inputs_shapes[0]
    heads = math.prod(rows)
    return _by_key(layer.count_ops(tokens, heads * width, heads))


def count_evolution(
    layer: nn.Module, inputs_shapes: Sequence[Sequence[int]], outputs_shapes: Sequence[Sequence[int]]
) -> Counter[str]:
    """A layer of Evo-ViT by the published formula, which averages whole attention maps."""
    assert isinstance(layer, EvoEncoderBlock)
    tokens, images, _ = inputs_shapes[0]
    first, update = not any(inputs_shapes[1:]), any(outputs_shapes[1:])
    return _by_key(layer.count_ops(tokens, first=first, update=update) * images)


def _by_key(ops: OpCounts) -> Counter[str]:
    """Analytic counts under the convention, by the keys of the published tool."""
    counts: Counter[str] = Counter()
    for kind, cost in CONVENTIONS["swag"].by_kind(ops).items():
        counts[_KEYS.get(kind, kind if kind in _UNPREFIXED else f"aten::{kind}")] += cost
    return counts


LAYERS: dict[type[nn.Module], Rule] = {
    TokenClusteringBlock: count_clustering,
    ATSBlock: count_sampling,
    AdaClusteringAttention: count_clustered_attention,
    SmyrfAttention: count_clustered_attention,
    EvoEncoderBlock: count_evolution,
}
"""Layers that are counted as a whole: class -> rule(layer, inputs_shapes, outputs_shapes)."""

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
    customized_ops: Mapping[str | type[nn.Module], Rule] | None = None,
) -> dict[str, float]:
    """Operations of one forward pass in units of 1e9, by the keys of the published tool; their sum is its total.

    Args:
        model: network in the mode to be counted (evaluation mode for the published numbers), on any device; on the meta
            device nothing is computed. Wrappers of torch.compile and data parallelism are looked through.
        inputs: what ``model.forward`` takes.
        whitelist: operations to count, such as ``aten::linear``; all that are supported if None. With a whitelist, no
            layer is counted as a whole.
        customized_ops: rules added to, or put in place of, those of ``SUPPORTED_OPS`` (operation name -> handle of
            ``jit_handles``) and ``LAYERS`` (class of modules -> rule for everything inside them).

    Returns:
        Key -> G: ``linear``, ``bmm``, ``conv``, ``softmax``, ``batchnorm`` (both normalisations), ``aten::add``, ...

    Raises:
        ValueError: if ``whitelist`` names an operation that is not supported (the published tool: AssertionError), or
            if the model's operations cannot be seen.
    """
    custom = dict(customized_ops or {})
    rules: dict[str, Rule] = dict(SUPPORTED_OPS)
    rules.update({key: handle for key, handle in custom.items() if isinstance(key, str)})
    layers = LAYERS | {key: handle for key, handle in custom.items() if not isinstance(key, str)}
    if whitelist is not None:
        if unknown := sorted(set(whitelist) - set(rules)):
            raise ValueError(
                f"whitelist must be a subset of the supported operations; {unknown} are not. Supported: {sorted(rules)}"
            )
        rules = {name: handle for name, handle in rules.items() if name in whitelist}
        layers = {}
    model = unwrap(model)
    check_countable(model)
    counter = _OpCounter(rules, quiet=set() if whitelist is None else set(SUPPORTED_OPS))
    with torch.inference_mode(), no_fastpath(), _layers_counted_whole(model, layers, counter), counter:
        model(*inputs)
    if skipped := sorted(counter.skipped - _reported):
        _reported.update(skipped)
        _log.warning("operations that the convention does not count: %s", ", ".join(skipped))
    return {key: count / 1e9 for key, count in counter.counts.items()}


class _OpCounter(TorchDispatchMode):
    """Apply the rules to each operation as the model wrote it; inference mode lets composite ones arrive whole."""

    def __init__(self, rules: Mapping[str, Rule], quiet: set[str]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.skipped: set[str] = set()
        self.paused = 0
        self._rules = rules
        self._quiet = quiet

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = func._schema.name
        rule = self._rules.get(name)
        if rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            result = func(*args, **kwargs)
            if name.removeprefix("aten::") not in _MOVES and name not in self._quiet:
                self.skipped.add(name)
            return result
        result = func(*args, **kwargs)
        arguments = [argument.name for argument in func._schema.arguments]
        operands = [*args, *(kwargs[key] for key in arguments[len(args) :] if key in kwargs)]
        extra = {}
        if name == "aten::einsum":
            extra["equation"] = operands[0]
            operands = operands[1]
        self.counts.update(rule(_shapes(operands), _shapes(tree_leaves(result)), **extra))
        return result


def _shapes(values: Sequence[Any]) -> list[list[int]]:
    """Shape of each operand; an empty list for one that is not a tensor."""
    return [list(value.shape) if isinstance(value, Tensor) else [] for value in values]


@contextmanager
def _layers_counted_whole(
    model: nn.Module, layers: Mapping[type[nn.Module], Rule], counter: _OpCounter
) -> Iterator[None]:
    """Count modules of the given classes by their handle, and nothing that happens inside them."""

    def enter(*_: Any) -> None:
        counter.paused += 1

    def leave(handle: Rule, module: nn.Module, args: Any, result: Any) -> None:
        counter.paused -= 1
        if not counter.paused:
            counter.counts.update(handle(module, _shapes(args), _shapes(tree_leaves(result))))

    with ExitStack() as stack:
        for module in model.modules():
            for kind, handle in layers.items():
                if isinstance(module, kind):
                    stack.callback(module.register_forward_pre_hook(enter).remove)
                    stack.callback(module.register_forward_hook(partial(leave, handle)).remove)
        yield
