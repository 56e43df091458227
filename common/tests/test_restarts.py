"""torchrun's own agent: ranks that are killed are started again and end with the bits of an undisturbed run."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.run.files import ROOT
from common.tests.forks import LAUNCH_VARIABLES, free_port
from common.tests.restart_job import AGENT

RENDEZVOUS = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"


def start(agent: list[str], *words: object, **environment: str) -> subprocess.Popen[str]:
    """One agent of the small training."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1", "--max-restarts=3", *agent, "-m",
         "common.tests.restart_job", *map(str, words)],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment}, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_killed_rank_is_started_again_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    digests = []
    rank, step = random.randrange(2), random.randrange(1, 15)
    for name, kill in (("whole", ()), ("killed", ("--kill", rank, step))):
        agent = start(
            ["--nproc_per_node=2", f"--master_port={free_port()}"], tmp_path / name, "--save-every-steps=2", *kill
        )
        out, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, (kill, out)
        assert ("attempt 1: rank 0 of 2" in out) == bool(kill), out
        digests += re.findall("digest .*", out)
    assert len(digests) == 2
    assert digests[0] == digests[1], (rank, step)


@pytest.mark.parametrize("save", [["--save-every-steps=2"], []], ids=["within an epoch", "after an epoch"])
def test_fewer_processes_go_on_after_an_epoch_only(tmp_path: Path, save: list[str]) -> None:
    """The agent of one of two machines is killed in the second epoch; the other goes on alone, or says why not."""
    elastic = [
        "--nnodes=1:2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=job",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
    ]  # fmt: skip
    words = [tmp_path, "--kill", AGENT, 8, *save]
    first = start([*elastic, f"--rdzv-conf=is_host=1,{RENDEZVOUS}"], *words)
    second = start([*elastic, f"--rdzv-conf=is_host=0,{RENDEZVOUS}"], *words, VICTIM="1")
    out, _ = first.communicate(timeout=120)
    second.communicate(timeout=60)
    assert second.returncode == -signal.SIGKILL
    assert re.search("attempt 0: rank . of 2", out), out
    assert "attempt 1: rank 0 of 1" in out, out
    if save:
        assert first.returncode != 0
        assert re.search("error: .*from within an epoch of 2 processes, whose order of images 1 cannot", out), out
        assert "digest" not in out
    else:
        assert first.returncode == 0, out
        assert "was written by 2 processes and is resumed by 1: the continuation is not bit for bit" in out
        assert "digest" in out
