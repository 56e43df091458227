"""Checkpoints: atomic writes, safe and strict reading of our own and of published files, exact resume.

Reading never runs code from the file: ``torch.load(weights_only=True)`` with a short allow-list. The official files of
these papers hold an ``argparse.Namespace``, pathlib paths and NumPy scalars next to the weights; NumPy's values are
rebuilt by the small classes below rather than by NumPy's own unpickling, which trusts its input.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import glob
import hashlib
import math
import os
import pathlib
import pickletools
import random
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from common.run.distributed import (
    gather_objects,
    get_logger,
    get_rank,
    get_world_size,
    is_main,
    main_process_first,
    unwrap,
)
from common.run.errors import CheckpointError as CheckpointError

logger = get_logger(__name__)

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z0-9.]+$")
NUMERIC_KINDS = "biufcSU"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def plain(value: Any, where: str = "checkpoint") -> Any:
    """``value`` with nothing in it but tensors and Python's plain types, so that weights-only loading reads it.

    Namespaces become dicts, paths strings, NumPy scalars numbers, NumPy arrays tensors.

    Raises:
        TypeError: naming the place of anything else.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, collections.OrderedDict):  # a module's state dict; its _metadata carries versions
        copy = collections.OrderedDict((key, plain(item, f"{where}[{key!r}]")) for key, item in value.items())
        if hasattr(value, "_metadata"):
            copy.__dict__["_metadata"] = plain(value.__dict__["_metadata"], f"{where}._metadata")
        return copy
    if isinstance(value, Mapping):
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}; "
        "a checkpoint holds only tensors, numbers, strings, lists and dicts"
    )


def save_atomic(obj: Any, path: str | os.PathLike[str]) -> Path:
    """Write ``obj`` so that ``path`` is at every moment the old file or the whole new one, also after a power cut.

    A temporary file in the same folder is written, flushed to the disk and renamed. Call it on one rank only.
    """
    path = Path(path)
    content = plain(obj)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; is the disk full or the folder read-only?") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; not every platform can open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class _Dtype:
    """Stands for ``numpy.dtype`` while a file is read; only plain numbers, booleans and strings pass."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        del align, copy
        self.dtype = np.dtype(code) if isinstance(code, str) else np.dtype("O")
        self._check()

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)
        self._check()

    def _check(self) -> None:
        if self.dtype.kind not in NUMERIC_KINDS:
            raise ValueError(f"NumPy dtype {self.dtype} is not a plain number, boolean or string")

    def finish(self) -> np.dtype:
        return self.dtype


class _Array:
    """Stands for a ``numpy.ndarray`` while a file is read."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        array = np.frombuffer(data, dtype=dtype.finish())
        self.value = array.reshape(shape, order="F" if fortran else "C").copy()

    def finish(self) -> np.ndarray:
        if self.value is None:
            raise ValueError("a NumPy array without content")
        return self.value


class _Scalar:
    """Stands for a NumPy scalar while a file is read."""

    def __init__(self, value: np.generic) -> None:
        self.value = value

    def finish(self) -> np.generic:
        return self.value


class _NdarrayType:
    """The name ``numpy.ndarray`` in a file, as the argument of ``_reconstruct``."""


def _reconstruct_array(subtype: type, shape: tuple, typecode: bytes) -> _Array:
    del subtype, shape, typecode
    return _Array()


def _reconstruct_scalar(dtype: _Dtype, data: bytes) -> _Scalar:
    (value,) = np.frombuffer(data, dtype=dtype.finish())
    return _Scalar(value)


def _reconstruct_defaultdict(factory: object = None) -> dict:
    """A plain dict: what a missing key should make is no business of a file."""
    del factory
    return {}


def _safe_globals() -> list[Any]:
    """What may be named in a file besides torch's own list, each under every module name it was written with."""
    posix = pathlib.PosixPath if os.name == "posix" else pathlib.PurePosixPath
    named: list[Any] = [
        argparse.Namespace,
        (_reconstruct_defaultdict, "collections.defaultdict"),
        dict,
        list,
        set,
        int,
        float,
        (_Dtype, "numpy.dtype"),
        (_NdarrayType, "numpy.ndarray"),
        (_Array, "common.run.checkpoint._Array"),  # so that its content may be filled in
    ]
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath"):
            named.append((posix if name == "PosixPath" else pathlib.PurePosixPath, f"{module}.{name}"))
        for name in ("WindowsPath", "PureWindowsPath"):  # a concrete WindowsPath exists on Windows only
            named.append((pathlib.PureWindowsPath, f"{module}.{name}"))
    for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        named.append((_reconstruct_scalar, f"{core}.multiarray.scalar"))
        named.append((_reconstruct_array, f"{core}.multiarray._reconstruct"))
    return named


def _finish(value: Any, seen: dict[int, Any]) -> Any:
    """Replace the stand-ins by NumPy's values, inside containers too, keeping shared objects shared."""
    if isinstance(value, (_Dtype, _Array, _Scalar)):
        return value.finish()
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, dict):
        seen[id(value)] = value
        for key in list(value):
            value[key] = _finish(value[key], seen)
    elif isinstance(value, list):
        seen[id(value)] = value
        value[:] = [_finish(item, seen) for item in value]
    elif isinstance(value, argparse.Namespace):
        seen[id(value)] = value
        for key, item in vars(value).items():
            setattr(value, key, _finish(item, seen))
    elif type(value) is tuple:
        value = tuple(_finish(item, seen) for item in value)
    return value


def _describe(path: Path) -> str | None:
    """What is wrong with the file at first sight, or None where it looks like weights."""
    size = path.stat().st_size
    if size == 0:
        return "found an empty file (0 bytes); a download or a copy was interrupted"
    with open(path, "rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"found a web page of {size} bytes, not weights; the download gave an error or a login page"
    if start.startswith(b"version https://git-lfs"):
        return "found a Git LFS pointer, not the file it points to; run `git lfs pull`"
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return f"found the beginning of a torch file, but its end is missing ({size} bytes); it is truncated"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return "found a TorchScript archive, which holds code; expected weights alone"
        if "data.pkl" not in names:
            return "found a zip archive without torch's data.pkl"
    elif head[:1] == b"\x80" and head[1] > 2:  # torch writes pickle protocol 2
        named = _pickled_names(path)
        about = f"; it names {named}, which was refused and not run" if named else ""
        return f"found a Python pickle, not a file of torch.save{about}"
    if not head.startswith((b"PK", b"\x80")) and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"found a text file of {size} bytes that begins with {head[:40].decode('ascii')!r}"
    return None


def _pickled_names(path: Path) -> str:
    """Names of the globals in a pickle, read without executing it; empty where there are none or it is damaged."""
    names, strings = [], ["", ""]
    with open(path, "rb") as file, contextlib.suppress(Exception):  # a damaged pickle ends the list, that is all
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return _some(sorted(set(names)))


def _is_safetensors(path: Path) -> bool:
    """An eight-byte header length, then a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000


def _explain(error: Exception) -> str:
    """One sentence about why reading failed."""
    text = str(error)
    forbidden = re.search(r"(?:GLOBAL|reduce for unrecognized function) (\S+)", text)
    if forbidden:
        return (
            f"it names {forbidden.group(1)}, which is no plain value; it was refused and nothing in it was run. "
            "If you trust the file's origin, have its author save only tensors and plain values"
        )
    if isinstance(error, EOFError) or re.search("PytorchStreamReader|central directory|unexpected EOF", text):
        return f"it is truncated or damaged ({_first_line(text) or 'unexpected end'})"
    cause = text.split("WeightsUnpickler error:")[-1]  # torch's own advice around it is to load unsafely
    return f"{type(error).__name__}: {_first_line(cause) or 'no reason given'}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def load_safely(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu", mmap: bool = False) -> Any:
    """Read a checkpoint without running anything in it: torch's formats old and new, and safetensors.

    Args:
        path: the file; a URL must go through :func:`fetch` first (or :func:`locate`, which takes both).
        map_location: device of the tensors read.
        mmap: map the file instead of reading it, where its format allows (large files, read once).

    Returns:
        What was saved. Namespaces and paths come back as such; a WindowsPath as a ``PureWindowsPath`` elsewhere.

    Raises:
        CheckpointError: missing, a folder, empty, truncated, not a checkpoint, or naming anything that is no plain
            value; the message says which.
    """
    path = Path(path)
    again = "download or copy the file again, or name another"
    if path.is_dir():
        raise CheckpointError(f"{path}: found a folder, expected a checkpoint file; name a file inside it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint; check the path, or download the file")
    try:
        safetensors = _is_safetensors(path)  # first: the length that such a file begins with can look like a pickle
        finding = None if safetensors else _describe(path)
        if finding is not None:
            raise CheckpointError(f"{path}: {finding}; {again}")
        if safetensors or path.suffix == ".safetensors":
            from safetensors.torch import load_file  # only where such a file is read

            return load_file(path, device=str(map_location))
        with torch.serialization.safe_globals(_safe_globals()):
            content = torch.load(
                path, map_location=map_location, weights_only=True, mmap=mmap and zipfile.is_zipfile(path)
            )
        return _finish(content, {})
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except Exception as error:  # a damaged or hostile file can fail in any way; all of them are this one finding
        raise CheckpointError(f"{path}: found no readable checkpoint: {_explain(error)}; {again}") from error


def select_state(checkpoint: Any, keys: Sequence[str] = ("model", "state_dict"), *, source: str = "checkpoint") -> dict:
    """The weights inside a checkpoint: under the first of ``keys`` that is there, or the checkpoint itself.

    The prefixes of DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) are removed.

    Raises:
        CheckpointError: nothing in it maps names to tensors.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{source}: found a {type(checkpoint).__name__}, expected a dict of weights")
    state: Any = checkpoint
    for key in keys:
        if isinstance(checkpoint.get(key), Mapping):
            state = checkpoint[key]
            break
    strange = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        raise CheckpointError(
            f"{source}: expected weights under one of the keys {', '.join(keys)} or at the top level, found the keys "
            f"{_some([str(key) for key in checkpoint])}"
        )
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def hub_folder() -> Path:
    """Where torch.hub keeps downloaded weights: ``$TORCH_HOME/hub/checkpoints``, ``~/.cache/torch`` by default."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _sha256(path: Path, *, progress: bool) -> str:
    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"checking {path.name}", disable=not progress,
             delay=2, leave=False) as bar,
    ):  # fmt: skip
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def fetch(
    url: str,
    *,
    sha256_prefix: str | None = None,
    folder: Path | None = None,
    progress: bool = True,
    timeout_s: float = 30,
) -> Path:
    """Path of the published file at ``url``, from torch.hub's cache or downloaded into it.

    Args:
        url: http(s) or file address.
        sha256_prefix: first hexadecimal digits of the file's SHA-256; taken from a name like ``net-0676ba61.pth``
            where not given. Checked for cached files too.
        folder: where to keep it, instead of :func:`hub_folder`.
        progress: show a bar.
        timeout_s: how long to wait for the server, in seconds.

    Raises:
        CheckpointError: no connection (saying which file, from where, and where to put it) or a wrong hash.
    """
    name = os.path.basename(urllib.request.url2pathname(url.split("?")[0].split("#")[0]))
    progress = progress and is_main()
    target = (folder or hub_folder()) / name
    if sha256_prefix is None and (found := HASH_IN_NAME.search(name)):
        sha256_prefix = found.group(1)
    if target.is_file():
        if sha256_prefix and not _sha256(target, progress=progress).startswith(sha256_prefix.lower()):
            raise CheckpointError(
                f"{target}: its SHA-256 does not begin with {sha256_prefix}; it is damaged or another file. "
                f"Delete it to download it again from {url}"
            )
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        _download(url, temporary, progress=progress, timeout_s=timeout_s)
        if sha256_prefix and not (digest := _sha256(temporary, progress=progress)).startswith(sha256_prefix.lower()):
            raise CheckpointError(
                f"{url}: the download's SHA-256 is {digest}, expected {sha256_prefix}...; it was interrupted or the "
                "file was replaced; try again"
            )
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:  # urllib's errors are OSErrors
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(
            f"cannot download {name} from {url}: {reason}. Without a connection, get the file elsewhere and put it at "
            f"{target} (or set TORCH_HOME), or name a local file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _download(url: str, path: Path, *, progress: bool, timeout_s: float) -> None:
    """Stream ``url`` into ``path``, flushed to the disk; a short body is an error."""
    request = urllib.request.Request(url, headers={"User-Agent": "leanvit"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer, open(path, "wb") as file:
        length = answer.headers.get("Content-Length")
        total = int(length) if length else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=path.name[1:-4], disable=not progress) as bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        received = file.tell()
        if total is not None and received != total:
            raise urllib.error.ContentTooShortError(f"received {received} of {total} bytes", cast(Any, None))
        file.flush()
        os.fsync(file.fileno())


def locate(source: str | os.PathLike[str], *, sha256_prefix: str | None = None) -> Path:
    """A local path as it is, an http(s) or file URL through :func:`fetch`."""
    text = os.fspath(source)
    if re.match(r"(https?|file)://", text):
        return fetch(text, sha256_prefix=sha256_prefix)
    return Path(text)


# ---------------------------------------------------------------------------------------------------------------------
# Strict loading


@dataclass(frozen=True)
class KeyDifferences:
    """How a state differs from a model; ``mismatched`` holds (key, shape in the model, shape in the state)."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    tolerated: tuple[str, ...] = field(default=(), compare=False)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def lines(self) -> Iterable[str]:
        """Every difference, grouped, one per line."""
        if self.missing:
            yield f"missing, in the model but not in the file ({len(self.missing)}):"
            yield from (f"  {key}" for key in self.missing)
        if self.unexpected:
            yield f"unexpected, in the file but not in the model ({len(self.unexpected)}):"
            yield from (f"  {key}" for key in self.unexpected)
        if self.mismatched:
            yield f"different shape ({len(self.mismatched)}):"
            yield from (f"  {key}: model {list(model)}, file {list(file)}" for key, model, file in self.mismatched)


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def list_key_differences(model: nn.Module, state: Mapping[str, Any]) -> KeyDifferences:
    """Compare names and shapes, touching neither side. A value that is no tensor counts as a shape of ()."""
    own = {
        key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)
    }  # a module's get_extra_state() is no weight
    mismatched = []
    for key, value in own.items():
        if key in state:
            shape = tuple(state[key].shape) if isinstance(state[key], Tensor) else ()
            if shape != tuple(value.shape) or not isinstance(state[key], Tensor):
                mismatched.append((key, tuple(value.shape), shape))
    return KeyDifferences(
        missing=tuple(key for key in own if key not in state),
        unexpected=tuple(str(key) for key in state if key not in own),
        mismatched=tuple(mismatched),
    )


def load_strict(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    source: str | os.PathLike[str] = "checkpoint",
) -> KeyDifferences:
    """Load ``state`` into ``model`` or say everything that does not fit; nothing is ignored silently.

    Args:
        allow_missing, allow_unexpected: patterns (``fnmatch``) of keys the file may lack or hold besides; those found
            are logged and returned as ``tolerated``.
        source: the file's name, for messages.

    Raises:
        CheckpointError: listing all missing and unexpected keys and all shape mismatches; the model is untouched.
    """
    found = list_key_differences(model, state)

    def allowed(key: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)

    tolerated = (
        *(key for key in found.missing if allowed(key, allow_missing)),
        *(key for key in found.unexpected if allowed(key, allow_unexpected)),
    )
    rest = KeyDifferences(
        tuple(key for key in found.missing if key not in tolerated),
        tuple(key for key in found.unexpected if key not in tolerated),
        found.mismatched,
        tolerated,
    )
    if rest:
        raise CheckpointError(f"{os.fspath(source)} does not fit {type(model).__name__}:\n" + "\n".join(rest.lines()))
    if any(value.is_meta for value in model.state_dict().values() if isinstance(value, Tensor)):
        raise CheckpointError(
            f"{type(model).__name__} is on the meta device and holds no weights; build it on a device"
        )
    if tolerated:
        logger.info("%s: left as they are: %s", os.fspath(source), _some(tolerated))
    model.load_state_dict({key: value for key, value in state.items() if key not in tolerated}, strict=False)
    return rest


# ---------------------------------------------------------------------------------------------------------------------
# The state of a training run


class Stateful(Protocol):
    """What can be kept in a checkpoint: optimizers, schedulers, scalers, and a paper's own state."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def random_states(device: torch.device) -> dict[str, Any]:
    """This process's generators: Python's, NumPy's, torch's and, on CUDA, its device's."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        if states["cuda"] is None:
            logger.warning("the checkpoint was written on the CPU: CUDA's random numbers continue differently")
        else:
            torch.cuda.set_rng_state(states["cuda"], device)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: the one running or, with ``batch`` 0, the next; counts from 0.
        batch: batches of it done.
        step: optimizer steps since the beginning.
        trained: all its batches are done, its evaluation is not.
        best: best value so far of the metric that decides which state to keep.
        sums: of the epoch's loss terms, from which its means are made; each rank has its own.
        seconds: spent on the epoch's batches.
        position: the loader's own state.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    trained: bool = False
    best: float | None = None
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    position: dict[str, Any] | None = None


@dataclass
class TrainingState:
    """Everything a run needs to continue exactly; the engine advances ``progress``.

    Args:
        model: the bare module, not wrapped.
        optimizer, scheduler, scaler, ema: None where the run has none; ``ema`` holds its average in ``.module``.
        extra: a paper's own state by name, for example dual variables; the same on every rank.
        arguments: the run's flags, ``vars(args)``, for the record.
        device: this process's, whose generator is part of the state.
    """

    model: nn.Module
    optimizer: Stateful | None = None
    scheduler: Stateful | None = None
    scaler: Stateful | None = None
    ema: nn.Module | None = None
    extra: Mapping[str, Stateful] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = field(default_factory=Progress)
    resumed_random: Mapping[str, Any] | None = None
    """Generators to put back when training starts: what runs in between may draw numbers of its own."""

    def __post_init__(self) -> None:
        self.model = unwrap(self.model)

    def _parts(self) -> dict[str, Stateful]:
        """By the key in the file; the names are those of DeiT's files."""
        named = {"optimizer": self.optimizer, "lr_scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in named.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """What goes into the file. With several ranks, call it on all: each contributes its generators."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self._average().state_dict() if self.ema is not None else None,
            **{name: part.state_dict() for name, part in self._parts().items()},
            "extra": {name: part.state_dict() for name, part in self.extra.items()},
            "epoch": self.progress.epoch - 1,  # the last finished one, as DeiT's files have it
            "progress": asdict(self.progress),
            "ranks": gather_objects({**random_states(self.device), "sums": dict(self.progress.sums)}),
            "args": dict(self.arguments),
        }

    def _average(self) -> nn.Module:
        module = getattr(self.ema, "module", None)
        if not isinstance(module, nn.Module):
            raise TypeError(f"ema must hold its average in .module, as timm's ModelEmaV3 does; got {type(self.ema)}")
        return module

    def load_state_dict(self, content: Mapping[str, Any], *, source: str = "checkpoint") -> None:
        """Continue from a file of ours exactly, or from one of the official trainers at its next epoch.

        Raises:
            CheckpointError: naming what the file lacks or what does not fit.
        """
        if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
            found = _some([str(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointError(f"{source}: cannot resume from it: expected the key 'model', found {found}")
        lacking = [name for name in self._parts() if name != "scaler" and name not in content]
        ours = "progress" in content
        if lacking and (ours or "optimizer" in lacking):
            raise CheckpointError(
                f"{source}: cannot resume from it: it lacks {', '.join(lacking)}; to start from its weights only, "
                "use --finetune or --initial-checkpoint"
            )
        load_strict(self.model, select_state(content, ("model",), source=source), source=source)
        if self.ema is not None:
            average = content.get("model_ema")
            if average is None:
                logger.warning("%s holds no average of the weights: it starts again from the weights", source)
            load_strict(self._average(), average or self.model.state_dict(), source=f"{source} (model_ema)")
        for name, part in self._parts().items():
            if not content.get(name):
                if name == "lr_scheduler" or (name == "scaler" and part.state_dict()):
                    logger.warning("%s holds no %s: it starts afresh", source, name)
                continue
            try:
                part.load_state_dict(content[name])
            except (ValueError, KeyError, RuntimeError, TypeError) as error:
                raise CheckpointError(f"{source}: its {name} does not fit this run: {error}") from error
        for name, part in self.extra.items():
            if name not in content.get("extra", {}):
                raise CheckpointError(f"{source}: it lacks extra state {name!r}; was it written by another program?")
            part.load_state_dict(content["extra"][name])
        if ours:
            self.progress = Progress(**content["progress"])
            self._take_rank(content["ranks"], source)
            self._compare_arguments(content.get("args") or {})
        else:
            self.progress = Progress(epoch=int(content.get("epoch", -1)) + 1)
            logger.warning("%s is not of this program: continuing at epoch %d, not bit for bit", source,
                           self.progress.epoch)  # fmt: skip

    def _take_rank(self, ranks: Sequence[Mapping[str, Any]], source: str) -> None:
        """What belongs to this rank alone: its generators, and its part of the epoch's means."""
        size = get_world_size()
        if len(ranks) == size:
            self.resumed_random = ranks[get_rank()]
            self.progress.sums = dict(ranks[get_rank()]["sums"])
            return
        if self.progress.batch:
            raise CheckpointError(
                f"{source} is from within an epoch of {len(ranks)} processes, whose order of pictures {size} cannot "
                f"continue; resume with {len(ranks)}, or from a checkpoint written after an epoch"
            )
        logger.warning(
            "%s was written by %d processes and is resumed by %d: the continuation is not bit for bit the same",
            source, len(ranks), size,
        )  # fmt: skip

    def _compare_arguments(self, before: Mapping[str, Any]) -> None:
        now = plain(dict(self.arguments))
        changed = [f"{key} {before[key]!r} -> {now[key]!r}" for key in now if key in before and before[key] != now[key]]
        if changed:
            logger.info("arguments that changed since the checkpoint: %s", "; ".join(changed))

    def restore_random(self) -> None:
        """Put the generators of a resumed run back, once; does nothing in a new run."""
        if self.resumed_random is not None:
            restore_random_states(self.resumed_random, self.device)
            self.resumed_random = None


class CheckpointManager:
    """Keeps the last and the best state of a run in a folder, each written whole or not at all.

    Args:
        folder: created if needed.
        metric: key of the evaluation's result by which a state is best; None keeps the last only.
        higher_is_better: False for a loss.
        last, best: file names.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        metric: str | None = "top1_percent",
        higher_is_better: bool = True,
        last: str = "last.pth",
        best: str = "best.pth",
    ) -> None:
        self.folder = Path(folder)
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.last, self.best = self.folder / last, self.folder / best
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (last, best):  # what a killed run left half written
                for stale in self.folder.glob(f".{glob.escape(name)}.*.tmp"):
                    stale.unlink(missing_ok=True)

    def improves(self, value: float, best: float | None) -> bool:
        """Strictly better; a value that is no number never is."""
        if not math.isfinite(value):
            return False
        return best is None or (value > best if self.higher_is_better else value < best)

    def save(self, state: TrainingState, metrics: Mapping[str, float] | None = None) -> bool:
        """Write the state; with ``metrics`` of an evaluation also as the best, if it is. Call it on every rank.

        Returns:
            Whether this is the best state so far.
        """
        improved = False
        if metrics is not None and self.metric is not None:
            if self.metric not in metrics:
                raise KeyError(f"the evaluation gave no {self.metric!r} to keep the best by, only {sorted(metrics)}")
            value = float(metrics[self.metric])
            improved = self.improves(value, state.progress.best)
            if improved:
                state.progress.best = value
        content = state.state_dict()
        if is_main():
            if improved:  # first, so that a run killed in between repeats it
                save_atomic(content, self.best)
            save_atomic(content, self.last)
        return improved

    def resume(self, state: TrainingState, source: str | os.PathLike[str] = "auto") -> bool:
        """Load ``source`` into ``state``: a path, a URL, or ``auto`` for this folder's last file, if there is one.

        Returns:
            False where ``auto`` found nothing, and the run starts new.
        """
        if os.fspath(source) == "auto":
            if not self.last.exists():
                return False
            source = self.last
        with main_process_first():
            path = locate(source)
        state.load_state_dict(load_safely(path), source=str(path))
        logger.info("resumed from %s at epoch %d, step %d", path, state.progress.epoch, state.progress.step)
        return True
