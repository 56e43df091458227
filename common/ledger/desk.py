"""What the desk experiments share: scripts run inside another program, and files known by their content."""

import contextlib
import hashlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Keep standard output free, which may be JSON, while scripts run; if wanted, standard error too."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO() if wanted else sys.stderr))
        if wanted:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def sha256_of(path: Path) -> str:
    """Digest of a file's content, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
