"""What stands around a model that trains, DistributedDataParallel and torch.compile: put on and taken off."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from common.run.launch import World


def prepare_network(
    model: nn.Module,
    world: World,
    *,
    compiled: bool = False,
    find_unused_parameters: bool = False,
    broadcast_buffers: bool = True,
) -> nn.Module:
    """What a training step calls: ``model`` under DistributedDataParallel if there are several ranks, then compiled.

    Args:
        model: the bare module.
        world: this process's place.
        compiled: run it through torch.compile.
        find_unused_parameters: some parameters may take no part in a step.
        broadcast_buffers: give every rank rank 0's buffers before each forward pass; False where the ranks change
            theirs alike, such as masks as large as the weights.
    """
    network = model
    if world.size > 1:
        exchange: dict[str, bool] = {}
        if not broadcast_buffers:  # torch 2.15 renamed the argument and warns about the old name
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            exchange["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        network = DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            find_unused_parameters=find_unused_parameters,
            **exchange,  # pyright: ignore[reportArgumentType] - only the two switches named above
        )
    if compiled:
        network = torch.compile(network)
    return network  # pyright: ignore[reportReturnType] - an OptimizedModule is a module


def uncompiled(model: nn.Module) -> nn.Module:
    """``model`` without torch.compile's shell."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself, without torch.compile's and DistributedDataParallel's shells."""
    while True:
        inner = uncompiled(model)
        if isinstance(inner, (DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        if inner is model:
            return model
        model = inner


def without_exchange(model: nn.Module) -> nn.Module:
    """``model`` with DistributedDataParallel removed, and torch.compile kept where it is not around that."""
    inner = uncompiled(model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def no_sync(network: nn.Module | None) -> AbstractContextManager[None]:
    """Passes in here exchange no gradients between ranks; see ``Optimization.no_sync``."""
    inner = None if network is None else uncompiled(network)
    if isinstance(inner, DistributedDataParallel):
        return inner.no_sync()
    return contextlib.nullcontext()
