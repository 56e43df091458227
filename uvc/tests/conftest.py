"""A miniature ImageNet, and a dense network for it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from uvc.models import create

OWN = ("gating", "gumbel", "mask")


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """``data``: train/ and val/ with two classes, dark and bright. ``dense``: weights of ``deit_desk`` for them."""
    root = tmp_path_factory.mktemp("material")
    draw = np.random.default_rng(0)
    for split, number in (("train", 24), ("val", 11)):
        for i in range(number):
            path = Path(root, "data", split, f"n{i % 2:02d}", f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 120, (40, 48, 3)) + (i % 2) * 100
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    torch.manual_seed(0)
    state = create("deit_desk", num_classes=2).state_dict()
    plain = {key: value for key, value in state.items() if not any(word in key for word in OWN)}
    torch.save({"model": plain}, root / "dense.pth")
    return SimpleNamespace(root=root, data=str(root / "data"), dense=str(root / "dense.pth"))
