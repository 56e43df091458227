"""What the papers' adapters to the ledger share: running a paper's program, and finding the weights of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.ledger.desk import quiet
from common.ledger.tables import NeedsWeights


def run_program(main: Callable[[list[str]], Any], words: Sequence[str], *, progress: bool = True) -> Any:
    """What a program's ``main`` returns; standard output stays free, which may be JSON, and without progress both do.

    Raises:
        RuntimeError: it ended by its command line; the other rows must not be lost.
    """
    with quiet(not progress):
        try:
            return main(list(words))
        except SystemExit as error:
            raise RuntimeError(str(error.code)) from error


def find_weights(files: Sequence[str], folder: Path | None, *, said: str = "") -> Path:
    """The first of ``files`` that is in ``folder``, the value of ``--weights``.

    Raises:
        NeedsWeights: naming the files looked for, as ``said`` if given.
    """
    if folder is not None:
        for path in (folder / file for file in files):
            if path.is_file():
                return path
    raise NeedsWeights(reason=f"{said or ' or '.join(files)} in {folder or 'a folder'} (--weights DIR)")
