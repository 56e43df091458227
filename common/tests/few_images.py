"""A part of the images that ship inside, for tests of programs that read ``fashion``."""

from pathlib import Path

import numpy as np
import pytest

from common.data import memory


def few_images(patch: pytest.MonkeyPatch, folder: Path, *, train: slice, val: slice) -> None:
    """Let ``fashion`` be these of its images, written into a folder."""
    with np.load(memory.FASHION) as content:
        chosen = {"train": train, "val": val}
        few = {name: values[chosen[name.partition("_")[0]]] for name, values in content.items()}
    np.savez(folder / "few.npz", **few)
    patch.setattr(memory, "FASHION", folder / "few.npz")
