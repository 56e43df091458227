"""Whether a data set has its folder, said before anything heavy is imported, and the split that is asked for."""

from pathlib import Path

from common.run.cli import dataset_name
from common.run.errors import DataError

INSIDE = ("digits", "fashion", "fashion_tune")
"""Data sets that ship inside scikit-learn or this repository; a folder given besides is not read."""
FETCHED = ("hfds/", "hfids/", "tfds/", "torch/", "wds/")
"""Beginnings of timm's names, whose libraries find the data."""


def reads_folder(data_set: str, data_path: str | Path | None = None) -> bool:
    """Whether a data set is read from a folder that the user names; ``fashion_full`` is if one is given."""
    name = dataset_name(data_set)
    return bool(data_path) if name == "fashion_full" else not (name in INSIDE or name.lower().startswith(FETCHED))


def check_split(name: str, split: str) -> None:
    """Refuse a split that a data set of training and held-out images has not.

    Raises:
        DataError: naming those that it has.
    """
    if split not in ("train", "val"):
        raise DataError(f"{name} has the splits train and val, not {split!r}")


def existing_folder(name: str, root: str | Path | None) -> Path:
    """``root`` as a path.

    Raises:
        DataError: it is not given, or does not exist; the message says what is there instead.
    """
    if root is None or not str(root):
        raise DataError(f"dataset {name!r} needs a data directory: give DIR (--data-path DIR)")
    path = Path(root).expanduser()
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise DataError(f"data directory {path} is a pipe or a device: give a folder")
    if not path.exists():
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        raise DataError(f"data directory {path} does not exist; the nearest that does, {parent}, {contents(parent)}")
    return path


def check_data_path(data_set: str, data_path: str | Path | None) -> None:
    """Raise what opening the data set would, if it needs a folder and there is none; for ``main``, after parsing."""
    if reads_folder(data_set, data_path):
        existing_folder(data_set, data_path)


def contents(folder: Path, limit: int = 12) -> str:
    """What a folder holds, as the end of a sentence."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"holds {', '.join(names[:limit])}{more}" if names else "is empty"
