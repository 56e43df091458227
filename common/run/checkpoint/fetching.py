"""Published files: downloaded once into torch.hub's cache, their SHA-256 checked."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import torch

from common.run.checkpoint.reading import load_safely
from common.run.errors import CheckpointError, OutputError, UsageError
from common.run.files import write_atomic
from common.run.launch import main_process_first
from common.run.program import get_logger, is_main

logger = get_logger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 3
BROKEN = (OSError, http.client.HTTPException, ValueError)
"""What urllib raises: ValueError where an address is none."""

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z0-9.]+$")


def hub_folder() -> Path:
    """Where torch.hub keeps downloaded weights: ``$TORCH_HOME/hub/checkpoints``, ``~/.cache/torch`` by default."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(url: str, *, progress: bool = True, timeout_s: float = 30) -> Path:
    """Path of the published file at ``url``, from torch.hub's cache or downloaded into it.

    A name like ``net-0676ba61.pth`` ends with the first hexadecimal digits of the file's SHA-256. Where they are
    unknown, the SHA-256 is recorded in ``NAME.sha256`` beside the file when it is first used. Downloads and cached
    files are checked by either.

    Args:
        url: http(s) or file address.
        progress: show a bar.
        timeout_s: how long to wait for the server, in seconds.

    Raises:
        CheckpointError: no connection, or one that broke three times (saying which file, from where, and where to put
            it), an address that is none, or a wrong hash.
    """
    name = os.path.basename(urllib.request.url2pathname(url.split("?")[0].split("#")[0]))
    target = hub_folder() / name
    found = HASH_IN_NAME.search(name)
    record = target.with_name(name + ".sha256")
    prefix = found.group(1) if found else _recorded(record)
    if target.is_file():
        digest = _sha256(target)
        if prefix and not digest.startswith(prefix):
            raise CheckpointError(
                f"{target}: its SHA-256 does not begin with {prefix}; it is damaged or another file. Delete it to "
                f"download it again from {url}" + f"; if it was replaced on purpose, delete {record}" * (not found)
            )
        if not prefix:
            _record(record, digest)
        return target
    if not name:
        raise CheckpointError(f"{url}: expected the address of a file, which ends with its name")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{name}.{secrets.token_hex(8)}.part")

    def download() -> None:
        with _patience(timeout_s):
            size = _announced_size(url)
            torch.hub.download_url_to_file(url, str(part), None, progress and is_main())
        if size is not None and part.stat().st_size != size:
            raise ConnectionResetError(f"received {part.stat().st_size} of {size} bytes")

    try:
        persist(download, name)
        digest = _sha256(part)
        if prefix and not digest.startswith(prefix):
            raise CheckpointError(
                f"{url}: the download's SHA-256 is {digest}, expected {prefix}...; it was interrupted or the file was "
                "replaced; try again" + f", or delete {record}, which remembers the file of before" * (not found)
            )
        os.replace(part, target)
    except BROKEN as error:
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(
            f"cannot download {name} from {url}: {reason}. Without a connection, get the file elsewhere and put it at "
            f"{target} (or set TORCH_HOME), or name a local file"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    if not prefix:
        _record(record, digest)
    return target


def persist(download: Callable[[], Result], what: str) -> Result:
    """What ``download()`` returns; it is called again, twice at most, where a connection broke or a server was busy."""
    for attempt in range(1, ATTEMPTS):
        try:
            return download()
        except BROKEN as error:
            if not _may_pass(error):
                raise
            logger.warning("downloading %s broke off (%s: %s): trying again", what, type(error).__name__, error)
            time.sleep(attempt)
    return download()


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: not where nobody listens, or there is no such file or address."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == 429 or error.code >= 500
    if isinstance(error, urllib.error.URLError):  # before there was a connection
        error = error.reason if isinstance(error.reason, Exception) else error
        return isinstance(error, ConnectionResetError)
    broken = ConnectionResetError, ConnectionAbortedError, BrokenPipeError, TimeoutError, http.client.HTTPException
    return isinstance(error, broken) and not isinstance(error, http.client.InvalidURL)


def _recorded(record: Path) -> str | None:
    """The SHA-256 that a file had when it was first used, None if it never was."""
    if not record.is_file():
        return None
    digest = record.read_text(errors="replace").partition(" ")[0]
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(f"{record} holds no SHA-256: it is damaged; delete it, and check the file beside it")
    return digest


def _record(record: Path, digest: str) -> None:
    """In the form of ``sha256sum``; a cache that may only be read stays without."""
    with contextlib.suppress(OutputError, UsageError):
        write_atomic(record, f"{digest}  {record.stem}\n")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _announced_size(url: str) -> int | None:
    """Bytes that the server says it will send: torch.hub takes a body that ends early for the whole file."""
    with urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "leanvit"})) as answer:
        length = answer.headers.get("Content-Length")
    return int(length) if length else None


@contextlib.contextmanager
def _patience(seconds: float) -> Generator[None]:
    """How long connections made in here may be silent."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def locate(source: str | os.PathLike[str]) -> Path:
    """A local path as it is, an http(s) or file URL through :func:`fetch`."""
    text = os.fspath(source)
    return fetch(text) if re.match(r"(https?|file)://", text) else Path(text)


def read_checkpoint(source: str | os.PathLike[str]) -> Any:
    """Content of a checkpoint given as a path or URL; one process downloads for all."""
    with main_process_first():
        path = locate(source)
    return load_safely(path)
