"""Checkpoints of runs whose weights are divided among the ranks: a folder each, by torch.distributed.checkpoint.

What is divided is in torch's own files, one of each rank, and may be read by any number of ranks, or by none, as whole
tensors. ``state.pth`` beside them is an ordinary checkpoint but for these tensors, and has the SHA-256 of the others.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as zero_dtensor
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from common.run.checkpoint.reading import load_safely, naming
from common.run.checkpoint.writing import save_atomic
from common.run.errors import CheckpointError, OutputError
from common.run.files import SHARDS, existing_folder, replace_folder, writing
from common.run.launch import barrier, gather_objects, get_world_size
from common.run.program import get_rank, is_main

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

REST = "state.pth"
PLACE = "leanvit_shards"
"""Key of what stands in ``REST`` for a divided tensor: a dict with the tensor's name."""


def save_sharded(content: Any, path: Path, *others: Path) -> None:
    """Write ``content`` as the folder ``path``, whole or not at all; call it on every rank.

    A run that is killed leaves the old one, under its name or beside it, see ``common.run.files.heal_folder``.

    Args:
        others: beside it, folders of the same files.

    Raises:
        OutputError: it cannot be written.
    """
    shards: dict[str, Tensor] = {}

    def take(place: Any, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        name = keystr(place)
        shards[name] = value
        return {PLACE: name}

    rest = tree_map_with_path(take, content)
    (token, *_) = gather_objects(secrets.token_hex(8))
    folder = path.with_name(f".{path.name}.{token}.tmp")
    try:
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            save(shards, checkpoint_id=folder)
            own = {file.name: _sha256(file) for file in folder.glob(f"__{get_rank()}_*")}
    except CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        cause = _cause(error)
        reason = str(cause.__context__ or cause).splitlines()[0]
        raise OutputError(f"cannot write {path} ({reason}): is the disk full, or the folder read-only?") from error
    files = {name: digest for each in gather_objects(own) for name, digest in each.items()}
    if is_main():
        with writing(path):
            files[SHARDS] = _sha256(folder / SHARDS)
            save_atomic({"content": rest, "files": files}, folder / REST)
            twins = [(other, other.with_name(f".{other.name}.{token}.tmp")) for other in others]
            for _, twin in twins:
                shutil.copytree(folder, twin, copy_function=_link)
            for place, new in ((path, folder), *twins):
                replace_folder(place, new)
    barrier()


def _link(file: str, other: str) -> None:
    """One file under two names, which nobody changes later; a copy where the file system knows no such thing."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)


def read_rest(source: str | os.PathLike[str]) -> Any:
    """What a folder holds but for its divided tensors.

    Raises:
        CheckpointError: no such folder, or a damaged one.
    """
    return _read_rest(existing_folder(source))["content"]


def load_sharded(source: str | os.PathLike[str], mesh: DeviceMesh | None) -> Any:
    """Content of a folder; call it on every rank.

    Args:
        mesh: what the divided tensors are divided among, whoever wrote them; None gives them whole, on the CPU.

    Raises:
        CheckpointError: no such folder, or a damaged one, naming the file.
    """
    folder = existing_folder(source)
    saved = _read_rest(folder)
    rank, ranks = (0, 1) if mesh is None else (get_rank(), get_world_size())
    files = saved["files"]
    damaged = [name for name in sorted(files)[rank::ranks] if _damaged(folder / name, files[name])]
    for name in next(filter(None, gather_objects(damaged) if mesh else [damaged]), ()):
        raise CheckpointError(f"{folder / name} is missing or damaged: its SHA-256 is not the one it was written with")
    with naming(folder, "cannot be read"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
        reader = _Reader(folder)
        metadata = reader.read_metadata()
        known: Any = metadata.state_dict_metadata
        if strange := [name for name, about in known.items() if not isinstance(about, TensorStorageMetadata)]:
            raise TypeError(f"it holds {strange[0]}, which is no tensor")
        if foreign := {part.relative_path for part in metadata.storage_data.values()} - files.keys():
            raise ValueError(f"it reads {min(foreign)}, which is no file of it")
        for name, about in known.items():
            if sum(part.sizes.numel() for part in about.chunks) < about.size.numel():
                raise ValueError(f"the parts of {name} are not the whole")
        size = sum(each.size.numel() * each.properties.dtype.itemsize for each in known.values())
        if size > sum((folder / name).stat().st_size for name in files):
            raise ValueError(f"its tensors would take {size} bytes, more than it has")
        shards = {name: _room(known[name], mesh) for name in known}
        try:
            load(shards, storage_reader=reader, no_dist=mesh is None)
        except CheckpointException as error:  # torch's, which is no Exception
            raise _cause(error) from error
        return tree_map(
            lambda value: shards[value[PLACE]] if _is_place(value) else value, saved["content"], is_leaf=_is_place
        )


def _cause(error: CheckpointException) -> Exception:
    """What the first rank that failed says."""
    failure = next(iter(error.failures.values()))[0]
    return failure if isinstance(failure, Exception) else RuntimeError(str(failure))


def _is_place(value: Any) -> bool:
    return isinstance(value, Mapping) and PLACE in value


def _room(about: TensorStorageMetadata, mesh: DeviceMesh | None) -> Tensor:
    """A tensor to read into."""
    if mesh is None:
        return torch.zeros(about.size, dtype=about.properties.dtype)
    placement = Shard(0) if about.size else Replicate()
    return zero_dtensor(about.size, dtype=about.properties.dtype, device_mesh=mesh, placements=[placement])


def _read_rest(folder: Path) -> Any:
    saved = load_safely(folder / REST)
    files = saved.get("files") if isinstance(saved, Mapping) and "content" in saved else None
    if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files):
        raise CheckpointError(f"{folder / REST}: expected the rest of a checkpoint of a run with --fsdp")
    return saved


def _damaged(path: Path, digest: str) -> bool:
    return not path.is_file() or _sha256(path) != digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Reader(FileSystemReader):
    """torch's, which unpickles the list of tensors whatever it names; here it names what such a list is made of."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        del args, options
        with open(Path(self.path) / SHARDS, "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        own = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        plain = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
        found = super().find_class(module, name) if module in (*own, "torch") or (module, name) in plain else None
        if (module in own and isinstance(found, type)) or isinstance(found, torch.dtype) or (module, name) in plain:
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no list of tensors does")
