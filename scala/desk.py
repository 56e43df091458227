"""The paper's first table at desk size: one small DeiT for all widths, on real handwritten digits.

Every network is trained by ``main_scala.py`` through its ordinary flags and evaluated at r = 0.25, 0.5, 0.75 and 1.0 on
the 360 held-out images of the 1,797 that ship inside scikit-learn:

- separate training: a network of each width by itself, the paper's baseline;
- sliced without Scala: the one trained at full width alone, cut afterwards;
- Scala with 4 widths (X = 4): one network, four passes per step.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from common.ledger.desk import quiet
from common.ledger.tables import DeskTable
from scala import main_scala
from scala.models_scala import create
from scala.sweep import costs

RATIOS = (0.25, 0.5, 0.75, 1.0)
EPOCHS = 36
WIDTH, HEADS, DEPTH = 128, 4, 2
NETWORK = (
    f"--model deit_tiny_patch16_224_scala --data-set digits --input-size 32 --patch-size 8 --num-heads {HEADS} "
    f"--depth {DEPTH} --workers 1"
)
RECIPE = (
    f"--epochs {EPOCHS} --batch-size 32 --lr 2e-3 --unscale-lr --warmup-epochs 3 --clip-grad 1 --weight-decay 0.05 "
    "--no-model-ema --no-repeated-aug --aa none --color-jitter 0 --hflip 0 --reprob 0 --mixup 0 --cutmix 0 "
    "--smoothing 0.1 --drop-path 0 --seed 0"
)
SEPARATE, SLICED, SCALA = "separate training", "sliced without Scala", "Scala, X = 4"
NETWORKS = {SEPARATE: 4, SLICED: 1, SCALA: 1}
"""Name of a row -> how many networks its four widths take."""


def run(folder: Path, *, device: torch.device | str, force: bool, progress: bool) -> DeskTable:
    """Train the five networks, evaluate every width.

    Args:
        folder: where the trained networks go, each anew.
        device: cpu or cuda.
        force: unused; the table itself is kept by the ledger.
        progress: say what is being trained.
    """
    del force

    def call(name: str, words: str, *more: str) -> dict[float, float]:
        """Top-1 in percent per width that the program evaluated."""
        if progress:
            print(name, file=sys.stderr, flush=True)
        with quiet(True):
            rows = main_scala.main([*f"{NETWORK} {words} --device {device}".split(), *more])["widths"]
        return {row["ratio"]: row["top1_percent"] for row in rows}

    top1: dict[str, dict[float, float]] = {SEPARATE: {}}
    for ratio in RATIOS:
        words = f"{RECIPE} --embed-dim {int(ratio * WIDTH)} --full_warm_epoch {EPOCHS}"
        found = call(f"{SEPARATE} at width {ratio:g}", words, "--output_dir", str(folder / f"separate-{ratio:g}"))
        top1[SEPARATE][ratio] = found[1.0]
    ratios = " ".join(f"{ratio:g}" for ratio in RATIOS)
    words = f"--embed-dim {WIDTH} --eval --allow-untrained --eval_ratio {ratios}"
    top1[SLICED] = call(SLICED, words, "--resume", str(folder / "separate-1" / "checkpoint.pth"))
    words = f"{RECIPE} --embed-dim {WIDTH} --granularity 0.25 --full_warm_epoch {EPOCHS // 10}"
    top1[SCALA] = call(SCALA, words, "--output_dir", str(folder / "scala-x4"))
    return make_table(top1)


def make_table(top1: Mapping[str, Mapping[float, float]]) -> DeskTable:
    """A row per way to get networks of four widths, from top-1 in percent by row and width."""
    with torch.device("meta"):
        network = create(
            "deit_tiny_patch16_224_scala", img_size=32, patch_size=8, embed_dim=WIDTH, num_heads=HEADS, depth=DEPTH,
            num_classes=10,
        )  # fmt: skip
        mmacs = ", ".join(f"{1e3 * costs(network, ratio)['gmacs']:.2f}" for ratio in RATIOS)
    columns = {ratio: f"r_{ratio:.2f}" for ratio in RATIOS}
    gains = ", ".join(f"{top1[SCALA][ratio] - top1[SEPARATE][ratio]:+.1f}" for ratio in RATIOS)
    return DeskTable(
        title="One network at four widths, at desk size (1,797 handwritten digits)",
        columns=("method", "networks", *columns.values()),
        rows=[
            {"method": name, "networks": count} | {columns[ratio]: round(top1[name][ratio], 2) for ratio in RATIOS}
            for name, count in NETWORKS.items()
        ],
        notes=(
            f"Top-1 in percent at four width ratios: a plain DeiT of {DEPTH} blocks, width {WIDTH}, {HEADS} heads and "
            f"16 patches, trained for {EPOCHS} epochs on 1,437 digits, evaluated on the 360 others. One image is "
            "0.28 points, and one seed was trained.",
            f"Millions of MACs per image at these widths: {mmacs}.",
            f"Gain of {SCALA} over separate training, in points: {gains}. A step of Scala passes every image four "
            "times; all networks saw the same number of epochs, as in the paper.",
        ),
    )
