"""The published script's own flags for several processes, mapped on the launchers of ``common.run.launch``."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

from common.run.program import get_logger

logger = get_logger(__name__)

LAUNCHER_VARIABLES = ("RANK", "SLURM_PROCID")


def launched_already() -> bool:
    """Whether torchrun, torch.distributed.launch or Slurm started this process."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def start_one_per_gpu(args: argparse.Namespace, script: str, argv: Sequence[str]) -> None:
    """Run ``script`` once per GPU of this machine (once on a machine without), and wait.

    Args:
        args: flags of the script: ``world_size`` machines, of which this is ``rank``, meet at ``dist_url``.
        argv: the script's arguments; what concerns processes is taken out.

    Raises:
        SystemExit: with the job's status, if it fails.
    """
    import torch

    machines = max(args.world_size, 1)
    command = [sys.executable, "-m", "common.run.torchrun", f"--nproc-per-node={max(torch.cuda.device_count(), 1)}"]
    if machines == 1:
        command += ["--standalone"]
    else:
        host, port = meeting_point(args.dist_url)
        command += [f"--nnodes={machines}", f"--node-rank={max(args.rank, 0)}"]
        command += [f"--master-addr={host}", f"--master-port={port}"]
    arguments = [word for word in argv if word != "--multiprocessing-distributed"]
    paths = [str(Path(script).resolve().parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    status = subprocess.run([*command, script, *arguments], env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def set_environment(args: argparse.Namespace) -> None:
    """Describe to ``common.run.launch`` a job whose every process was started by hand with its --rank.

    Raises:
        SystemExit: if flags that belong together are incomplete.
    """
    if args.world_size > 1 and not launched_already():
        if not 0 <= args.rank < args.world_size:
            raise SystemExit(
                f"error: --world-size {args.world_size} needs a --rank from 0 to {args.world_size - 1}, got {args.rank}"
            )
        host, port = meeting_point(args.dist_url)
        if host.startswith("224."):
            raise SystemExit(
                f"error: --dist-url {args.dist_url} (the published default) is a multicast address, where nothing can "
                "listen; give tcp://HOST:PORT of the first process"
            )
        local_rank = args.gpu if args.gpu is not None else 0
        os.environ.update(
            RANK=str(args.rank),
            WORLD_SIZE=str(args.world_size),
            LOCAL_RANK=str(local_rank),
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        import torch

        if torch.cuda.is_available() and args.gpu is None and torch.cuda.device_count() > 1:
            logger.warning("--world-size without --gpu: every process of a machine takes its GPU 0")


def device_name(args: argparse.Namespace) -> str:
    """Value for ``common.run.launch.launch``: ``--gpu N`` of a lone process means cuda:N."""
    if args.gpu is None or launched_already():
        return args.device
    return f"cuda:{args.gpu}"


def meeting_point(url: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``, or of MASTER_ADDR and MASTER_PORT for ``env://``.

    Raises:
        SystemExit: if it is neither.
    """
    if url.startswith("env://"):
        url = f"tcp://{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    try:
        parsed = urlparse(url)
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise SystemExit(
            f"error: --dist-url must be tcp://HOST:PORT, or env:// with MASTER_ADDR and MASTER_PORT set; got {url!r}"
        )
    return host, port


def images_per_process(batch_size: int, world_size: int) -> int:
    """Share of a machine's batch that one of its processes takes, at least one image."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    return max(batch_size // max(on_this_machine, 1), 1)
