"""Run a function in processes forked from a clean server, which has imported torch and never used it.

Forking from the test process itself would be shorter, but autograd refuses to work in the child of a process that has
used it, and which tests ran before in a process is for the test runner to say.
"""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch

PRELOADED = [
    "torch",
    "timm.utils.model_ema",
    "common.run.cli",
    "common.data.loaders",
    "common.run.engine",
    "common.tests.jobs",
]
LAUNCH_VARIABLES = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_LOCALID", "SLURM_NODELIST", "SLURM_NPROCS", "SLURM_NTASKS"),
    *("SLURM_PROCID", "SLURM_STEPID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),
]


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: its result, its exit status (negative: a signal), and what it printed."""

    result: Any
    status: int
    output: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(pickled: bytes, environment: Mapping[str, str], cwd: str, folder: str, index: int) -> None:
    out = os.open(f"{folder}/out{index}", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import sys

    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    try:
        result = cloudpickle.loads(pickled)()
        torch.save(result, f"{folder}/result{index}")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        print(error)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_forked(
    function: Callable[[], Any],
    environments: list[dict[str, str]] | None = None,
    *,
    timeout_s: float = 60,
    kill_when: Callable[[], bool] = lambda: False,
) -> list[Ended]:
    """``function()`` in one process per environment, at the same time; one plain process by default.

    Processes get SIGKILL after ``timeout_s`` seconds, or as soon as ``kill_when()`` says so.
    """
    environments = [{}] if environments is None else environments
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    pickled = cloudpickle.dumps(function)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(pickled, inherited | environment, os.getcwd(), folder, index))
            for index, environment in enumerate(environments)
        ]
        for process in processes:
            process.start()
        ended = []
        for index, process in enumerate(processes):
            deadline = time.monotonic() + timeout_s
            while process.exitcode is None:  # join() would also wait for the loading processes of a killed one
                if time.monotonic() > deadline or kill_when():
                    process.kill()
                time.sleep(0.005)
            file, out = Path(folder, f"result{index}"), Path(folder, f"out{index}")
            result = torch.load(file, weights_only=False) if file.exists() else None
            ended.append(Ended(result, process.exitcode, out.read_text() if out.exists() else ""))
    return ended


def torchrun_variables(size: int) -> list[dict[str, str]]:
    """Environments as torchrun would give them to ``size`` processes of this machine."""
    port = str(free_port())
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": port}
        for rank in range(size)
    ]  # fmt: skip
