"""Find, load and describe the compiled operators of ACT and SMYRF, ``torch.ops.leanvit_ops``.

They are looked for beside this file (``python setup.py build develop`` puts them there) and in the installed package
``leanvit_ops`` (``pip install``). Nothing is loaded at import. Without them, or where they were built for another
torch, the plain PyTorch form runs and a warning says so, once.
"""

import importlib.util
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.measure.flops import CUSTOM_OPERATORS

NAMESPACE = "leanvit_ops"
OPERATORS = ("ada_cluster", "weighted_sum", "broadcast", "sort_rows", "attend_in_clusters")
HOW_TO_BUILD = "to build it: cd hourglass_swag/models/ops && python setup.py build develop (or pip install .)"

_log = logging.getLogger(__name__)
_allowed = True


def find_library() -> Path | None:
    """File of the compiled operators, built in this checkout or installed; None if there is none."""
    folders = [Path(__file__).parent / "compiled"]
    spec = importlib.util.find_spec(NAMESPACE)
    folders += [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    return next((path for folder in folders for path in sorted(folder.glob("_C*.so"))), None)


@cache
def load() -> dict[str, frozenset[str]]:
    """Load the library, the first time.

    Returns:
        Operator -> types of devices that it serves; nothing without a usable library.
    """
    path = find_library()
    if path is None:
        _log.warning("the operators of ACT and SMYRF are not compiled, their plain PyTorch form runs; %s", HOW_TO_BUILD)
        return {}
    try:
        torch.ops.load_library(path)
        _describe()
    except (OSError, RuntimeError) as error:
        _log.warning(
            "the operators of ACT and SMYRF in %s do not work with torch %s, their plain PyTorch form runs (%s); %s",
            path,
            torch.__version__,
            error,
            HOW_TO_BUILD,
        )
        return {}
    has = torch._C._dispatch_has_kernel_for_dispatch_key  # pyright: ignore[reportPrivateUsage]
    return {
        name: frozenset({kind for kind in ("cpu", "cuda") if has(f"{NAMESPACE}::{name}", kind.upper())} | {"meta"})
        for name in OPERATORS
    }


WIDE = frozenset({"attend_in_clusters"})
"""Operators written for vectors of 64 bytes: with narrower ones the plain form is faster on a CPU."""


def serves(device: torch.device, operator: str) -> bool:
    """Whether tensors on ``device`` go through this compiled operator."""
    return _allowed and _serves(device.type, operator)


@torch.compiler.assume_constant_result
def _serves(device_type: str, operator: str) -> bool:
    kinds = load().get(operator, frozenset())
    if operator in WIDE and device_type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if device_type == "cuda" and kinds and operator == "ada_cluster" and "cuda" not in kinds:
        _warn_without_cuda()
    return device_type in kinds


@cache
def _warn_without_cuda() -> None:
    _log.warning("the operators of ACT were compiled without CUDA, on GPUs their plain form runs; %s", HOW_TO_BUILD)


@contextmanager
def plain_only() -> Generator[None]:
    """The plain PyTorch form inside, whatever is built."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


# What tracing, gradients and the count of products need to know.


def _describe() -> None:
    """Shapes, gradients and products of the operators."""
    for name, shape_of in (
        ("ada_cluster", lambda hashes: tuple(torch.empty_like(hashes, dtype=torch.int32) for _ in range(2))),
        ("weighted_sum", lambda x, groups, weights: x.new_empty(x.shape[0], weights.shape[1], x.shape[2])),
        ("broadcast", lambda y, groups, weights: y.new_empty(y.shape[0], groups.shape[1], y.shape[2])),
        ("sort_rows", lambda values: torch.empty_like(values, dtype=torch.int64)),
        ("attend_in_clusters", lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format)),
    ):
        torch.library.register_fake(f"{NAMESPACE}::{name}", shape_of)
        CUSTOM_OPERATORS[f"{NAMESPACE}::{name}"] = _count_clusters if name == "attend_in_clusters" else _no_products
    operators = getattr(torch.ops, NAMESPACE)

    def remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def weighted_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, groups, weights = ctx.saved_tensors
        grad_x = operators.broadcast(grad, groups, weights) if ctx.needs_input_grad[0] else None
        return grad_x, None, _weights_gradient(x, grad, groups, weights) if ctx.needs_input_grad[2] else None

    def broadcast_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        y, groups, weights = ctx.saved_tensors
        grad_y = operators.weighted_sum(grad, groups, weights) if ctx.needs_input_grad[0] else None
        return grad_y, None, _weights_gradient(grad, y, groups, weights) if ctx.needs_input_grad[2] else None

    torch.library.register_autograd(f"{NAMESPACE}::weighted_sum", weighted_sum_backward, setup_context=remember)
    torch.library.register_autograd(f"{NAMESPACE}::broadcast", broadcast_backward, setup_context=remember)


def _weights_gradient(per_token: Tensor, per_group: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Of either operator: sum over the members of a group of the inner product of (R, N, D) with (R, C, D), (R, C)."""
    from hourglass_swag.models.ops.ACT.extensions import plain  # its package imports this module

    products = (per_token * plain.copy_groups(per_group, groups)).sum(2, keepdim=True, dtype=weights.dtype)
    return plain.sum_groups(products, groups, per_group.shape[1])[..., 0]


def _no_products(*_: Any) -> int:
    return 0


def _count_clusters(args: Sequence[Any], out: Tensor) -> int:
    """attend_in_clusters: two products of every query with the keys of its cluster, per round; padding counts."""
    order_q, c_q, c_k, padded = args[3], args[5], args[6], args[8]
    rounds, rows, queries = order_q.shape
    places = -(-queries // c_q) * c_q if padded else queries
    return 2 * rounds * rows * places * c_k * out.shape[2]
