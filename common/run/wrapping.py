"""What stands around a model that trains: DistributedDataParallel and torch.compile, put on and taken off, or FSDP2.

FSDP2 (``--fsdp``) changes a model in place. Each rank keeps a part of every weight, and a unit (a transformer block,
then all that is left) gathers its own while it runs, forward and backward.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.run.errors import UsageError
from common.run.launch import broadcast_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from common.run.launch import World

Result = TypeVar("Result")


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
    """Passes in here exchange no gradients between ranks; see ``Optimization.no_sync``.

    Under FSDP they do: what is not exchanged would have to be kept whole.
    """
    inner = None if network is None else uncompiled(network)
    if isinstance(inner, DistributedDataParallel):
        return inner.no_sync()
    return contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2


def shard(
    model: nn.Module,
    world: World,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    also: Sequence[str] = (),
    whole: bool = False,
) -> DeviceMesh:
    """Divide the weights of ``model`` among the ranks, in place, those of rank 0: each block is a unit, and the rest.

    Blocks are what modules called ``blocks`` hold. Weights stay in their precision, and autocast converts them where it
    would without FSDP.

    Args:
        model: on its device, the module that is called first in every pass (or run :func:`within`).
        optimizer: without a step so far; it gets the divided weights in place of the whole ones.
        also: names of further modules that hold units, whose parts nobody calls by themselves.
        whole: a model without blocks, such as a teacher that is no ViT, is one unit.

    Returns:
        The ranks as a mesh of one dimension.

    Raises:
        UsageError: a model without blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh  # only where it is asked for: it takes a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    holders = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    units = [unit for name, holder in holders if name in ("blocks", *also) for unit in holder.children()]
    units = [unit for unit in units if any(True for _ in unit.parameters())]
    if not whole and "blocks" not in dict(holders):
        raise UsageError(
            f"--fsdp divides a network by its transformer blocks, and {type(model).__name__} has no module called "
            "blocks: leave --fsdp out"
        )
    if not dist.is_initialized():  # one process that no launcher started
        backend = "nccl" if world.device.type == "cuda" and dist.is_nccl_available() else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - documented, but not in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    broadcast_tensors((*model.parameters(), *model.buffers()))
    groups = [] if optimizer is None else optimizer.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = [[names[parameter] for parameter in group["params"]] for group in groups]
    for group in groups:  # nothing may hold the whole weights any longer than need be
        group["params"] = []
    names.clear()
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* view tensor")  # nobody here writes into an output
    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        vars(unit)["run_within"] = _call  # the method that FSDP wraps next
        register_fsdp_forward_method(unit, "run_within")
    parameters = dict(model.named_parameters())
    for group, own in zip(groups, places, strict=True):
        group["params"] = [parameters[name] for name in own]
    return mesh


def _call(function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    return function(*args, **options)


def within(unit: nn.Module, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """``function(*args, **options)``, which uses weights of ``unit`` without calling it; under FSDP they are gathered.

    Args:
        unit: of :func:`shard`, or any module.
        args, options: tensors that need a gradient must be among them, alone or in lists and tuples, as in the result.
    """
    run = vars(unit).get("run_within", _call)
    return run(function, *args, **options)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Generator[None]:
    """Under FSDP every rank has all weights of ``model`` in here, and its passes wait for no other rank; no training.

    Without FSDP, and in another such block, nothing happens. Enter and leave it on all ranks.
    """
    units: list[Any] = [module for module in model.modules() if "run_within" in vars(module)]
    if not divided(model):
        units = []
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def divided(model: nn.Module) -> bool:
    """Whether this rank holds parts of the weights of ``model``: after :func:`shard`, but where they are gathered."""
    return hasattr(next(model.parameters(), None), "to_local")
