"""Process groups: one process, torchrun, ``torch.distributed.launch`` or Slurm, on CUDA (NCCL) or the CPU (Gloo).

An entry point is a function without arguments handed to ``common.run.program.run``; inside it calls :func:`launch`
once. One process and many take the same path: every function here does the right thing when there is no process group.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from common.run.errors import LaunchError as LaunchError
from common.run.program import get_logger as get_logger
from common.run.program import get_rank as get_rank
from common.run.program import is_main as is_main
from common.run.program import run as run
from common.run.wrapping import unwrap as unwrap

FAILURE_KEY = "leanvit/failures"
REASON_KEY = "leanvit/failed_rank"
POLL_SECONDS = 0.3
DEFAULT_PORT = 29500


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


@dataclass(frozen=True)
class _Place:
    """What the environment says before a device is chosen. ``wait_s`` is set where the others may not exist."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "none"
    wait_s: float | None = None


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"environment variable {name} must be an integer, got {text!r}") from None


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list, without calling scontrol: ``gpu[07-09,12],login`` gives ``gpu07``."""
    depth, end = 0, len(nodelist)
    for position, letter in enumerate(nodelist):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = position
            break
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist[:end]).strip()
    if not host or depth or "[" in host or "]" in host:
        raise LaunchError(
            f"cannot read a host name from the Slurm node list {nodelist!r}; "
            "set MASTER_ADDR to the name of the first node"
        )
    return host


def _place(environment: Mapping[str, str], local_rank: int | None) -> _Place:
    """Read torchrun's, torch.distributed.launch's or Slurm's variables; ``local_rank`` is the launcher's flag."""
    if local_rank is not None and local_rank < 0:
        local_rank = None  # -1 is the customary "no launcher"
    if "RANK" in environment or _declared_size(environment) > 1:
        for name in ("RANK", "WORLD_SIZE"):
            if name not in environment:
                raise LaunchError(
                    f"environment variable {name} is missing although its partner is set; start through torchrun, "
                    "or unset RANK and WORLD_SIZE to run as one process"
                )
        rank, size = _integer(environment, "RANK"), _integer(environment, "WORLD_SIZE")
        if "LOCAL_RANK" in environment:
            local_rank = _integer(environment, "LOCAL_RANK")
        if local_rank is None:
            if size > 1:
                raise LaunchError(
                    "neither LOCAL_RANK nor --local-rank says which device of the machine is this process's; "
                    "start through torchrun, or export LOCAL_RANK"
                )
            local_rank = 0
        place = _Place(rank, size, local_rank, "torchrun")
    elif "SLURM_PROCID" in environment:
        place = _slurm_place(environment)
    else:
        place = _Place()
    if not 0 <= place.rank < place.size:
        raise LaunchError(f"rank {place.rank} is not one of 0 to {place.size - 1} ({place.launcher} environment)")
    return place


def _declared_size(environment: Mapping[str, str]) -> int:
    return _integer(environment, "WORLD_SIZE") if "WORLD_SIZE" in environment else 1


def _slurm_place(environment: Mapping[str, str]) -> _Place:
    """A task of an ``srun`` step. The shell of ``sbatch`` or ``salloc`` is one process, whatever the job reserved.

    Such a shell has no step variables, yet SLURM_NTASKS counts the reserved tasks. Where nothing tells the two apart,
    rank 0 waits a little for the others and then goes on alone, so that it never hangs.
    """
    in_step = any(name in environment for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_STEPID"))
    size = 1
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"):
        if name in environment:
            size = _integer(environment, name)
            break
    rank = _integer(environment, "SLURM_PROCID")
    local_rank = _integer(environment, "SLURM_LOCALID") if "SLURM_LOCALID" in environment else 0
    maybe_shell = not in_step and rank == 0 and size > 1 and "SLURM_JOB_ID" in environment
    return _Place(rank, size, local_rank, "slurm", wait_s=20.0 if maybe_shell else None)


def _slurm_address(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of a Slurm job where the user set none; the port follows from the job's number."""
    address = {}
    if "MASTER_ADDR" not in environment:
        for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
            if name in environment:
                address["MASTER_ADDR"] = first_host(environment[name])
                break
        else:
            raise LaunchError("MASTER_ADDR is not set and Slurm gives no SLURM_NODELIST; export MASTER_ADDR")
    if "MASTER_PORT" not in environment:
        job = environment.get("SLURM_JOB_ID", "")
        address["MASTER_PORT"] = str(20000 + int(job) % 20000 if job.isdigit() else DEFAULT_PORT)
    return address


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


def launch(
    device: str = "auto",
    *,
    local_rank: int | None = None,
    start_timeout_s: float = 300.0,
    collective_timeout_s: float = 3600.0,
) -> World:
    """Join the job that the environment describes, or be a job of one, and select this process's device.

    Args:
        device: value of ``--device``; see :func:`choose_device`.
        local_rank: value of ``--local-rank`` / ``--local_rank``, which ``torch.distributed.launch`` passes on the
            command line when ``--use_env`` is not given; None or -1 where absent. LOCAL_RANK wins over it.
        start_timeout_s: how long to wait for the other processes, in seconds.
        collective_timeout_s: how long one rank may keep the others waiting later, in seconds.

    Raises:
        LaunchError: with what to change.
    """
    place = _place(os.environ, local_rank)
    chosen = choose_device(
        device,
        local_rank=place.local_rank,
        size=place.size,
        one_visible_gpu_is_mine=place.launcher == "slurm",
    )
    backend = None
    if place.size > 1:
        backend = "nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"
        joined = _join(place, backend, chosen, start_timeout_s, collective_timeout_s)
        if not joined:
            place, backend = _Place(local_rank=place.local_rank, launcher="slurm"), None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return World(place.rank, place.size, place.local_rank, chosen, backend)


def _join(place: _Place, backend: str, device: torch.device, start_timeout_s: float, timeout_s: float) -> bool:
    """Start the process group; False where a lone Slurm shell waited for tasks that nobody started."""
    if dist.is_initialized():
        raise LaunchError("launch() was called twice in one process; call shutdown() between")
    if place.launcher == "slurm":
        os.environ.update(_slurm_address(os.environ))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise LaunchError(f"environment variable {name} is missing; start through torchrun, or export it")
    host, port = os.environ["MASTER_ADDR"], _integer(os.environ, "MASTER_PORT")
    wait_s = start_timeout_s if place.wait_s is None else place.wait_s
    if place.wait_s is not None:
        print(
            f"Slurm reserved {place.size} tasks, but this shell is not an srun step: waiting {wait_s:.0f} s for the "
            "others, then running as one process",
            file=sys.stderr,
            flush=True,
        )
    # torchrun's agent serves the store itself; under the other launchers rank 0 does.
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            port,
            place.size,
            is_master=place.rank == 0 and not agent_serves,
            timeout=timedelta(seconds=wait_s),
            wait_for_workers=False,
        )
        ours = PrefixStore(f"leanvit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        if ours.add("arrived", 1) == place.size:
            ours.set("everyone", "here")
        ours.wait(["everyone"], timedelta(seconds=wait_s))
    except (RuntimeError, ValueError, OSError) as error:
        if place.wait_s is not None:
            return False
        raise LaunchError(
            f"rank {place.rank} of {place.size} waited {wait_s:.0f} s and could not meet the other processes at "
            f"{host}:{port} (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}. Are all {place.size} processes "
            "started, and is the port free and open?"
        ) from error
    dist.init_process_group(
        backend,
        store=PrefixStore("group", ours),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if backend == "nccl" else None,
    )
    _Watch.start(ours, place.rank, lingers=not agent_serves and place.rank == 0)
    return True


class _Watch:
    """A thread that ends this process when another rank reports a failure, instead of waiting for it forever."""

    current: _Watch | None = None

    def __init__(self, store: Store, rank: int, *, lingers: bool) -> None:
        self.store, self.rank, self.lingers = store, rank, lingers
        self.stopping = threading.Event()
        self.failed_here = False
        self.thread = threading.Thread(target=self._poll, name="leanvit-watch", daemon=True)

    @classmethod
    def start(cls, store: Store, rank: int, *, lingers: bool) -> None:
        cls.current = cls(store, rank, lingers=lingers)
        cls.current.thread.start()

    @classmethod
    def stop(cls) -> None:
        if cls.current is not None:
            cls.current.stopping.set()
            if cls.current.thread is not threading.current_thread():
                cls.current.thread.join(timeout=5)
            cls.current = None

    def _poll(self) -> None:
        while not self.stopping.wait(POLL_SECONDS):
            try:
                if not self.store.check([FAILURE_KEY]):
                    continue
                failed = self.store.get(REASON_KEY).decode()
            except RuntimeError:
                return  # the store's host is gone; the launcher or the next collective reports that
            if not self.failed_here:
                _say(f"[rank {self.rank}] stopped because rank {failed} failed; its error is above or below\n")
                time.sleep(2 * POLL_SECONDS)  # launchers blame the rank that ends first
                os._exit(1)

    def report(self) -> str | None:
        """Tell the others that this rank failed; returns the rank that failed before it, if one did."""
        self.failed_here = True
        try:
            if self.store.add(FAILURE_KEY, 1) == 1:
                self.store.set(REASON_KEY, str(self.rank))
                return None
            return self.store.get(REASON_KEY).decode()
        except RuntimeError:
            return None


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()


def leave(error: BaseException, expected: tuple[type[Exception], ...]) -> NoReturn:
    """End a rank of a larger job for good: no clean-up that waits for the other ranks."""
    watch = _Watch.current
    assert watch is not None  # launch() started it
    first = watch.report()
    status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        status = 130
        _say(f"[rank {watch.rank}] interrupted\n")
    elif first is not None:
        _say(f"[rank {watch.rank}] stopped because rank {first} failed ({type(error).__name__} here)\n")
        time.sleep(2 * POLL_SECONDS)  # launchers blame the rank that ends first
    elif isinstance(error, (*expected, SystemExit)):
        _say(f"[rank {watch.rank}] error: {error}\n")
    else:
        _say(f"[rank {watch.rank}] error:\n" + "".join(traceback.format_exception(error)))
    if first is None and "TORCHELASTIC_ERROR_FILE" in os.environ and isinstance(error, Exception):
        get_error_handler().record_exception(error)  # torchrun's summary shows it then
    if watch.lingers and first is None:
        time.sleep(4 * POLL_SECONDS)  # this process serves the store through which the others learn of the failure
    os._exit(status)


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
    """Leave the job in good order: stop the watch, wait for the others, end the process group."""
    if dist.is_available() and dist.is_initialized():
        _Watch.stop()
        barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
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
        total = values.detach().to(device=_collective_device(), dtype=torch.float64)
        total = total.clone() if total.data_ptr() == values.data_ptr() else total
        dist.all_reduce(total)
        return total.to(device=values.device, dtype=values.dtype)
    if not values:
        return {}
    columns = [torch.as_tensor(value).detach().to("cpu", torch.float64).reshape(()) for value in values.values()]
    return dict(zip(values, reduce_sums(torch.stack(columns)).tolist(), strict=True))


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_objects(value: object) -> list:
    """``value`` of every rank, in rank order, on every rank. For small plain values of our own processes."""
    if get_world_size() == 1:
        return [value]
    gathered: list = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: batch norm's running averages differ after each training batch."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def seed_everything(seed: int, rank: int | None = None) -> None:
    """Seed Python's, NumPy's and torch's generators (CUDA included) with ``seed + rank``, as DeiT does."""
    value = seed + (get_rank() if rank is None else rank)
    if not 0 <= value < 2**32:
        raise ValueError(f"--seed plus the rank must be between 0 and {2**32 - 1}, got {value}")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
