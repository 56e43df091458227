"""Find, load and describe the compiled operators ``torch.ops.leanvit_act``: ada_cluster, weighted_sum and broadcast.

They are looked for beside this file (``python setup.py build develop`` puts them there) and in the installed package
``leanvit_act`` (``pip install``). Nothing is loaded at import. Without them, or where they were built for another
torch, the plain PyTorch form runs and a warning says so, once.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.flops import CUSTOM_OPERATORS
from hourglass_swag.models.ops.ACT.extensions import plain

NAMESPACE = "leanvit_act"
HOW_TO_BUILD = "to build it: cd hourglass_swag/models/ops && python setup.py build develop (or pip install .)"

_log = logging.getLogger(__name__)
_allowed = True
_kinds: frozenset[str] | None = None  # what ``load`` returned


def find_library() -> Path | None:
    """File of the compiled operators, built in this checkout or installed; None if there is none."""
    folders = [Path(__file__).parent / "compiled"]
    spec = importlib.util.find_spec(NAMESPACE)
    folders += [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    return next((path for folder in folders for path in sorted(folder.glob("_C*.so"))), None)


def load() -> frozenset[str]:
    """Load the library, the first time.

    Returns:
        Device types that it serves: ``cpu`` and, if it was built with nvcc, ``cuda``; none without a usable library.
    """
    global _kinds
    if _kinds is None:
        _kinds = _load()
    return _kinds


def _load() -> frozenset[str]:
    path = find_library()
    if path is None:
        _log.warning("the operators of ACT are not compiled, their plain PyTorch form runs; %s", HOW_TO_BUILD)
        return frozenset()
    try:
        torch.ops.load_library(path)
        kinds = frozenset(
            kind for kind, key in (("cpu", "CPU"), ("cuda", "CUDA"))
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::ada_cluster", key)
        )  # fmt: skip
        _describe()
    except (OSError, RuntimeError) as error:
        _log.warning(
            "the operators of ACT in %s do not work with torch %s, their plain PyTorch form runs (%s); %s",
            path, torch.__version__, error, HOW_TO_BUILD,
        )  # fmt: skip
        return frozenset()
    return kinds


def serves(device: torch.device) -> bool:
    """Whether tensors on ``device`` go through the compiled operators."""
    if not _allowed:
        return False
    kinds = load()
    if device.type == "cuda" and kinds and "cuda" not in kinds:
        _warn_without_cuda()
    return device.type in kinds or (device.type == "meta" and bool(kinds))


@cache
def _warn_without_cuda() -> None:
    _log.warning("the operators of ACT were compiled without CUDA, on GPUs their plain form runs; %s", HOW_TO_BUILD)


@contextmanager
def plain_only() -> Iterator[None]:
    """The plain PyTorch form inside, whatever is built."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def _describe() -> None:
    """Shapes for tracing, and gradients."""
    library = torch.library

    @library.register_fake(f"{NAMESPACE}::ada_cluster")
    def _(hashes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(hashes, dtype=torch.int32), torch.empty_like(hashes, dtype=torch.int32)

    @library.register_fake(f"{NAMESPACE}::weighted_sum")
    def _(x: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], weights.shape[1], x.shape[2])

    @library.register_fake(f"{NAMESPACE}::broadcast")
    def _(y: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
        return y.new_empty(y.shape[0], groups.shape[1], y.shape[2])

    operators = getattr(torch.ops, NAMESPACE)

    def remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def weighted_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, groups, weights = ctx.saved_tensors
        grad_x = operators.broadcast(grad, groups, weights) if ctx.needs_input_grad[0] else None
        return grad_x, None, _weights_gradient(x, grad, groups) if ctx.needs_input_grad[2] else None

    def broadcast_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        y, groups, weights = ctx.saved_tensors
        grad_y = operators.weighted_sum(grad, groups, weights) if ctx.needs_input_grad[0] else None
        return grad_y, None, _weights_gradient(grad, y, groups) if ctx.needs_input_grad[2] else None

    library.register_autograd(f"{NAMESPACE}::weighted_sum", weighted_sum_backward, setup_context=remember)
    library.register_autograd(f"{NAMESPACE}::broadcast", broadcast_backward, setup_context=remember)
    for name in ("ada_cluster", "weighted_sum", "broadcast"):
        CUSTOM_OPERATORS[f"{NAMESPACE}::{name}"] = _no_products


def _weights_gradient(per_token: Tensor, per_group: Tensor, groups: Tensor) -> Tensor:
    """Of either operator: sum over the members of a group of the inner product of (R, N, D) with (R, C, D), (R, C)."""
    products = (per_token * plain.copy_groups(per_group, groups)).sum(2, keepdim=True)
    return plain.sum_groups(products, groups, per_group.shape[1])[..., 0]


def _no_products(*_: Any) -> int:
    return 0
