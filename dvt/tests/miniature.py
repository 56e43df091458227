"""A miniature ImageNet, and networks small enough to be trained in a test."""

from pathlib import Path

import numpy as np
from PIL import Image

from dvt.models import PATCHES, SUFFIXES, Entry

SMALL_T2T = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "token_dim": 4}
SMALL_DEIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0}
SMALL_MODELS = {
    "DVT_T2t_vit_12": Entry("t2t", SMALL_T2T, tuple({"tokens_type": f"performer{end}"} for end in SUFFIXES)),
    "DVT_Deit_small": Entry("deit", SMALL_DEIT, tuple({"patch_size": patch} for patch in PATCHES)),
    "T2t_vit_7": Entry("t2t", {**SMALL_T2T, "tokens_type": "performer"}),
}
"""Published names of networks with the published grids and few channels."""


def write_imagenet(root: Path, *, classes: int = 6, train: int = 4, val: int = 2, size: int = 48) -> Path:
    """Folders train/ and val/ of JPEGs, whose colour tells the class."""
    random = np.random.RandomState(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(classes):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            colour = 255 * np.array([number % 3 == 0, number % 2 == 0, number / classes])
            for image in range(count):
                pixels = 0.6 * colour + 0.4 * random.randint(0, 256, (size, size + 8, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}_{image}.JPEG")
    return root
