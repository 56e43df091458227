"""The paper's comparison at desk size, on real handwritten digits: slimmed students, with distillation and without.

A small LV-ViT is trained as the teacher. Students at two keeping ratios start from it, with feature recalibration
distillation and on labels alone, and are also trained from scratch for as many epochs as the teacher. Everything runs
through ``main.py`` and its ordinary flags on the 1,797 digits that ship inside scikit-learn. Speeds are measured in
turns on the deployed networks, so that the ratios of one run are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common.data.loaders import eval_transform
from common.ledger.desk import held_out_digits, sha256_of, speed_cells, train_once
from common.ledger.tables import DeskTable
from common.measure.benchmark import compare, device_name
from common.measure.flops import gmacs
from sit import main
from sit.loading import load_for_evaluation, read_weights
from sit.models import LVViT
from sit.models.lvvit import build_lvvit, count_ops

TEACHER_EPOCHS, STUDENT_EPOCHS = 24, 8
EXPECTED_PERCENT = 90
RATIOS = ("0.7", "0.5")
COMMON = (
    "--model sit_lvvit_desk --data-set digits --input-size 32 --batch-size 32 --num_workers 0 --no-repeated-aug "
    "--hflip 0 --aa= --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --cooldown-epochs 0 --no-scale-lr "
    "--clip-grad 1 --drop-path 0 --print-freq 0"
)
SCRATCH = f"--epochs {TEACHER_EPOCHS} --lr 2e-3 --linear-warmup 3"
STUDENT = f"--epochs {STUDENT_EPOCHS} --lr 5e-4"
TAUGHT = "--teacher-model sit_lvvit_desk"
UNTAUGHT = "--lambda-token 0 --lambda-logits 0"
BATCH = {"cpu": 64, "cuda": 1024}
WARMUP, ROUNDS = 3, 25
COLUMNS = (
    "method", "keeping_ratio", "tokens", "training", "top1_percent", "mmacs", "throughput_ips", "speedup",
    "flops_ratio", "realised",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One network: how it is trained, and how it is called in the table."""

    name: str
    method: str
    training: str
    words: str
    ratio: str = ""
    taught: bool = False
    """starts from the teacher"""


RUNS = (
    Run("teacher", "LV-ViT (teacher)", f"labels, {TEACHER_EPOCHS} epochs", f"--distillation-type none {SCRATCH}"),
    *(
        Run(f"{name}-{ratio}", "SiT", training, f"--keeping-ratio {ratio} {words}", ratio, taught)
        for ratio in RATIOS
        for name, training, words, taught in (
            ("frd", f"from the teacher, FRD, {STUDENT_EPOCHS} epochs", f"{STUDENT} {TAUGHT}", True),
            ("labels", f"from the teacher, labels alone, {STUDENT_EPOCHS} epochs", f"{STUDENT} {UNTAUGHT}", True),
            ("scratch", f"from scratch, labels, {TEACHER_EPOCHS} epochs", f"{SCRATCH} {UNTAUGHT}", False),
        )
    ),
)


def run(folder: Path, *, device: torch.device | str, force: bool, progress: bool) -> DeskTable:
    """Train every network once, evaluate and time it.

    Args:
        folder: where the trained networks are kept.
        device: cpu or cuda.
        force: train again although nothing changed.
        progress: print what the trainer prints, and a bar.
    """
    device = torch.device(device)
    top1: dict[str, float] = {}
    for job in tqdm(RUNS, desc="desk", delay=2, leave=False, disable=not progress):
        top1[job.name] = train(job, folder, device, force=force, progress=progress)
    networks = {job.name: deployed(job, folder).to(device) for job in RUNS}
    images = held_out_digits(eval_transform(32), BATCH[device.type]).to(device)
    dense = RUNS[0].name
    timed = {job.name: networks[job.name] for job in RUNS if job.name == dense or job.name.startswith("frd")}
    label = "speed" if progress else None
    speeds = compare(timed, images, baseline=dense, warmup=WARMUP, rounds=ROUNDS, progress=label)
    cost = {name: gmacs(count_ops(network)) for name, network in networks.items()}
    rows = []
    for job in RUNS:
        same = f"frd-{job.ratio}" if job.ratio else dense  # networks of one ratio are equally fast
        network = networks[job.name]
        tokens = network.keeped_patches if network.slimmed else [network.num_patches]
        rows.append(
            {
                "method": job.method,
                "keeping_ratio": job.ratio,
                "tokens": " ".join(map(str, tokens)),
                "training": job.training,
                "top1_percent": round(top1[job.name], 2),
                "mmacs": round(1e3 * cost[job.name], 2),
                **speed_cells(speeds[same], cost[dense] / cost[job.name]),
            }
        )
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return DeskTable(
        title="Slimmed students of a small LV-ViT, at desk size (1,797 handwritten digits)",
        columns=COLUMNS,
        rows=rows,
        notes=(
            "sit_lvvit_desk: 8 blocks in four stages, width 64, 8x8 tokens of 32x32 images; trained on 1,437 digits "
            "and evaluated on the 360 others. One image is 0.28 points, one training each: differences of less than "
            "about a point say nothing.",
            "FRD: feature recalibration distillation, the paper's training; labels alone: the same start, weights of "
            "both distillation terms 0; from scratch: no teacher at all, as many epochs as the teacher had.",
            f"Throughput on {device_name(device)}{threads}, float32, batch {BATCH[device.type]}, median of {ROUNDS} "
            "rounds in turns, deployed networks, measured once per keeping ratio. speedup: paired, over the teacher; "
            "flops_ratio: what the counted products promise; realised: the first over the second. mmacs: plain "
            "multiply-accumulates, in millions per image.",
        ),
        plot={"x": "mmacs", "y": "top1_percent", "label": "keeping_ratio", "series": "training"},
    )


def words_of(job: Run, folder: Path) -> list[str]:
    """The command line of ``main.py`` for a network."""
    words = [*COMMON.split(), *job.words.split(), "--output_dir", str(folder / job.name)]
    if job.taught:
        teacher = str(folder / "teacher" / "checkpoint.pth")
        words += ["--finetune", teacher, "--teacher-path", teacher]
    return words


def train(job: Run, folder: Path, device: torch.device, *, force: bool, progress: bool) -> float:
    """Top-1 in percent after training, which is done anew only if the code, the versions or the file changed.

    Raises:
        RuntimeError: if the teacher does not reach ``EXPECTED_PERCENT`` on the held-out digits.
    """
    start = sha256_of(folder / "teacher" / "checkpoint.pth") if job.taught else ""
    return train_once(
        ["sit", job.name, job.words, start, str(device)],
        lambda: main.main([*words_of(job, folder), "--device", str(device)])["test_acc1"],
        folder / job.name / "checkpoint.pth",
        force=force,
        progress=progress,
        at_least=EXPECTED_PERCENT if job.name == "teacher" else 0,
        folder=folder,
    )


def deployed(job: Run, folder: Path) -> LVViT:
    """A trained network as it is used: logits only."""
    args = main.parse_args(words_of(job, folder))
    options = {"keeping_ratio": args.keeping_ratio} if args.keeping_ratio else {}
    model = build_lvvit(args.model, num_classes=10, distillation_type=args.distillation_type, **options)
    load_for_evaluation(model, read_weights(folder / job.name / "checkpoint.pth"))
    return model.deployed()
