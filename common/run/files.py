"""The checkout's root, checkpoints that must be there, and writing a file so that nobody ever reads a part of it."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from common.run.errors import CheckpointError, OutputError, UsageError
from common.run.program import get_logger

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: the folder that holds ``common`` and the papers."""


SHARDED = ".dcp"
"""How folders end that hold a checkpoint in shards, of a run with ``--fsdp``."""
SHARDS = ".metadata"
"""What torch.distributed.checkpoint writes into each of them."""


def check_files(*sources: str | os.PathLike[str] | None, sharded: bool = False) -> None:
    """Raise what reading would where a checkpoint is not there: for ``main``, after parsing, before torch and data.

    Addresses, ``auto`` and empty values pass.

    Args:
        sharded: folders of a run with ``--fsdp`` are expected.
    """
    for source in sources:
        text = os.fspath(source or "")
        if text and text != "auto" and "://" not in text:
            existing_folder(text) if sharded else existing_file(text)


class NotAFile(OSError):
    """A folder, a pipe or a device where a file was expected."""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Content of a regular file.

    Raises:
        NotAFile: it is something else, which could keep a reader waiting or never end.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise NotAFile(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def sharded_name(path: Path) -> Path:
    """The folder that a run with ``--fsdp`` writes in place of the file ``path``: ``last.dcp`` of ``last.pth.tar``."""
    return path.with_name(path.name.partition(".")[0] + SHARDED)


def existing_folder(source: str | os.PathLike[str]) -> Path:
    """``source`` as the path of a checkpoint in shards.

    Raises:
        CheckpointError: nothing is there, or something else.
    """
    path = Path(source)
    if path.exists() and not (path / SHARDS).is_file():
        raise CheckpointError(
            f"{path}: expected a folder that a run with --fsdp wrote, with {SHARDS} in it; a run with --fsdp goes on "
            "from such a folder alone, and starts from the weights of a file by the program's flag for weights"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder, expected a checkpoint of a run with --fsdp; check the path")
    return path


def existing_file(source: str | os.PathLike[str]) -> Path:
    """``source`` as the path of a checkpoint.

    Raises:
        CheckpointError: nothing is there, or no file.
    """
    path = Path(source)
    if (path / SHARDS).is_file():
        raise CheckpointError(
            f"{path}: found a checkpoint in shards, of a run with --fsdp, expected one file: make it by "
            f"python -m common.run.one_file {path} FILE, or give --fsdp to train on"
        )
    if path.is_dir():
        raise CheckpointError(f"{path}: found a folder, expected a checkpoint file; name a file inside it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint; check the path, or download the file")
    if not path.is_file():
        raise CheckpointError(f"{path}: found a pipe or a device, expected a checkpoint file; copy it to one")
    return path


def make_folder(path: Path) -> None:
    """Make a folder that results go to, with those above it, where it is not there.

    Raises:
        UsageError: something else is there, or nobody may write.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the output folder {path} ({error.strerror}); name another") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"cannot write to the output folder {path} (permission denied); name another")


def lock_folder(folder: Path) -> Callable[[], None]:
    """Keep a folder for one run: no other process gets it until this one calls what is returned, or ends.

    The system releases the lock of a process that died, also of one on another host where the folder is shared, and
    after a restart. Where a file system knows no locks, that is said.

    Raises:
        UsageError: another run has it; the message says which.
    """
    path = folder / ".lock"
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise UsageError(
                f"{folder} is in use by another run ({owner or 'unknown'}), and two would overwrite each other; "
                "wait until it ends, stop it, or name another folder"
            ) from error
        except OSError as error:
            get_logger(__name__).warning("%s: cannot be locked (%s); start no second run", folder, error.strerror)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # its owner took the file away in between
    owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n"
    with contextlib.suppress(OSError):  # a full disk; the lock holds without these words
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner.encode())

    def release() -> None:
        path.unlink(missing_ok=True)
        os.close(descriptor)

    return release


@contextlib.contextmanager
def replacing(path: Path) -> Generator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends; until then, and after an error, the old one
    is there.

    It is written under a temporary name in the same folder, flushed to the disk and renamed, so that ``path`` is whole
    at every moment, also after a power cut. Missing parent folders are made.

    Raises:
        OutputError: it cannot be written, or is a pipe or a device, whose place no file should take.
        UsageError: nor can its folder.
    """
    make_folder(path.parent)
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: found a folder, a pipe or a device there; name a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        try:
            with open(temporary, "x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Tell in one line what the system says of a file of ours in the block: :class:`OutputError`, naming it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write {path} ({reason}): is the disk full, or the folder read-only?") from error


def append(path: Path, text: str) -> None:
    """Add to the end of a file, all of it or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path), open(path, "ab", buffering=0) as file:  # a buffer would write its rest when it is closed
        size, content = file.tell(), memoryview(text.encode())
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


def stale(path: Path) -> Iterator[Path]:
    """What killed processes left of :func:`replacing` beside ``path``."""
    for other in path.parent.glob(".*.tmp"):
        if other.name.startswith(f".{path.name}."):
            yield other


def replace_folder(path: Path, new: Path) -> None:
    """Let the whole folder ``new`` beside ``path`` take its place; who is killed meanwhile leaves one of them whole."""
    old = _old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def heal_folder(path: Path) -> None:
    """Clear up after processes that were killed while they wrote, or replaced, a folder ``path``."""
    if _old(path).exists() and not path.exists():
        _old(path).rename(path)
    for half in path.parent.glob(f".{path.name}.*"):
        if half.is_dir():
            shutil.rmtree(half)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file through :func:`replacing`; text as UTF-8, what it has no letters for (bytes in the names of
    files) as escapes.
    """
    with replacing(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def output_files(paths: Sequence[Path], model: str, folder: Path) -> list[Path]:
    """A PNG in ``folder`` for each image, numbered where names are equal."""
    stems = [path.stem for path in paths]
    numbers = [stems[:i].count(stem) for i, stem in enumerate(stems)]
    return [folder / f"{s}_{model}{f'_{n + 1}' if n else ''}.png" for s, n in zip(stems, numbers, strict=True)]


def check_output(
    *paths: str | os.PathLike[str] | None, folder: bool = False, inputs: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Raise what writing would where a result cannot go: for ``main``, after parsing. Empty paths pass.

    Args:
        inputs: files that the program reads.

    Raises:
        UsageError: see :func:`problem_with`; or a file would take the place of an input, or of another output.
    """
    taken = {Path(path).resolve() for path in inputs if path}
    for path in filter(None, paths):
        problem = problem_with(Path(path), folder=folder)
        if not problem and Path(path).resolve() in taken:
            problem = f"{path} is read or written as something else, which would be lost"
        if problem:
            raise UsageError(f"no place for the output: {problem}; name another")
        taken.add(Path(path).resolve())


def problem_with(path: Path, *, folder: bool = False) -> str:
    """Why a file, or a folder of files, cannot be written here; empty if it can. Parents that are missing get made."""
    found = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not found.is_dir() and not found.is_file():
        return f"{found} is a pipe or a device"
    if found.is_dir():
        if found == path and not folder:
            return f"{path} is a folder, expected the name of a file"
        try:
            tempfile.TemporaryFile(dir=found).close()  # permissions alone say nothing of /proc or of a read-only mount
        except OSError as error:
            return f"cannot write in {found}: {error.strerror}"
        return ""
    return f"{found} is a file, not a folder" if folder or found != path else ""


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; not every platform can open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
