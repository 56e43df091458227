"""What an entry point needs before anything heavy: a logger for rank 0, and ``run``. Imports no torch.

def main(argv=None):
    args = parse_args(argv)
    from paper.build import build_model  # what imports torch comes after the flags are understood
    ...

if __name__ == "__main__":
    run(main)
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

from common.run.errors import EXPECTED

Result = TypeVar("Result")


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

    Args:
        main: the entry point; it calls ``common.run.distributed.launch`` itself.
        expected: errors besides those of ``common.run.errors`` whose message says all a user needs; they print one line
            instead of a traceback and exit with status 1.

    Returns:
        What ``main`` returns, after the process group is gone.
    """
    expected = (*EXPECTED, *expected)
    try:
        result = main()
    except BaseException as error:
        if _process_group():
            from common.run import distributed  # loaded already: it made the group

            if isinstance(error, SystemExit) and not error.code:
                distributed.shutdown()
                raise
            distributed.leave(error, expected)
        if isinstance(error, expected):
            raise SystemExit(f"error: {error}") from error
        raise
    if _process_group():
        from common.run import distributed

        distributed.shutdown()
    return result


class _RankZeroHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is now, and only on rank 0."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(message)s"))

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        del value

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        return is_main() and super().filter(record)


def get_logger(name: str) -> logging.Logger:
    """The package's logger: rank 0 only, on stderr, so that results on stdout can be piped."""
    package = name.split(".")[0]
    root = logging.getLogger(package)
    if not any(isinstance(handler, _RankZeroHandler) for handler in root.handlers):
        root.addHandler(_RankZeroHandler())
        root.setLevel(logging.INFO)
        root.propagate = False
    return logging.getLogger(name)
