import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented, but not in __all__

from common.run import launch as launching
from common.run import program, wrapping
from common.run.errors import LaunchError
from common.run.files import write_atomic
from common.run.launch import choose_device, launch, reduce_sums, shutdown
from common.run.program import run
from common.tests.forks import LAUNCH_VARIABLES, free_port, run_forked, torchrun_variables


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def join() -> dict:
    """What a job of several ranks sees, from inside."""

    def main() -> dict:
        world = launch("cpu", start_timeout_s=30)
        tensor = torch.tensor([1, 2**40 + world.rank])
        with launching.main_process_first():
            order = time.monotonic()
        return {
            "world": (world.rank, world.size, world.local_rank, world.backend),
            "sums": reduce_sums({"a": 1, "b": torch.tensor(0.5) * world.rank}),
            "tensor": reduce_sums(tensor).tolist(),
            "untouched": tensor.tolist(),
            "objects": launching.gather_objects(world.rank * 10),
            "order": order,
        }

    result = run(main)
    assert not dist.is_initialized()
    return result


def check_two_ranks(results: Sequence[dict]) -> None:
    for rank, result in enumerate(results):
        assert result["world"][:2] == (rank, 2)
        assert result["world"][3] == "gloo"
        assert result["sums"] == {"a": 2.0, "b": 0.5}
        assert result["tensor"] == [2, 2**41 + 1]
        assert result["untouched"] == [1, 2**40 + rank]
        assert result["objects"] == [0, 10]
    assert results[0]["order"] < results[1]["order"]


def test_single_process_needs_no_group(bare: pytest.MonkeyPatch) -> None:
    world = launch("cpu")
    assert (world.rank, world.size, world.backend, world.is_main) == (0, 1, None, True)
    assert not dist.is_initialized()
    assert reduce_sums({"a": 3}) == {"a": 3.0}
    assert launching.gather_objects("x") == ["x"]
    launching.barrier()
    shutdown()


def test_torchrun_variables_make_a_group() -> None:
    ended = run_forked(join, torchrun_variables(2))
    assert [process.status for process in ended] == [0, 0], ended
    check_two_ranks([process.result for process in ended])


def test_slurm_step_makes_a_group() -> None:
    port = str(free_port())
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "MASTER_ADDR": "localhost"}
    ended = run_forked(
        join, [{**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port} for rank in "01"]
    )
    assert [process.status for process in ended] == [0, 0], ended
    check_two_ranks([process.result for process in ended])


def refused() -> tuple[float, Any]:
    """How long it takes to end, and the status."""
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        join()
    return time.monotonic() - began, ended.value.code


def silent(port: int) -> Any:
    return socket.create_server(("127.0.0.1", port))


def closing(port: int) -> Any:
    """Something that hangs up on everybody."""
    server = silent(port)

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()

    threading.Thread(target=answer, daemon=True).start()
    return server


def foreign(port: int) -> Any:
    """The store of some other program."""
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def another(port: int) -> Any:
    """The store of another job of two ranks, which are both there."""
    store = foreign(port)
    store.set(launching.SIZE, "2")
    store.add(launching.RANK.format(1), 1)
    return store


def larger(port: int) -> Any:
    store = foreign(port)
    store.set(launching.SIZE, "3")
    return store


@pytest.mark.parametrize("owner", [silent, closing, foreign, another, larger])
def test_a_port_in_use_ends_every_rank_soon(owner: Callable[[int], Any]) -> None:
    variables = torchrun_variables(2)
    port = int(variables[0]["MASTER_PORT"])
    taken = owner(port)
    for rank, process in enumerate(run_forked(refused, variables)):
        seconds, status = process.result
        assert seconds < (9 if rank else 1)
        assert status == 2
        (line,) = process.output.splitlines()
        assert re.match(rf"error: port {port} of 127.0.0.1 .* is in use by something else.*--master-port", line)
    if isinstance(taken, socket.socket):
        taken.close()


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_jobs_that_meet_at_a_port_do_not_mix(launcher: str) -> None:
    """Rank 1 of a job comes to rank 0 of another before the other's own rank 1."""
    variables = torchrun_variables(2)
    if launcher == "slurm":
        address = {name: variables[0][name] for name in ("MASTER_ADDR", "MASTER_PORT")}
        step = {**address, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"}
        variables = [{**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    name = "SLURM_JOB_ID" if launcher == "slurm" else "TORCHELASTIC_RUN_ID"
    first, stranger, second = ({**variables[rank], name: job} for rank, job in ((0, "7"), (1, "8"), (1, "7")))

    def wait_or_join() -> Any:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
        if os.environ[name] == "7" and rank == "1":
            time.sleep(1)  # after the stranger
        return join()

    ended = run_forked(wait_or_join, [first, stranger, second])
    assert [process.status for process in ended] == [0, 2, 0], ended
    check_two_ranks([ended[0].result, ended[2].result])
    assert "is in use by something else, perhaps another job" in ended[1].output


def test_who_is_missing_is_said_with_the_time_that_was_waited(bare: pytest.MonkeyPatch) -> None:
    for name, value in torchrun_variables(3)[0].items():
        bare.setenv(name, value)
    with pytest.raises(LaunchError, match=r"rank 0 of 3 waited 1 s and could not meet .*rank 1"):
        launch("cpu", start_timeout_s=1)
    bare.setenv("RANK", "2")
    bare.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(LaunchError, match=r"rank 2 of 3 waited 1 s and could not meet .*refused"):
        launch("cpu", start_timeout_s=1)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # salloc's shell
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "localhost"},  # sbatch's
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_one_task_is_one_process(bare: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        bare.setenv(name, value)
    assert launch("cpu").size == 1
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK must be an integer, got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 2 is not one of 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "--local-rank"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is missing"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "MASTER_ADDR is missing.*srun .*torchrun"),
    ],
)
def test_broken_environments_say_what_is_wrong(
    bare: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        bare.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        launch("cpu")


def test_flag_stands_in_for_a_missing_local_rank() -> None:
    """torch.distributed.launch without --use_env, of old, gives the flag and no LOCAL_RANK."""
    environment = {"RANK": "3", "WORLD_SIZE": "4"}
    assert launching._place(environment, 1).local_rank == 1
    assert launching._place({**environment, "LOCAL_RANK": "2"}, 1).local_rank == 2


def test_missing_partner_ends_with_an_error() -> None:
    variables = torchrun_variables(2)[:1]
    started = time.monotonic()
    (ended,) = run_forked(lambda: run(lambda: launch("cpu", start_timeout_s=2)), variables)
    assert ended.status == 2
    assert "Are all 2 processes started" in ended.output
    assert time.monotonic() - started < 20


def test_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="auto, cpu, cuda or cuda:N, got 'tpu'"):
        choose_device("tpu")
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(LaunchError, match="use --device cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", local_rank=1, size=2) == torch.device("cuda:1")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(LaunchError, match="shows 2"):
        choose_device("cuda:5")
    with pytest.raises(LaunchError, match="at most one process per GPU"):
        choose_device("cuda", local_rank=2, size=3)
    with pytest.raises(LaunchError, match="use --device cuda"):
        choose_device("cuda:1", size=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda", local_rank=3, size=4, one_visible_gpu_is_mine=True) == torch.device("cuda:0")


def test_expected_errors_of_one_process_print_one_line(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error in (LaunchError("do this"), SystemExit("error: do this")):
        with pytest.raises(SystemExit, match="error: do this") as ended:
            run(partial(fail, error))
        assert ended.value.code == 2
        assert capsys.readouterr().err == "error: do this\n"
    with pytest.raises(SystemExit) as ended:
        run(partial(fail, SystemExit(3)))
    assert ended.value.code == 3
    with pytest.raises(SystemExit) as ended:
        run(partial(fail, KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"

    with bare.context() as patch:
        patch.setattr(sys, "stderr", None)  # as of a program that is started with 2>&-
        assert run(lambda: sys.stderr.isatty()) is False

    def broken() -> None:
        raise ArithmeticError("a bug")

    with pytest.raises(ArithmeticError):
        run(broken)
    assert run(lambda: 5) == 5


LAUNCHERS = {
    "ours": ["common.run.torchrun"],
    "torchrun": ["torch.distributed.run"],
    "launch": ["torch.distributed.launch"],
    "launch --use_env": ["torch.distributed.launch", "--use_env"],
}


def start(launcher: str, *words: str, port: int | None = None) -> subprocess.CompletedProcess[str]:
    """The small job of two ranks."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    script = Path(__file__).with_name("place_job.py")
    return subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "--nproc_per_node=2",
         f"--master_port={port or free_port()}", str(script), *words],
        env={**environment, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_names_that_the_output_cannot_spell_are_written_all_the_same(tmp_path: Path) -> None:
    write_atomic(tmp_path / "page.html", f"{os.fsdecode(bytes([0xE9]))}.png, é.png")
    assert (tmp_path / "page.html").read_text("utf-8") == "\\udce9.png, é.png"
    program = "from common.run.program import run; run(lambda: print('\\u65e5', chr(0xdce9)))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert job.stdout == "\\u65e5 \\udce9\n"


def test_a_reader_that_is_gone_ends_a_program_in_silence() -> None:
    program = """
from common.run.program import run

def main():
    while True:
        print("a line", flush=True)

run(main)
"""
    job = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stderr is not None
    assert job.stdout.readline() == "a line\n"
    job.stdout.close()
    assert job.wait(30) == 128 + signal.SIGPIPE
    assert job.stderr.read() == ""
    job.stderr.close()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_real_launchers(launcher: str) -> None:
    done = start(launcher)
    assert done.returncode == 0, done.stderr
    rows = sorted((json.loads(line) for line in done.stdout.splitlines() if line), key=lambda row: row["rank"])
    assert [(row["rank"], row["local_rank"], row["size"]) for row in rows] == [(0, 0, 2), (1, 1, 2)]
    assert all(row["ranks"] == 1 and row["count"] == 2 for row in rows)
    assert [row["flag"] for row in rows] == ([0, 1] if launcher == "launch" else [-1, -1])


@pytest.mark.parametrize(("rank", "how"), [(0, "busy"), (1, "bug")])
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_failure_on_one_rank_ends_the_job_with_its_error(launcher: str, rank: int, how: str) -> None:
    """The other rank is busy, or waits in a collective."""
    started = time.monotonic()
    done = start(launcher, f"--fail-rank={rank}", f"--how={how}")
    assert time.monotonic() - started < 50
    assert done.returncode == 1
    assert f"[rank {rank}] error:\nTraceback" in done.stderr
    assert f"ArithmeticError: rank {rank} broke" in done.stderr
    assert f"[rank {1 - rank}]" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "lines"),
    [
        (["--fail-rank=9", "--how=mistake"], 2, ["error: give --less"]),
        (["--fail-rank=1", "--how=mistake"], 2, ["[rank 1] error: give --less"]),
        (["--fail-rank=0", "--how=exit"], 3, []),
        (
            ["--no-such-flag"],
            2,
            ["place_job.py: error: unrecognized arguments: --no-such-flag; --help shows all flags"],
        ),
    ],
)
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_a_users_mistake_is_one_line_under_torchrun(
    launcher: str, words: list[str], status: int, lines: list[str]
) -> None:
    """torchrun itself, which would say much more, dies of a signal; ours takes the status."""
    done = start(launcher, *words)
    assert done.returncode == (status if launcher == "ours" else -signal.SIGUSR1)
    shown = [line for line in done.stderr.splitlines() if not line.startswith((" ", "usage:"))]
    assert shown == lines, done.stderr
    assert done.stdout == ""


def test_torchrun_says_in_a_line_that_its_port_is_in_use() -> None:
    port = free_port()
    with silent(port):
        done = start("ours", port=port)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(rf"error: the port is in use, choose another by --master-port: .*{port}.*EADDRINUSE", line)


def test_seeds_differ_by_rank_and_cover_all_generators() -> None:
    def draw(seed: int, rank: int) -> tuple:
        launching.seed_everything(seed, rank)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(3, 1) == draw(3, 1) == draw(4, 0)
    assert all(a != b for a, b in zip(draw(3, 0), draw(3, 1), strict=True))
    with pytest.raises(ValueError, match="--seed"):
        launching.seed_everything(-5, 0)


def test_unwrap_removes_shells() -> None:
    model = nn.Linear(2, 2)
    assert wrapping.unwrap(nn.DataParallel(model)) is model
    assert wrapping.unwrap(model) is model


def test_logger_speaks_on_rank_zero_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logger = program.get_logger("some_package.module")
    assert len(logging.getLogger("some_package").handlers) == 1
    program.get_logger("some_package.other")
    assert len(logging.getLogger("some_package").handlers) == 1
    logger.info("hello %d", 1)
    monkeypatch.setattr(program, "get_rank", lambda: 1)
    logger.info("silence")
    captured = capsys.readouterr()
    assert captured.err == "hello 1\n"
    assert captured.out == ""
