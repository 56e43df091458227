"""What is measured for the claims of ``tables/claims.toml``: one network for four widths, of Fashion-MNIST.

Every network is a plain DeiT without external teacher, trained by ``main_scala.py`` through its ordinary flags, for as
many epochs, on the same images in the same order, and evaluated at r = 0.25, 0.5, 0.75 and 1:

- separate: a network of each width by itself;
- sliced: the separate network of full width, cut afterwards;
- scala: one network, the paper's defaults with X = 4;
- slimmable: one network as in universally slimmable training: the full width teaches all others, they see no labels,
  and every width leads (no isolated activation, no progressive transfer, no noise calibration).

At X = 4 a step draws 0.5 and 0.75 always, so stable sampling makes no difference. MACs are those of fvcore's
convention, as the paper counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.ledger.evidence import Arms, Job, Run
from scala import export, main_scala

RATIOS = (0.25, 0.5, 0.75, 1.0)
WIDTH, EPOCHS = 96, 9
NETWORK = "--model deit_tiny_patch16_224_scala --input-size 32 --patch-size 8 --num-heads 4 --depth 2"
DATA = "--data-set fashion --workers 0"
RECIPE = (
    "--batch-size 50 --unscale-lr --warmup-epochs 0 --clip-grad 1 --no-model-ema --aa none "
    "--color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --crop-padding 0 --smoothing 0 --drop-path 0"
)
"""Without the random crop: in a few epochs, networks of so few patches do not learn to do without their places. Without
smoothing, which only the largest width of Scala has."""
RATES = {0.25: 4e-3, 0.5: 2e-3, 0.75: 4e-3, 1.0: 2e-3}
"""Peak learning rates of the separate networks: of 2e-3 and 4e-3 the one with the better mean over two other seeds on
``fashion_tune``. Scala and slimmable training had the same choice, by the mean of their widths, and both took 4e-3."""
JOINT = f"--embed-dim {WIDTH} --granularity 0.25 --full_warm_epoch 1 --lr 4e-3"
"""One network for all widths; the paper's full width has a tenth of the epochs to itself, too."""
SLIMMABLE = "--transfer_type US --ce_coefficient 0 --no-isolated-activation"
LIVE_EPOCHS = 3


def call(
    job: Job, name: str, words: str, *, epochs: int | None = EPOCHS, data: str = DATA
) -> Sequence[Mapping[str, Any]]:
    """A row per width, of a training run into the folder ``name``; ``epochs`` None is for what trains nothing."""
    training = f"{RECIPE} --epochs {epochs} --output_dir {job.folder / name}" if epochs else ""
    line = f"{NETWORK} {data} {training} {words} --seed {job.seed} --device {job.device}"
    return main_scala.main(line.split())["widths"]


def arms(family: str, rows: Sequence[Mapping[str, Any]]) -> Arms:
    """``family: r = 0.25`` and so on."""
    return {
        f"{family}: r = {row['ratio']:g}": {"top1_percent": row["top1_percent"], "mmacs": 1e3 * row["gmacs"]}
        for row in rows
    }


def train_separate(job: Job, *, epochs: int = EPOCHS, data: str = DATA) -> Arms:
    """A network of each width."""
    rows = []
    for ratio in RATIOS:
        words = f"--embed-dim {int(ratio * WIDTH)} --full_warm_epoch {epochs} --lr {RATES[ratio]:g}"
        (row,) = call(job, f"separate-{ratio:g}", words, epochs=epochs, data=data)
        rows.append({**row, "ratio": ratio})
    return arms("separate", rows)


def slice_plain(job: Job, *, data: str = DATA) -> Arms:
    """The separate network of full width at the others."""
    ratios = " ".join(f"{ratio:g}" for ratio in RATIOS)
    words = f"--eval --resume {job.folder / 'separate-1' / 'checkpoint.pth'} --allow-untrained --eval_ratio {ratios}"
    return arms("sliced", call(job, "sliced", f"--embed-dim {WIDTH} {words}", epochs=None, data=data))


def train_scala(job: Job, *, epochs: int = EPOCHS, data: str = DATA) -> Arms:
    """The method as published, at this size."""
    return arms("scala", call(job, "scala", JOINT, epochs=epochs, data=data))


def train_slimmable(job: Job, *, epochs: int = EPOCHS, data: str = DATA) -> Arms:
    """The same without isolated activation, progressive transfer and noise calibration."""
    return arms("slimmable", call(job, "slimmable", f"{JOINT} {SLIMMABLE}", epochs=epochs, data=data))


def measure_live(job: Job, *, epochs: int = LIVE_EPOCHS, data: str = DATA) -> Arms:
    """Train all widths shortly, evaluate each from the checkpoint, and export one; each by its own program."""
    folder, joint = job.folder / "live", JOINT.replace("--full_warm_epoch 1", "--full_warm_epoch 0")
    call(job, "live", joint, epochs=epochs, data=data)
    checkpoint = str(folder / "checkpoint.pth")
    rows = call(job, "live", f"--eval --resume {checkpoint} --eval_ratio all", epochs=None, data=data)
    export.main(
        ["--checkpoint", checkpoint, "--ratio", "0.5", "--output", str(folder / "half.safetensors"), "--torch-export"]
    )
    return {f"live: {name.partition(': ')[2]}": values for name, values in arms("live", rows).items()}


COMMON = f"{NETWORK} {DATA} {RECIPE} --epochs {EPOCHS}"
RUNS = {
    "separate": Run(f"{COMMON} --embed-dim {WIDTH} times the ratios of {RATES}", train_separate),
    "sliced": Run(f"{COMMON} --embed-dim {WIDTH} --lr {RATES[1.0]:g} at {RATIOS}", slice_plain),
    "scala": Run(f"{COMMON} {JOINT}", train_scala),
    "slimmable": Run(f"{COMMON} {JOINT} {SLIMMABLE}", train_slimmable),
    "live": Run(f"{NETWORK} {DATA} {RECIPE} {JOINT} without --full_warm_epoch, --epochs {LIVE_EPOCHS}", measure_live),
}
