"""A generated miniature ImageNet, shared by the tests of a process."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_pictures(root: Path, *, splits: dict[str, int], classes: int = 2, side: int = 40) -> Path:
    """Class folders of noisy pictures whose brightness tells the class."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (side, side, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 2 x 8 pictures and val/ with 2 x 3, of 40 pixels."""
    return write_pictures(tmp_path_factory.mktemp("imagenet"), splits={"train": 8, "val": 3})
