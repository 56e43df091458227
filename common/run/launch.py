"""Process groups: one process, or several that torchrun (``torch.distributed.launch``, submitit, ...) started.

An entry point is a function without arguments handed to ``common.run.program.run``; inside it calls :func:`launch`
once. torch's ``env://`` does the rendezvous, on CUDA (NCCL) or the CPU (Gloo). One process and many take the same
path: every function here does the right thing when there is no process group. On Slurm, start torchrun by srun.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented, but not in __all__

from common.run import program
from common.run.errors import LaunchError, UsageError
from common.run.program import get_rank, is_main

ANSWER_S = 6.0
"""How long rank 0 may take to answer who has reached its port, in seconds."""
SIZE, RANK = "leanvit/size", "leanvit/rank {}"
"""Keys of the store: of how many processes the job is, and its name; which of them have come."""
NAMES = {"slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID"), "torchrun": ("TORCHELASTIC_RUN_ID",)}
"""Variables in which a launcher tells all processes of a job, and no others, what it is called."""
HERE, JOB = "leanvit/here {}", "leanvit/job"
"""Keys of torchrun's store, which outlives its processes: a name that each rank chose, and the names of one attempt."""


@dataclass(frozen=True)
class World:
    """This process's place in the job: ``rank`` of ``size``, ``local_rank`` on its machine, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class _Place(NamedTuple):
    """What the environment says before a device is chosen."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "none"


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"environment variable {name} must be an integer, got {text!r}") from None


def _place(environment: Mapping[str, str], local_rank: int | None) -> _Place:
    """Read the variables of env://, or of a Slurm step; ``local_rank`` is the launcher's flag."""
    if "RANK" in environment or ("WORLD_SIZE" in environment and _integer(environment, "WORLD_SIZE") > 1):
        for name in ("RANK", "WORLD_SIZE"):
            if name not in environment:
                raise LaunchError(
                    f"environment variable {name} is missing although its partner is set; start through torchrun, "
                    "or unset RANK and WORLD_SIZE to run as one process"
                )
        rank, size = _integer(environment, "RANK"), _integer(environment, "WORLD_SIZE")
        if "LOCAL_RANK" in environment:
            local_rank = _integer(environment, "LOCAL_RANK")
        elif local_rank is None or local_rank < 0:  # -1 is the customary "no launcher"
            if size > 1:
                raise LaunchError(
                    "neither LOCAL_RANK nor --local-rank says which device of the machine is this process's; "
                    "start through torchrun, or export LOCAL_RANK"
                )
            local_rank = 0
        place = _Place(rank, size, local_rank, "torchrun")
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:  # not the shell of sbatch or salloc
        rank, size = _integer(environment, "SLURM_PROCID"), _integer(environment, "SLURM_STEP_NUM_TASKS")
        place = _Place(rank, size, int(environment.get("SLURM_LOCALID", "0")), "slurm")
    else:
        place = _Place()
    if not 0 <= place.rank < place.size:
        raise LaunchError(f"rank {place.rank} is not one of 0 to {place.size - 1} ({place.launcher} environment)")
    return place


def choose_device(
    name: str, *, local_rank: int = 0, size: int = 1, one_visible_gpu_is_mine: bool = False
) -> torch.device:
    """The device ``--device`` means for this process.

    Args:
        name: ``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda``, or ``cuda:N`` with one process.
        local_rank, size: place of this process on its machine, and the number of processes of the job.
        one_visible_gpu_is_mine: the launcher shows each process its own GPU only (Slurm may).

    Raises:
        LaunchError: unknown name, no usable CUDA, no such GPU, or one GPU named for several processes.
    """
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise LaunchError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no usable GPU or driver was found"
        raise LaunchError(f"--device {name}: {why}; use --device cpu, or install a CUDA build of torch and a driver")
    count = torch.cuda.device_count()
    if ":" in name:
        if size > 1:
            raise LaunchError(
                f"--device {name} names one GPU, but the job has {size} processes; use --device cuda, "
                "and CUDA_VISIBLE_DEVICES to choose GPUs"
            )
        index = int(name.split(":")[1])
    else:
        index = 0 if one_visible_gpu_is_mine and count == 1 else local_rank
    if index >= count:
        raise LaunchError(
            f"GPU {index} was asked for (--device {name}, local rank {local_rank}), but this machine shows {count}; "
            "start at most one process per GPU"
        )
    return torch.device("cuda", index)


def launch(device: str = "auto", *, local_rank: int | None = None, start_timeout_s: float = 300.0) -> World:
    """Join the job that the environment describes, or be a job of one, and select this process's device.

    Args:
        device: value of ``--device``; see :func:`choose_device`.
        local_rank: value of ``--local-rank`` / ``--local_rank``, which ``torch.distributed.launch`` passes on the
            command line when ``--use_env`` is not given; None or -1 where absent. LOCAL_RANK wins over it.
        start_timeout_s: how long to wait for the other processes, in seconds; later a rank may take an hour.

    Raises:
        LaunchError: with what to change.
    """
    place = _place(os.environ, local_rank)
    shown_alone = place.launcher == "slurm"
    chosen = choose_device(device, local_rank=place.local_rank, size=place.size, one_visible_gpu_is_mine=shown_alone)
    backend = None
    if place.size > 1:
        if dist.is_initialized():
            raise LaunchError("launch() was called twice in one process; call shutdown() between")
        backend = "nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(
            backend,
            store=_meet(place, start_timeout_s),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(hours=1),
            device_id=chosen if backend == "nccl" else None,
        )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return World(place.rank, place.size, place.local_rank, chosen, backend)


def _meet(place: _Place, wait_s: float) -> Any:
    """The store through which all ranks find each other: torchrun's, else one that rank 0 opens at MASTER_PORT."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise LaunchError(
                f"environment variable {name} is missing; start through torchrun (on Slurm: srun --ntasks-per-node=1 "
                "torchrun --nnodes=... --nproc-per-node=...), or export it"
            )
    host, port = os.environ["MASTER_ADDR"], _integer(os.environ, "MASTER_PORT")
    began = time.monotonic()
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            meet: Any = dist.rendezvous  # pyright: ignore[reportPrivateImportUsage] - documented, but not in __all__
            store = next(iter(meet("env://", place.rank, place.size, timeout=timedelta(seconds=wait_s))))[0]
            return _own_part(store, place, wait_s)
        return _open_store(host, port, place, wait_s)
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, LaunchError):
            raise
        raise LaunchError(
            f"rank {place.rank} of {place.size} waited {time.monotonic() - began:.0f} s and could not meet the other "
            f"processes at {host}:{port} (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}. Are all "
            f"{place.size} processes started, and is the port free and open?"
        ) from error


def _own_part(store: Any, place: _Place, wait_s: float) -> Any:
    """A part of torchrun's store for the processes that run now.

    The store still holds what processes said that were killed and started again: who believed an old address would wait
    for ever. So each chooses a name, rank 0 lists the names that it sees until all of them are of today, and the list
    names the part. A number of the attempt would not do: agents of several machines count differently.

    Raises:
        RuntimeError: naming the ranks that did not come.
    """
    mine, end = secrets.token_hex(8), time.monotonic() + wait_s
    store.set(HERE.format(place.rank), mine)
    names, keys = [], [HERE.format(rank) for rank in range(place.size)]
    while time.monotonic() < end:
        if not place.rank and store.check(keys):
            store.set(JOB, " ".join(store.get(key).decode() for key in keys))
        names = store.get(JOB).decode().split() if store.check([JOB]) else []
        if len(names) == place.size and names[place.rank] == mine:
            part = PrefixStore(" ".join(names), store)
            part.set(mine, "")
            if part.check(names):
                return part
        time.sleep(0.02)
    part = PrefixStore(" ".join(names), store)
    missing = [rank for rank in range(place.size) if not (rank < len(names) and part.check([names[rank]]))]
    raise RuntimeError(f"ranks {', '.join(map(str, missing))} did not come")


def _open_store(host: str, port: int, place: _Place, wait_s: float) -> Any:
    """A store on rank 0, in which every other rank notes that it is here.

    Who finds something else at the port, perhaps another job's store, knows it in seconds: there is no answer, or not
    this job's size and name, or its own note already.
    """
    end = time.monotonic() + wait_s
    job = " ".join([str(place.size), *(os.environ.get(name, "") for name in NAMES.get(place.launcher, ()))]).strip()
    taken = (
        f"port {port} of {host} (MASTER_PORT, MASTER_ADDR) is in use by something else, perhaps another job or what is "
        "left of one: choose another port, for torchrun by --master-port"
    )
    if not place.rank:
        try:
            store = TCPStore(
                host, port, place.size, is_master=True, timeout=timedelta(seconds=wait_s), wait_for_workers=False
            )
        except RuntimeError as error:
            if re.search("EADDRINUSE|address already in use", str(error), re.IGNORECASE):
                raise LaunchError(taken) from error
            raise
        store.set(SIZE, job)
        store.wait([RANK.format(rank) for rank in range(1, place.size)], timedelta(seconds=wait_s))
        return store
    while True:
        try:
            socket.create_connection((host, port), timeout=ANSWER_S).close()
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    found: list[Any] = []

    def greet() -> None:
        with contextlib.suppress(RuntimeError):
            answer = timedelta(seconds=ANSWER_S)
            store = TCPStore(host, port, is_master=False, timeout=answer, wait_for_workers=False)
            if store.get(SIZE).decode() == job and store.add(RANK.format(place.rank), 1) == 1:
                found.append(store)

    with _silent_stderr():  # torch tells of each attempt with its stack
        greeting = threading.Thread(target=greet, daemon=True)  # it waits for ever for one that keeps silent
        greeting.start()
        greeting.join(ANSWER_S + 1)  # what torch says when its own time is up is over then
    if not found:
        raise LaunchError(taken)
    found[0].set_timeout(timedelta(seconds=wait_s))
    return found[0]


@contextlib.contextmanager
def _silent_stderr() -> Generator[None]:
    """Discard what this process writes to its standard error, also from C++."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def get_world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if get_world_size() > 1:
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[torch.cuda.current_device()])
        else:
            dist.barrier()


def shutdown() -> None:
    """Leave the job in good order: wait for the others, end the process group."""
    if dist.is_available() and dist.is_initialized():
        barrier()
        dist.destroy_process_group()


program.farewells.append(shutdown)


@contextlib.contextmanager
def main_process_first() -> Generator[None]:
    """Rank 0 runs the body before the others, so that one download or cache file serves all."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


@overload
def reduce_sums(values: Tensor) -> Tensor: ...
@overload
def reduce_sums(values: Mapping[str, float | Tensor]) -> dict[str, float]: ...
def reduce_sums(values: Tensor | Mapping[str, float | Tensor]) -> Tensor | dict[str, float]:
    """Sum over the ranks, in one collective and in float64, so that counts stay exact.

    A tensor gives a tensor of its dtype on its device; a mapping of numbers or scalar tensors gives plain floats.
    Every rank must pass the same shape or the same keys.
    """
    if isinstance(values, Tensor):
        if get_world_size() == 1:
            return values
        where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        total = values.detach().to(where, torch.float64, copy=True)
        dist.all_reduce(total)
        return total.to(device=values.device, dtype=values.dtype)
    if not values:
        return {}
    columns = [torch.as_tensor(value).detach().to("cpu", torch.float64).reshape(()) for value in values.values()]
    return dict(zip(values, reduce_sums(torch.stack(columns)).tolist(), strict=True))


def gather_objects(value: object) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank. For small plain values of our own processes."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: batch norm's running averages differ after each training batch."""
    broadcast_tensors(model.buffers())


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0, in place."""
    if get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def seed_everything(seed: int, rank: int | None = None) -> None:
    """Seed Python's, NumPy's and torch's generators (CUDA included) with ``seed + rank``, as DeiT does."""
    value = seed + (get_rank() if rank is None else rank)
    if not 0 <= value < 2**32:
        raise UsageError(f"--seed plus the rank must be between 0 and {2**32 - 1}, got {value}")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
