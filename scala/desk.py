"""The paper's first table at desk size: one small DeiT for all widths, on real handwritten digits.

Every network is trained by ``main_scala.py`` through its ordinary flags and evaluated at r = 0.25, 0.5, 0.75 and 1.0 on
the 360 held-out images of the 1,797 that ship inside scikit-learn:

- separate training: a network of each width by itself, the paper's baseline;
- sliced without Scala: the one trained at full width alone, cut afterwards;
- Scala with 4 widths (X = 4): one network, four passes per step.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from common.ledger.tables import DeskTable
from scala import main_scala
from scala.models_scala import VisionTransformer_scala, create
from scala.sweep import costs

RATIOS = (0.25, 0.5, 0.75, 1.0)
EPOCHS = 36
WIDTH, HEADS, DEPTH = 128, 4, 2
NETWORK = (
    f"--model deit_tiny_patch16_224_scala --data-set digits --input-size 32 --patch-size 8 --num-heads {HEADS} "
    f"--depth {DEPTH} --workers 1"
)
RECIPE = (
    "--batch-size 32 --lr 2e-3 --unscale-lr --warmup-epochs 3 --clip-grad 1 --weight-decay 0.05 "
    "--no-model-ema --no-repeated-aug --aa none --color-jitter 0 --hflip 0 --reprob 0 --mixup 0 --cutmix 0 "
    "--smoothing 0.1 --drop-path 0 --seed 0"
)
SCALA = {"Scala, X = 4": 0.25}
"""Name of a row -> granularity."""


def run(folder: Path | None, *, device: torch.device | str, force: bool, progress: bool) -> DeskTable:
    """Train the five networks, evaluate every width.

    Args:
        folder, force: unused; nothing is kept between runs but the table itself, by the ledger.
        device: cpu or cuda.
        progress: say what is being trained.
    """
    del folder, force
    top1: dict[tuple[str, float], float] = {}
    with tempfile.TemporaryDirectory() as kept:
        for ratio in RATIOS:
            _say(f"separate training at width {ratio:g}", progress)
            words = f"--embed-dim {int(ratio * WIDTH)} --full_warm_epoch {EPOCHS} --output_dir {kept}/{ratio:g}"
            top1["separate training", ratio] = _train(words, device)[1.0]
        top1 |= {("sliced without Scala", ratio): value for ratio, value in _slice(f"{kept}/1", device).items()}
    for name, granularity in SCALA.items():
        _say(f"{name}: one network for all widths", progress)
        words = f"--embed-dim {WIDTH} --granularity {granularity} --full_warm_epoch {EPOCHS // 10}"
        found = _train(words, device)
        top1 |= {(name, ratio): found[ratio] for ratio in RATIOS}
    return _table(top1)


def _train(words: str, device: torch.device | str) -> dict[float, float]:
    """Top-1 in percent per trained width."""
    return _call(f"{NETWORK} {RECIPE} --epochs {EPOCHS} {words}", device)


def _slice(folder: str, device: torch.device | str) -> dict[float, float]:
    """Top-1 per width of a network that was trained at full width alone."""
    ratios = " ".join(f"{ratio:g}" for ratio in RATIOS)
    words = f"--eval --resume {folder}/checkpoint.pth --allow-untrained --eval_ratio {ratios}"
    return _call(f"{NETWORK} --embed-dim {WIDTH} {words}", device)


def _call(words: str, device: torch.device | str) -> dict[float, float]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        rows = main_scala.main([*words.split(), "--device", str(device)])["widths"]
    return {row["ratio"]: row["top1_percent"] for row in rows}


def _table(top1: Mapping[tuple[str, float], float]) -> DeskTable:
    """A row per way to get networks of four widths."""
    with torch.device("meta"):
        mmacs = {ratio: 1e3 * costs(_network(), ratio)["gmacs"] for ratio in RATIOS}
    names = {"separate training": 4, "sliced without Scala": 1, **dict.fromkeys(SCALA, 1)}
    rows = [
        {"method": name, "networks": count, **{_column(ratio): round(top1[name, ratio], 2) for ratio in RATIOS}}
        for name, count in names.items()
    ]
    best = max(SCALA, key=lambda name: sum(top1[name, ratio] for ratio in RATIOS))
    gains = ", ".join(f"{top1[best, ratio] - top1['separate training', ratio]:+.1f}" for ratio in RATIOS)
    return DeskTable(
        title="One network at four widths, at desk size (1,797 handwritten digits)",
        columns=("method", "networks", *(_column(ratio) for ratio in RATIOS)),
        rows=rows,
        notes=(
            f"Top-1 in percent at four width ratios: a plain DeiT of {DEPTH} blocks, width {WIDTH}, {HEADS} heads and "
            f"16 patches, trained for {EPOCHS} epochs on 1,437 digits, evaluated on the 360 others. One image is "
            "0.28 points, and one seed was trained.",
            f"Millions of MACs per image at these widths: {', '.join(f'{value:.2f}' for value in mmacs.values())}.",
            f"Gain of {best} over separate training, in points: {gains}. A step of Scala passes every image four "
            "times; all networks saw the same number of epochs, as in the paper.",
        ),
    )


def _column(ratio: float) -> str:
    return f"r_{ratio:.2f}"


def _network() -> VisionTransformer_scala:
    return create(
        "deit_tiny_patch16_224_scala", img_size=32, patch_size=8, embed_dim=WIDTH, num_heads=HEADS, depth=DEPTH,
        num_classes=10,
    )  # fmt: skip


def _say(text: str, progress: bool) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)
