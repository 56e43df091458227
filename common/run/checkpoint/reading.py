"""Reading checkpoints without running code from the file.

``torch.load(weights_only=True)`` with a short allow-list. The official files of these papers hold an
``argparse.Namespace``, pathlib paths and NumPy scalars next to the weights; NumPy's values are rebuilt by the small
classes below rather than by NumPy's own unpickling, which trusts its input.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import pickletools
import re
import zipfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.run.checkpoint.sealing import check_seal
from common.run.errors import CheckpointError
from common.run.files import existing_file

ZIP = b"PK\x03\x04"
NUMERIC_KINDS = "biufcSU"
MOST_SHARED = 10_000_000
"""values in a value, those that it holds more than once counted each time"""
DEEPEST = 1_000
"""values in each other"""
LONGEST = 200
"""letters of a name"""


class _Dtype:
    """Stands for ``numpy.dtype`` while a file is read; only plain numbers, booleans and strings pass."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        del align, copy
        self.dtype = np.dtype(code) if isinstance(code, str) else np.dtype("O")
        self._check()

    def __setstate__(self, state: Sequence[Any]) -> None:
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
    """Stands for a ``numpy.ndarray``, and for that name in a file, while it is read."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, fortran, data = state
        array = np.frombuffer(data, dtype=dtype.finish())
        self.value = array.reshape(shape, order="F" if fortran else "C").copy()

    def finish(self) -> np.ndarray:
        if self.value is None:
            raise ValueError("a NumPy array without content")
        return self.value


def _reconstruct_array(subtype: type, shape: Sequence[int], typecode: bytes) -> _Array:
    del subtype, shape, typecode
    return _Array()


def _reconstruct_scalar(dtype: _Dtype, data: bytes) -> np.generic:
    (value,) = np.frombuffer(data, dtype=dtype.finish())
    return value


def _reconstruct_defaultdict(factory: object = None) -> dict[Any, Any]:
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
        (_Array, "numpy.ndarray"),  # named here, its content may be filled in
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
    if isinstance(value, (_Dtype, _Array)):
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
        seen[id(value)] = finished = tuple(_finish(item, seen) for item in value)
        return finished
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
    if head.startswith(ZIP) and not zipfile.is_zipfile(path):
        return f"found the beginning of a torch file, but its end is missing ({size} bytes); it is truncated"
    if head.startswith(ZIP):
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return "found a compressed archive, which torch never writes; unpacked it could be of any size"
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


def _check_work(path: Path) -> None:
    """Refuse a pickle with which going through its values, or telling what is wrong with it, takes practically forever.

    A list of two times the same list, forty levels deep, takes 200 bytes and 2 ** 40 steps; torch looks for words in
    its own message in quadratic time, and so must not meet a name of a million letters. Nothing is executed.
    """
    with open(path, "rb") as file:
        content, streams = file, 5  # three of a head, the content, and its storages
        is_zip = file.read(len(ZIP)) == ZIP
        file.seek(0)
        if is_zip:  # which is how torch tells them, who also opens it: others may see other entries
            archive = torch._C.PyTorchFileReader(file)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            if sum(map(archive.get_record_size, set(archive.get_all_records()))) > path.stat().st_size:
                raise CheckpointError("found a compressed archive, which torch never writes")
            content, streams = io.BytesIO(archive.get_record("data.pkl")), 1
        for _ in range(streams):
            values: list[_Value] = []
            with contextlib.suppress(ValueError, IndexError, KeyError):  # a damaged pickle is found by who reads it
                _follow(pickletools.genops(content), values)
            _check_sizes(values)


class _Value(list["_Value"]):
    """Stands for a value of a pickle: what is in it."""


FUNCTION = _Value()
"""Stands for everything that a pickle names."""
FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")


def _follow(operations: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]], values: list[_Value]) -> None:
    """Add all values that a pickle makes, in the order in which it does."""
    stack: list[_Value | None] = []  # None: a mark
    memo: dict[Any, _Value | None] = {}
    try:
        for operation, argument, _ in operations:
            name, before = operation.name, operation.stack_before
            if "GET" in name:
                stack.append(memo[argument])
            elif name == "MEMOIZE" or "PUT" in name:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name == "DUP":
                stack.append(stack[-1])
            elif "GLOBAL" in name:
                if len(argument or "") > LONGEST:
                    raise CheckpointError(f"it names something of {len(argument)} letters")
                del stack[len(stack) - len(before) :]
                stack.append(FUNCTION)
            else:
                taken: list[_Value] = []
                marked = pickletools.markobject in before
                while marked and (found := stack.pop()) is not None:
                    taken.append(found)
                for _ in range(len(before) - 2 * marked):
                    found = stack.pop()
                    taken.append(_Value() if found is None else found)
                if name in ("REDUCE", "NEWOBJ") and taken[-1] is not FUNCTION:
                    raise CheckpointError("it calls what is no function")
                if pickletools.markobject in operation.stack_after:
                    stack.append(None)
                elif operation.stack_after:
                    made = taken.pop() if name in FILLING and taken[-1] is not FUNCTION else _Value()
                    made += taken
                    stack.append(made)
                    values.append(made)
    except UnicodeDecodeError as error:
        raise CheckpointError("it names something with letters that no name has") from error


def _check_sizes(values: Iterable[_Value]) -> None:
    """Refuse values that lie in each other too deep or without end, or are too many counted as often as they occur."""
    known: dict[int, tuple[int, int]] = {}  # values in it, and levels of it
    entered: set[int] = set()
    for each in values:
        waiting = [each]
        while waiting:
            value = waiting[-1]
            held = [inner for inner in value if id(inner) not in known]
            if held and id(value) not in entered:
                entered.add(id(value))
                waiting += held
                continue
            inside = [known.get(id(inner), (MOST_SHARED, 0)) for inner in value]  # one that is not known yet holds it
            size, depth = 1 + sum(size for size, _ in inside), 1 + max((depth for _, depth in inside), default=0)
            if size > MOST_SHARED or depth > DEEPEST:
                raise CheckpointError("its values lie in each other or share parts without end")
            known[id(waiting.pop())] = size, depth


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
    return some(sorted(set(names)))


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


def load_safely(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint onto the CPU without running anything in it: torch's formats old and new, and safetensors.

    Args:
        path: the file; a URL must go through :func:`fetch` first (or :func:`locate`, which takes both).

    Returns:
        What was saved. Namespaces and paths come back as such; a WindowsPath as a ``PureWindowsPath`` elsewhere.

    Raises:
        CheckpointError: missing, a folder, empty, truncated, damaged, not a checkpoint, or naming anything that is no
            plain value; the message says which.
    """
    path = existing_file(path)
    again = "download or copy the file again, or name another"
    try:
        check_seal(path)
        safetensors = _is_safetensors(path)  # first: the length that such a file begins with can look like a pickle
        finding = None if safetensors else _describe(path)
        if finding is not None:
            raise CheckpointError(f"{path}: {finding}; {again}")
        if safetensors or path.suffix == ".safetensors":
            from safetensors.torch import load_file  # only where such a file is read

            return load_file(path)
        _check_work(path)
        with torch.serialization.safe_globals(_safe_globals()):
            return _finish(torch.load(path, map_location="cpu", weights_only=True), {})
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}; {again}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except Exception as error:  # a damaged or hostile file can fail in any way; all of them are this one finding
        raise CheckpointError(f"{path}: found no readable checkpoint: {_explain(error)}; {again}") from error


def read_description(path: str | os.PathLike[str], key: str) -> dict[str, Any] | None:
    """What a safetensors file says of itself: the JSON object under ``key`` of its header, None without that entry.

    Raises:
        CheckpointError: missing, a folder, no safetensors file, or no JSON object.
    """
    return read_described(path, key, weights=False)[0]


def read_described(
    path: str | os.PathLike[str], key: str, *, weights: bool = True
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """:func:`read_description` and the weights, the file's checksum computed once; raises what they do."""
    path = existing_file(path)
    from safetensors import safe_open  # only where such a file is read

    try:
        check_seal(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(key)
            state = {name: file.get_tensor(name) for name in file.keys() if weights}  # noqa: SIM118 - it is no dict
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; make the file anew") from error
    except Exception as error:  # safetensors raises its own kind for a file that is none
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); make the file anew") from error
    try:
        content = None if text is None else json.loads(text)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: {key!r} in its header is damaged: {error}; make the file anew") from error
    if text is not None and not isinstance(content, dict):
        raise CheckpointError(f"{path}: {key!r} in its header is no JSON object; make the file anew")
    return content, state


@contextlib.contextmanager
def naming(
    source: str | os.PathLike[str], finding: str = "its content is damaged", passing: tuple[type[Exception], ...] = ()
) -> Generator[None]:
    """For the use of what was read: what odd values of a file make it raise, but ``passing``, becomes a CheckpointError
    with the file's name.
    """
    try:
        yield
    except (CheckpointError, *passing):
        raise
    except Exception as error:  # as many kinds as there are users
        raise CheckpointError(
            f"{os.fspath(source)}: {finding} ({type(error).__name__}: {_first_line(str(error))}); make the file anew"
        ) from error


def select_state(
    checkpoint: Any, keys: Sequence[str] = ("model", "state_dict"), *, source: str = "checkpoint"
) -> dict[str, Tensor]:
    """The weights inside a checkpoint: under the first of ``keys`` that is there, or the checkpoint itself.

    The prefixes of DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) are removed.

    Raises:
        CheckpointError: nothing in it maps names to tensors; or one of them is sparse, without data, expanded, complex,
            or holds NaN or infinity.
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
            f"{some([str(key) for key in checkpoint])}"
        )
    if odd := [f"{key} ({kind})" for key, value in state.items() if (kind := _oddity(key, value))]:
        raise CheckpointError(f"{source} holds tensors that are no weights: {some(odd)}; expected finite real numbers")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _oddity(key: Any, value: Tensor) -> str:
    """What keeps an entry of a checkpoint from being a weight, a counter or a mask; empty if nothing does."""
    if not isinstance(key, str):
        return f"the name is a {type(key).__name__}"
    if own := getattr(value, "to_local", None):  # divided among the ranks, each of which looks at its part
        return _oddity(key, own())
    if value.is_meta or value.layout is not torch.strided:
        return "without data" if value.is_meta else str(value.layout).removeprefix("torch.")
    if value.is_complex() or value.is_quantized:
        return str(value.dtype).removeprefix("torch.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "one value in many places"  # of which a small file can have any number
    return "" if not value.is_floating_point() or value.isfinite().all() else "not finite"


def some(names: Sequence[str], limit: int = 8) -> str:
    """Names as one text, the first ones and how many more."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
