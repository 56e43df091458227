"""Costs of a model: one counter of what a forward pass executes, and the conventions that the five papers weigh it by.

- ``OpCounts``: amounts by kind of operation, ``KINDS``.
- ``count_operations``: those of a forward pass, on the meta device without weights, data or a GPU.
- ``Convention``: which kinds a paper's tool counts, and with what weight. A multiply-accumulate is 1 in all of them;
  the papers print the sum as "FLOPs". Where a tool counts something else than runs, the module says so
  (``published_ops``).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from common.run.wrapping import unwrap

KINDS: dict[str, str] = {
    "linear": "multiply-accumulates of linear layers: rows x in x out",
    "linear_bias": "bias of linear layers: rows x out",
    "head": "multiply-accumulates of a classification head, where a paper's tool leaves the head out (UVC)",
    "head_bias": "bias of such a head",
    "conv": "multiply-accumulates of convolutions",
    "conv_bias": "bias of convolutions: output elements",
    "matmul": "multiply-accumulates of products of two activations (attention, einsum)",
    "softmax": "elements that pass a softmax",
    "layer_norm": "elements that pass a layer normalisation",
    "batch_norm": "elements that pass a batch normalisation",
    "gelu": "elements",
    "relu": "elements",
    "tanh": "elements",
    "add": "elements of the (broadcast) result",
    "sub": "elements of the (broadcast) result",
    "mul": "elements of the (broadcast) result",
    "div": "elements of the (broadcast) result",
    "exp": "elements",
    "dropout": "elements that pass a dropout layer, at any rate and in evaluation too",
    "rsqrt": "elements",
    "norm": "elements that enter a vector norm",
    "cumsum": "elements",
    "pool": "elements that enter a pooling layer",
    "upsample": "elements that leave a resize",
}
"""Every kind of operation, with its unit. A kind that is not listed here is an error, never a silent zero."""

MAC_KINDS = ("linear", "head", "conv", "matmul")


class OpCounts(Counter[str]):
    """Operation kind -> elements or multiply-accumulates; adds with ``+`` and repeats with ``* int``.

    Unlike ``Counter``, a sum keeps its type. Kinds are those of ``KINDS``.
    """

    def __add__(self, other: Mapping[str, int]) -> "OpCounts":  # pyright: ignore[reportIncompatibleMethodOverride]
        result = OpCounts(self)
        result.update(other)
        return result

    def __mul__(self, times: int) -> "OpCounts":
        return OpCounts({kind: count * times for kind, count in self.items()})

    __rmul__ = __mul__

    @property
    def macs(self) -> int:
        """Plain multiply-accumulates: linear layers, convolutions and products of activations."""
        return CONVENTIONS["macs"].total(self)


@dataclass(frozen=True)
class Convention:
    """What one tool counts: the weight of each kind it sees; kinds without a weight cost nothing."""

    name: str
    description: str
    weights: Mapping[str, int] = field(repr=False)

    def __post_init__(self) -> None:
        _check_kinds(self.weights, f"convention {self.name!r}")

    def total(self, counts: Mapping[str, int]) -> int:
        """Cost of ``counts`` in operations.

        Raises:
            ValueError: if a kind is not one of ``KINDS``.
        """
        return sum(self.by_kind(counts).values())

    def by_kind(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The terms of ``total`` that are not zero."""
        _check_kinds(counts, "operation counts")
        weighted = {kind: count * self.weights.get(kind, 0) for kind, count in counts.items()}
        return {kind: cost for kind, cost in weighted.items() if cost}


def _check_kinds(kinds: Iterable[str], where: str) -> None:
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"{where}: unknown operation kinds {unknown}; the kinds are {sorted(KINDS)}")


_MACS: dict[str, int] = dict.fromkeys(MAC_KINDS, 1)

CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(
            "macs",
            "plain multiply-accumulates of linear layers, convolutions and matrix products, nothing else",
            _MACS,
        ),
        Convention(
            "swag",
            "the tool of the Hourglass repository: multiply-accumulate 1, bias of linear layers 1 (of convolutions 0), "
            "normalisation 4, softmax 5, dropout 1 (in evaluation too), rsqrt 2, element-wise arithmetic 1",
            _MACS
            | {"linear_bias": 1, "head_bias": 1, "layer_norm": 4, "batch_norm": 4, "softmax": 5, "rsqrt": 2}
            | dict.fromkeys(("dropout", "add", "sub", "mul", "div", "exp", "gelu", "relu", "norm", "cumsum"), 1),
        ),
        Convention(
            "fvcore",
            "fvcore's FlopCountAnalysis in evaluation mode (Scala, DVT, SiT): multiply-accumulate 1, layer norm 5, "
            "batch norm 2, pooling and resizing 1 per element; no biases, softmax, activations or additions",
            _MACS | {"layer_norm": 5, "batch_norm": 2, "pool": 1, "upsample": 1},
        ),
        Convention(
            "uvc",
            "UVC's own counter: multiply-accumulates of the patch embedding and of the blocks' six matrix products; "
            "the classification head (kind 'head'), biases, normalisation and activations are left out",
            {"linear": 1, "conv": 1, "matmul": 1},
        ),
    )
}
"""The counting convention of each paper, by name."""


def gmacs(counts: Mapping[str, int], convention: str = "macs") -> float:
    """Cost in units of 1e9 under a named convention (the number that the papers print as GFLOPs).

    Raises:
        ValueError: if the convention or a kind is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown counting convention {convention!r}; the conventions are {sorted(CONVENTIONS)}")
    return CONVENTIONS[convention].total(counts) / 1e9


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, each shared one once; buffers are not parameters. Works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


# Counting.

Rule = Callable[[Sequence[Any], Any], Mapping[str, int]]
"""Operands and result of an operation -> kinds and their amounts."""

PublishedRule = Callable[[OpCounts, Sequence[Any], Any], Mapping[str, int]]
"""What was counted inside a module, its arguments and its result -> what the paper's tool counts for that call."""


def _mm(args: Sequence[Any], out: Any) -> Mapping[str, int]:
    """mm, bmm, mv, dot and their kin: elements of the first operand times columns of the second."""
    first, second = args[0], args[1]
    return {"matmul": first.numel() * (second.shape[-1] if second.dim() >= 2 else 1)}


def _matmul(args: Sequence[Any], out: Any) -> Mapping[str, int]:
    """matmul, which may repeat either operand."""
    return {"matmul": out.numel() * args[0].shape[-1]}


def _addmm(args: Sequence[Any], out: Any) -> Mapping[str, int]:
    return _mm(args[1:], out)


def _linear(args: Sequence[Any], out: Any) -> Mapping[str, int]:
    features, weight, *bias = args
    counts = {"linear": features.numel() * (weight.shape[0] if weight.dim() > 1 else 1)}
    return counts | {"linear_bias": out.numel()} if bias and bias[0] is not None else counts


def _convolution(args: Sequence[Any], out: Any) -> Mapping[str, int]:
    """Forward and transposed convolution, grouped or not; the argument order is that of aten::convolution."""
    images, weight, bias = *args[:2], args[2] if len(args) > 2 else None
    transposed = len(args) > 7 and args[6]
    counts = {"conv": (images if transposed else out).numel() * math.prod(weight.shape[1:])}
    return counts if bias is None else counts | {"conv_bias": out.numel()}


def _attention(args: Sequence[Any], out: Any) -> Mapping[str, int]:
    """Fused attention as its plain form: Q K^T, A V, softmax, scaling of the queries; masked entries count."""
    query, key, value = args[:3]
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    counts = {"matmul": scores * (query.shape[-1] + value.shape[-1]), "softmax": scores, "div": query.numel()}
    return counts if len(args) < 4 or not isinstance(args[3], Tensor) else counts | {"add": scores}


def _per_element(kind: str) -> Rule:
    """So much per element of the result, which has the size that operands broadcast to; indices cost nothing."""
    return lambda args, out: {kind: out.numel()} if out.is_floating_point() else {}


def _per_input(kind: str) -> Rule:
    return lambda args, out: {kind: args[0].numel()}


RULES: dict[str, Rule] = {
    "linear": _linear,
    "matmul": _matmul,
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm"), _mm),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_"), _addmm),
    **dict.fromkeys(("addmv", "addmv_", "_addmm_activation"), _addmm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "convolution_overrideable"), _convolution),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    **{kind: _per_input(kind) for kind in ("layer_norm", "batch_norm", "softmax", "rsqrt")},
    **dict.fromkeys(("dropout", "dropout_"), _per_input("dropout")),
    **dict.fromkeys(("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"), _per_input("pool")),
    **{f"upsample_{mode}2d": _per_element("upsample") for mode in ("nearest", "bilinear", "bicubic")},
    **{kind: _per_element(kind) for kind in ("add", "sub", "mul", "div", "gelu", "relu", "cumsum")},
    "add_": _per_element("add"),
    "relu_": _per_element("relu"),
    "exp_": _per_element("exp"),
    "floor_divide": _per_element("div"),
    "linalg_norm": _per_input("norm"),
}
"""Operation of torch (``aten``) -> what it counts. One that is not here is looked into, and counts nothing if plain."""

_SUSPICIOUS = re.compile(
    r"mm|mv|matmul|matrix|dot|conv|attention|linear|einsum|gemm|inner|outer|cdist|pdist|_dist|lstm|gru|rnn|transformer"
    r"|chain|kron|tensordot|addr_?$|^ger$"
)
_HARMLESS = re.compile(
    r"^(_?upsample_\w*linear\w*|\w*gamma\w*|_?cum(max|min)\w*|hamming_window|is_distributed|convert_element_type)$"
)
_PLAIN_NAMESPACES = frozenset({"aten", "prims", "prim", "profiler", "c10d", "_c10d_functional"})

CUSTOM_OPERATORS: dict[str, Callable[[Sequence[Any], Any], int | Mapping[str, int]]] = {}
"""``namespace::name`` of a custom operator -> kinds, or multiply-accumulates alone, of operands and result; who loads
it adds it."""


@dataclass
class Counted:
    """What one forward pass does."""

    executed: OpCounts = field(default_factory=OpCounts)
    """every operation dispatched"""
    published: OpCounts = field(default_factory=OpCounts)
    """the same, but for the modules whose paper counts something else: the number that a convention weighs"""
    without_rule: set[str] = field(default_factory=set)
    """operations that have no kind, such as moves of data, outside modules that say what is published"""


def count_operations(
    model: nn.Module,
    *inputs: Any,
    published: Mapping[nn.Module, PublishedRule] | None = None,
    rules: Mapping[str, Rule] | None = None,
) -> Counted:
    """Operations of a forward pass in evaluation mode, without gradients, for the whole batch.

    Every operation is seen as the model wrote it, before torch splits it up. With inputs on the meta device nothing is
    computed and no weight is read, wherever the model is. Costs that depend on weights and images need real ones.

    A module that its paper's tool counts otherwise than it is executed has a method
    ``published_ops(inside, args, result)``, a ``PublishedRule``.

    Args:
        model: network; wrappers of torch.compile and of data parallelism are looked through.
        inputs: what ``model.forward`` takes.
        published: further such rules, by module; they win over the modules' own.
        rules: in place of those of ``RULES``, by ``namespace::name``, or ``name`` alone for torch's own.

    Raises:
        ValueError: if an operation could hide matrix products (a custom kernel, an unknown name), or if the model was
            compiled in place or turned into TorchScript, so that its operations cannot be seen.
    """
    model = unwrap(model)
    _check_countable(model)
    overrides: dict[nn.Module, Any] = {
        module: module.published_ops for module in model.modules() if hasattr(module, "published_ops")
    }
    counter = _OperationCounter({**CUSTOM_OPERATORS, **RULES, **(rules or {})})
    on_meta = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(inputs))
    state = {}
    if on_meta:
        tensors = (*model.named_parameters(), *model.named_buffers())
        state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors if not tensor.is_meta}
    with ExitStack() as stack:
        for module, rule in (overrides | dict(published or {})).items():
            stack.callback(module.register_forward_pre_hook(counter.enter).remove)
            stack.callback(module.register_forward_hook(partial(counter.leave, rule)).remove)
        for context in (evaluating(model), torch.inference_mode(), _no_fastpath(), counter):
            stack.enter_context(context)
        if state:
            torch.func.functional_call(model, state, inputs)
        else:
            model(*inputs)
    return counter.counted


class _OperationCounter(TorchDispatchMode):
    """Add up the operations dispatched while active; inference mode lets composite ones arrive whole."""

    def __init__(self, rules: Mapping[str, Callable[[Sequence[Any], Any], int | Mapping[str, int]]]) -> None:
        super().__init__()
        self.counted = Counted()
        self._rules = rules
        self._entered: list[OpCounts] = []

    def enter(self, *_: Any) -> None:
        self._entered.append(OpCounts(self.counted.published))

    def leave(self, rule: PublishedRule, module: nn.Module, args: Any, result: Any) -> None:
        before = self._entered.pop()
        inside = OpCounts(self.counted.published)
        inside.subtract(before)
        self.counted.published = before + rule(inside, args, result)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        rule = self._rules.get(func._schema.name) or (self._rules.get(name) if namespace == "aten" else None)
        if rule is None and namespace not in _PLAIN_NAMESPACES:
            raise ValueError(
                f"cannot count {namespace}::{name}: a custom operator may hide matrix products. Count the model with "
                "its plain PyTorch form instead"
            )
        if rule is None:
            with self:  # composite: look inside before judging the name
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            if _SUSPICIOUS.search(name) and not _HARMLESS.match(name):
                raise ValueError(
                    f"cannot count {func}: its name suggests matrix products, but common/measure/flops.py has no rule "
                    "for it; add one to RULES (or to _HARMLESS if it holds no matrix product)"
                )
            if not self._entered:
                self.counted.without_rule.add(func._schema.name)
            return func(*args, **kwargs)
        result = _run(func, args, kwargs)
        names = [argument.name for argument in func._schema.arguments]
        counts = rule([*args, *(kwargs[key] for key in names[len(args) :] if key in kwargs)], result)
        counts = {"matmul": counts} if isinstance(counts, int) else counts
        self.counted.executed.update(counts)
        self.counted.published.update(counts)
        return result


_shapes: dict[Any, Tensor] = {}
"""Operation and what it took -> what it gave, without data. Blocks repeat, and torch takes long to say."""


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation's result; on the meta device remembered where it is one new tensor."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if (
        not tensors
        or not all(tensor.is_meta for tensor in tensors)
        or any(each.alias_info for each in func._schema.arguments)
    ):
        return func(*args, **kwargs)
    took = (
        (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
    )
    key = (func, structure, *took)
    if key not in _shapes:
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        _shapes[key] = result
    known = _shapes[key]
    return torch.empty_strided(known.shape, known.stride(), dtype=known.dtype, device="meta")


def _check_countable(model: nn.Module) -> None:
    """Refuse a model whose operations cannot be seen one by one."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"cannot count a TorchScript module ({name or 'the model'}); pass the model it was made from"
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"cannot count a compiled module ({name or 'the model'}); count before compiling")


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode inside, the training flag of every module as before after."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _no_fastpath() -> Generator[None]:
    """Without the fused inference kernels of nn.MultiheadAttention and nn.TransformerEncoderLayer."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
