"""A checksum inside the file: SHA-256 of all its bytes, by which a reader finds any damage.

A file of torch.save is a zip archive and has it in the archive's comment, at its end; a safetensors file in its header.
Other programs pass over both. The digits count as zeros in the sum. The mark before them and what stands around it (the
length of the comment, the name of the entry) tell of each other, so that a damaged mark does not hide the sum.
"""

import hashlib
import mmap
import os
from pathlib import Path
from typing import IO

from common.run.errors import CheckpointError

ENTRY = "leanvit_sha256"
"""Name in the header of a safetensors file."""
MARK = b"leanvit-sha256:"
ZEROS = b"0" * 64
END, END_LENGTH = b"PK\5\6", 22
"""How the end of a zip archive begins, and its length up to the comment."""


def unsealed_entry() -> dict[str, str]:
    """The entry for the header of a safetensors file that :func:`seal` will fill in."""
    return {ENTRY: (MARK + ZEROS).decode()}


def seal(file: IO[bytes]) -> None:
    """Put the sum into a whole file, open for reading and writing: torch's, or safetensors with ``unsealed_entry``."""
    file.seek(0)
    if file.read(4) == b"PK\3\4":
        file.seek(-2, os.SEEK_END)  # the length of the comment
        file.write(len(MARK + ZEROS).to_bytes(2, "little") + MARK + ZEROS)
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = _find(content)
        assert place is not None
        digits = _sum(content, place)
    file.seek(place)
    file.write(digits)


def check_seal(path: Path) -> None:
    """Refuse a file whose bytes are not those that were written; one without a sum passes.

    Raises:
        CheckpointError: it is damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = _find(content)
            if place is not None and content[place : place + len(ZEROS)] != _sum(content, place):
                raise CheckpointError("its SHA-256 is not the one that it was written with: it is damaged")


def _find(content: mmap.mmap) -> int | None:
    """Where the digits are, None in a file without."""
    size, length = len(content), len(MARK + ZEROS)
    header = 8 + int.from_bytes(content[:8], "little") if content[8:9] == b"{" else 0
    mark = content.find(MARK, 0, min(header, size))
    if mark < 0 and content[max(0, size - length) :].startswith(MARK):
        mark = size - length
    if mark >= 0:
        return mark + len(MARK)
    end = content.rfind(END, max(0, size - END_LENGTH - length))
    commented = end >= 0 and int.from_bytes(content[end + END_LENGTH - 2 : end + END_LENGTH], "little") == length
    if commented or content.find(ENTRY.encode(), 0, min(header, size)) >= 0:
        raise CheckpointError("its checksum cannot be read: it is damaged")
    return None


def _sum(content: mmap.mmap, place: int) -> bytes:
    with memoryview(content) as view, view[:place] as before, view[place + len(ZEROS) :] as after:
        found = hashlib.sha256(before)
        found.update(ZEROS)
        found.update(after)
    return found.hexdigest().encode()
