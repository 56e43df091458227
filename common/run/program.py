"""What an entry point needs before anything heavy: a logger for rank 0, and ``run``. Imports no torch.

def main(argv=None):
    args = parse_args(argv)
    from paper.build import build_model  # what imports torch comes after the flags are understood
    ...

if __name__ == "__main__":
    run(main)
"""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.run.errors import EXPECTED

Result = TypeVar("Result")

AGENTS = ("torch.distributed.run", "torch.distributed.launch")
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal to get when the parent ends
PATIENCE_S = 2.0
DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
"""Reasons of the system for which no program is to blame."""
farewells: list[Callable[[], None]] = []
"""What a job does in good order at its end; a module that begins something (a process group) adds how it ends."""
LOST_PEER = r"(?i)connection (closed|reset) by peer|gloo.*(closed|timed out)|NCCL.*remote process"


def get_rank() -> int:
    """Rank of this process, 0 without a process group."""
    group = _process_group()
    return group.get_rank() if group else 0


def is_main() -> bool:
    return get_rank() == 0


def _process_group() -> Any:
    """``torch.distributed`` where a group exists, which somebody must have imported it for."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


def run(main: Callable[[], Result], *, expected: tuple[type[Exception], ...] = ()) -> Result:
    """Call ``main()``; a failure on one rank ends the whole job, printing that rank's error.

    A user's mistake (an error of ``common.run.errors``, a ``SystemExit`` with a text), or a disk that is full or closed
    to him, prints one line, on rank 0 of a job of several ranks, and ends with status 2, as argparse's do; Ctrl-C
    prints "interrupted" and ends with status 130. A bug shows its traceback and ends with status 1. Where nobody reads
    the output any more (``| head``), a process ends as other programs do, in silence and with status 141; what it has
    written to files stays.

    Args:
        main: the entry point; it calls ``common.run.launch.launch`` itself.
        expected: further errors whose message says all a user needs.

    Returns:
        What ``main`` returns, after the process group is gone.
    """
    _open_streams()
    agent = _find_agent()
    # names of files may hold what the output's encoding has not
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result = main()
    except BaseException as error:
        mistake = isinstance(error, (*EXPECTED, *expected, SystemExit))
        mistake = mistake or (isinstance(error, OSError) and error.errno in DISK)
        if isinstance(error, SystemExit) and not error.code:
            _shutdown()
        elif "TORCHELASTIC_RUN_ID" in os.environ or _process_group():
            _leave(error, agent, mistake=mistake)
        elif isinstance(error, KeyboardInterrupt):
            _shutdown()
            sys.stderr.write("interrupted\n")
            raise SystemExit(128 + signal.SIGINT) from error
        elif isinstance(error, BrokenPipeError) and _nobody_reads():
            _shutdown()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the interpreter still has to write at its end
            raise SystemExit(128 + signal.SIGPIPE) from error
        elif mistake and (text := _mistake_text(error)):
            sys.stderr.write(text)
            ending = SystemExit(text.strip())
            ending.code = 2
            raise ending from error
        raise
    _shutdown()
    return result


def _open_streams() -> None:
    """Where a standard stream is closed, what is written to it goes nowhere, and not into the next file opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r")  # takes the lowest free number
            try:
                os.fstat(number)
            except OSError:
                os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)


def _nobody_reads() -> bool:
    """Whether the standard output is a pipe whose reader is gone, such as ``| head``."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _shutdown() -> None:
    for farewell in farewells:
        farewell()


def _find_agent() -> int:
    """Process number of the torchrun that started this process, which ends with it; 0 where there is none.

    ``common.run.torchrun`` is none: it knows a user's mistake by its status.
    """
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")[:4]
    except OSError:
        return 0
    names = {Path(word).name for word in words}
    if "TORCHELASTIC_RUN_ID" not in os.environ or not names & {"torchrun", *AGENTS}:
        return 0
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return parent


def _mistake_text(error: BaseException) -> str:
    """The one line about a mistake; empty where argparse, for one, has spoken already."""
    if isinstance(error, SystemExit):
        return "" if isinstance(error.code, int) else f"{error.code}\n"
    return f"error: {error}\n"


def _leave(error: BaseException, agent: int, *, mistake: bool) -> NoReturn:
    """End a rank of a larger job for good: no clean-up that waits for the other ranks.

    torchrun answers every failure with some 35 lines about its processes. After a user's mistake, which all ranks make
    and rank 0 reports in its one line, it gets a signal that it does not handle instead, and says nothing.
    """
    rank = int(os.environ.get("RANK", get_rank()))
    status = 1
    if mistake:
        text = _mistake_text(error)
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 2
    elif isinstance(error, KeyboardInterrupt):
        status, text = 130, "interrupted\n"
    else:
        text = "error:\n" + "".join(traceback.format_exception(error))
    follows = isinstance(error, RuntimeError) and re.search(LOST_PEER, str(error)) is not None
    if follows or (mistake and rank):
        time.sleep(PATIENCE_S)  # the rank that knows the reason speaks first, and its end ends this process
    if follows:
        text = "stopped: another rank is gone\n"
    sys.stdout.flush()
    if text:
        sys.stderr.write(text if mistake and not rank else f"[rank {rank}] {text}")
    sys.stderr.flush()
    if agent and mistake and os.getppid() == agent:
        os.kill(agent, signal.SIGUSR1)
    os._exit(status)


class _RankZeroHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is now, and only on rank 0."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main():
            print(self.format(record), file=sys.stderr, flush=True)


def get_logger(name: str) -> logging.Logger:
    """The package's logger: rank 0 only, on stderr, so that results on stdout can be piped."""
    package = name.split(".")[0]
    root = logging.getLogger(package)
    if not any(isinstance(handler, _RankZeroHandler) for handler in root.handlers):
        root.addHandler(_RankZeroHandler())
        root.setLevel(logging.INFO)
        root.propagate = False
    return logging.getLogger(name)
