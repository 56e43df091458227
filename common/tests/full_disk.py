"""A disk that fills up, for tests of programs that write."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from common.run import files


def fill_disk(patch: pytest.MonkeyPatch, room: int = 0) -> None:
    """Let what ``common.run.files`` writes, as every program does, have ``room`` bytes; then the disk is full."""
    left = [room]

    class OnFullDisk(io.FileIO):
        def write(self, data: Any, /) -> int:
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = super().write(memoryview(data)[: left[0]])
            left[0] -= written
            return written

    def opened(path: Path, mode: str, buffering: int = -1) -> Any:
        file = OnFullDisk(path, mode.replace("b", ""))
        return file if buffering == 0 else io.BufferedRandom(file)

    patch.setattr(files, "open", opened, raising=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock of a run."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
