"""What several tests of SiT need: a miniature ImageNet, small flags, and the words of a script."""

import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from common.run.files import ROOT

SMALL = [
    "--model", "sit_lvvit_desk", "--teacher-model", "sit_lvvit_desk", "--input-size", "32", "--batch-size", "4",
    "--num_workers", "0", "--no-repeated-aug", "--device", "cpu", "--epochs", "1", "--cooldown-epochs", "0",
    "--min-lr", "1e-6", "--lr", "1e-3", "--num-classes", "3",
]  # fmt: skip
"""Flags behind those of a script, so that it runs in seconds."""

SCRIPTS = sorted((ROOT / "sit" / "exp").glob("*/*.sh"))


def miniature_imagenet(folder: Path, *, train: int = 6, val: int = 3, size: tuple[int, int] = (36, 44)) -> Path:
    """Class folders of noise with a colour of its own: ``train`` and ``val`` images in each of three classes."""
    noise = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for label, name in enumerate(("n01", "n02", "n03")):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(number):
                pixels = noise.integers(0, 128, (*size, 3), dtype=np.uint8)
                pixels[..., label] += 96
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def words_of(script: Path, environment: dict[str, str], *more: str) -> list[str]:
    """The words that a script passes to sit/main.py, printed by a PYTHON that only echoes."""
    done = subprocess.run(
        ["bash", str(script), *more],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "echo", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    return words[words.index("sit/main.py") + 1 :]
