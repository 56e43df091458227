"""Whether a data folder is there, said before anything heavy is imported."""

from pathlib import Path

from common.run.errors import DataError

ROOTLESS = ("digits", "hfds/", "hfids/", "tfds/", "torch/", "wds/")
"""Data sets that need no folder, by the beginning of their names."""


def existing_folder(name: str, root: str | Path | None) -> Path:
    """``root`` as a path.

    Raises:
        DataError: it is not given, or does not exist; the message says what is there instead.
    """
    if root is None or not str(root):
        raise DataError(f"dataset {name!r} needs a data directory: give DIR (--data-path DIR)")
    path = Path(root).expanduser()
    if not path.exists():
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        raise DataError(f"data directory {path} does not exist; the nearest that does, {parent}, {contents(parent)}")
    return path


def check_data_path(data_set: str, data_path: str | Path | None) -> None:
    """Raise what opening the data set would, if it needs a folder and there is none; for ``main``, after parsing."""
    name = data_set.lower()
    if not name.startswith(ROOTLESS):
        existing_folder(data_set, data_path)


def contents(folder: Path, limit: int = 12) -> str:
    """What a folder holds, as the end of a sentence."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"holds {', '.join(names[:limit])}{more}" if names else "is empty"
