"""What is measured for the claims of ``tables/claims.toml``: slimmed students of one small LV-ViT, on Fashion-MNIST.

``main.py`` trains the network without slimming once per seed. At each keeping ratio three students start from its
weights and see the same images in the same order for as many epochs; they differ in what they learn from: labels,
labels and the teacher's logits, or both and its tokens (FRD). Cost is what a deployed network executes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from common.ledger.evidence import Arms, Job, Run
from common.measure.flops import count_operations, gmacs
from sit import export, main
from sit.models.lvvit import build_lvvit
from sit.sizes import SIZES

MODEL = "sit_lvvit_mini"
COMMON = (
    f"--model {MODEL} --teacher-model {MODEL} --data-set fashion --input-size 32 --batch-size 128 --num_workers 0 "
    "--no-repeated-aug --aa= --color-jitter 0 --reprob 0 --cooldown-epochs 0 --no-scale-lr --clip-grad 1 --drop-path 0 "
    "--print-freq 0"
)
TEACHER = "--distillation-type none --mixup 0 --cutmix 0 --epochs 8 --lr 3e-3 --linear-warmup 1"
STUDENT = "--mixup 0 --cutmix 0 --epochs 2 --lr 1e-3"
RATIOS = (0.7, 0.5)
LEARNT: Mapping[str, str] = {
    "labels": "--lambda-token 0 --lambda-logits 0",
    "logits": "--lambda-token 0",
    "FRD": "",
}
"""What a student learns from -> flags of ``main.py``; the weights of the losses that stay are the published ones."""

LIVE_TEACHER, LIVE_STUDENT, LIVE_RATIO = "--epochs 3", "--epochs 2", 0.5


def folder_of(job: Job, name: str) -> Path:
    """Where a network of a seed is kept."""
    return job.folder / name.replace(" ", "-")


def words(job: Job, name: str, flags: str) -> list[str]:
    """Flags of ``main.py`` for a network of a seed."""
    fixed = ["--seed", str(job.seed), "--device", job.device, "--output_dir", str(folder_of(job, name))]
    return [*COMMON.split(), *flags.split(), *fixed]


def student_words(job: Job, learnt: str, ratio: float, *, teacher: str = "teacher", name: str = "") -> list[str]:
    """Flags of ``main.py`` for a student, which starts from the weights of its teacher."""
    file = str(folder_of(job, teacher) / "checkpoint.pth")
    start = ["--finetune", file, "--teacher-path", file, "--keeping-ratio", str(ratio)]
    return [*words(job, name or f"{learnt} {ratio}", f"{STUDENT} {LEARNT[learnt]}"), *start]


def mmacs(ratio: float | None) -> float:
    """Millions of MACs that the deployed network executes for an image; without slimming for None."""
    options = {"distillation_type": "frd", "keeping_ratio": ratio} if ratio else {}
    with torch.device("meta"):
        model = build_lvvit(MODEL, num_classes=10, **options).deployed()
        images = torch.empty(1, 3, *model.image_shape)
    return 1e3 * gmacs(count_operations(model, images).executed)


def train_teacher(job: Job) -> Arms:
    """The network without slimming."""
    row = main.main(words(job, "teacher", TEACHER))
    return {"dense": {"top1_percent": row["test_acc1"], "mmacs": mmacs(None)}}


def train_student(job: Job, learnt: str, ratio: float) -> Arms:
    """A slimmed network.

    Args:
        learnt: key of ``LEARNT``.
        ratio: tokens of a stage over those of the one before.
    """
    row = main.main(student_words(job, learnt, ratio))
    return {f"{learnt}: {ratio}": {"top1_percent": row["test_acc1"], "mmacs": mmacs(ratio)}}


def live(job: Job) -> Arms:
    """A short run of everything: a teacher, a student with FRD, its evaluation as deployed, and its export."""
    taught = main.main([*words(job, "live-teacher", TEACHER), *LIVE_TEACHER.split()])
    flags = student_words(job, "FRD", LIVE_RATIO, teacher="live-teacher", name="live-student")
    main.main([*flags, *LIVE_STUDENT.split()])
    place = folder_of(job, "live-student")
    weights = str(place / "checkpoint.pth")
    found = main.main([*flags, "--eval", "--finetune", weights])
    network = ["--model", MODEL, "--num-classes", "10", "--keeping-ratio", str(LIVE_RATIO), "--weights", weights]
    export.main([*network, "--output", str(place / "student.pt2")])
    return {
        "live: teacher": {"top1_percent": taught["test_acc1"], "mmacs": mmacs(None)},
        f"live: FRD {LIVE_RATIO}": {"top1_percent": found["acc1"], "mmacs": mmacs(LIVE_RATIO)},
    }


_TEACHER = f"{SIZES[MODEL]}; {COMMON}; {TEACHER}"


RUNS: dict[str, Run] = {
    "teacher": Run(_TEACHER, train_teacher),
    **{
        f"{learnt} {ratio}": Run(
            f"{_TEACHER}; {STUDENT} {flags} --keeping-ratio {ratio}",
            lambda job, learnt=learnt, ratio=ratio: train_student(job, learnt, ratio),
        )
        for ratio in RATIOS
        for learnt, flags in LEARNT.items()
    },
    "live": Run(f"{_TEACHER}; {STUDENT}; {LIVE_TEACHER}; {LIVE_STUDENT}; {LIVE_RATIO}", live),
}
