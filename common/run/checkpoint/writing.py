"""Writing checkpoints: plain values only, and whole files only."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.run.checkpoint.sealing import seal, unsealed_entry
from common.run.files import replacing


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

    The file holds a checksum, see ``common.run.checkpoint.sealing``.

    Call it on one rank only.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    content = plain(obj)
    outer = sys.exc_info()[1]
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of torch's writer, which fails again when it ends after an error, or a signal's
            first = error.__context__
            if first is None or first is outer:
                raise OSError(str(error).partition("\n")[0]) from error
            raise first from None
        seal(file)
    return path


def save_described(path: Path, state: Mapping[str, Tensor], key: str, description: str) -> None:
    """Write weights as safetensors with a checksum and a JSON description under ``key`` of the header, see
    ``read_description``.
    """
    from safetensors.torch import save  # only where such a file is written

    with replacing(path) as file:
        file.write(save(dict(state), metadata={"format": "pt", key: description, **unsealed_entry()}))
        seal(file)
