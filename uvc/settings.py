"""What a command line says, as small frozen dataclasses; below the entry points nothing sees the parser.

Fields have the names of the published flags where there is one, see their help for units and defaults.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Data:
    """Images and batches."""

    dataset: str
    data_dir: str
    num_workers: int
    train_batch_size: int
    eval_batch_size: int
    seed: int


@dataclass(frozen=True)
class Mixing:
    """Mixup, CutMix and label smoothing."""

    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: list[float] | None = None
    mixup_prob: float = 0.8
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    smoothing: float = 0.1


@dataclass(frozen=True)
class Student:
    """The network that stage 1 trains; ``model_path`` only where ``pretrained``."""

    model_type: str
    model_path: str | None
    pretrained: bool
    img_size: int | None
    enable_deit: bool
    enable_jumping: bool
    enable_block_gating: bool
    enable_patch_gating: int
    use_gumbel: bool
    eps: float


@dataclass(frozen=True)
class Teacher:
    """The dense network that is learned from: its name and weights, and the weight of its term."""

    model_type: str
    source: str | None
    distillation_type: str
    distillation_alpha: float
    distillation_tau: float


@dataclass(frozen=True)
class Run:
    """How a run proceeds. ``folder`` is where its files go, ``arguments`` what its checkpoints say of its flags."""

    folder: Path | None
    arguments: Mapping[str, object]
    amp: str
    compile: bool
    eval: bool
    resume: str
    tensorboard: bool
    save_every_steps: int | None
    log_every_steps: int | None
    max_grad_norm: float
    gradient_accumulation_steps: int


@dataclass(frozen=True)
class Recipe:
    """Optimiser and schedule of stage 2, in timm's terms."""

    learning_rate: float
    opt: str
    opt_eps: float
    opt_betas: list[float] | None
    momentum: float
    weight_decay: float
    epochs: int
    sched: str
    warmup_epochs: int
    warmup_lr: float
    min_lr: float
    decay_epochs: float
    decay_rate: float
    patience_epochs: int
    lr_noise: list[float] | None
    lr_noise_pct: float
    lr_noise_std: float


@dataclass(frozen=True)
class PrimalDualSettings:
    """Numbers of the primal-dual step.

    Attributes:
        budget: B, remaining share of the cost.
        slr, rlr, ylr, plr, zlr: learning rates of s, r, y, p and z.
        soptim, roptim: sgd, adam or rmsprop.
        sl2wd: adds sl2wd * s / bound to the gradient of s, likewise for r.
        z_grad_clip: R - B is kept within plus or minus this before it is differentiated; z sees it unclipped.
        block_gating: learn the block gates.
        pruning: learn s and r; False leaves them at zero, and the weights to their own step.
        glr, gating_interval, gating_weight: of their SGD: learning rate, steps between updates, factor on the
            gradient of the cost.
        learn_patches: patch gates enter the cost and have an optimizer of their own here.
        patchlr, patch_weight: its learning rate, and the factor on the gradient of the cost.
        with_mhsa: False takes the cost of the output projections alone.
    """

    budget: float = 0.5
    slr: float = 0.02
    rlr: float = 0.02
    ylr: float = 1e-4
    plr: float = 1e-4
    zlr: float = 10.0
    soptim: str = "sgd"
    roptim: str = "sgd"
    sl2wd: float = 0.0
    z_grad_clip: float = 0.5
    block_gating: bool = True
    pruning: bool = True
    glr: float = 1e-3
    gating_interval: int = 100
    gating_weight: float = 5.0
    learn_patches: bool = False
    patchlr: float = 0.01
    patch_weight: float = 5.0
    with_mhsa: bool = True


@dataclass(frozen=True)
class JointSettings:
    """Course of stage 1.

    Attributes:
        warmup_epochs: first epochs, in which every block's update is halved and nothing is pruned or skipped.
        warmup_lr: learning rate of the first step of each of them.
        warmup_reset: forget the optimizer's moments and start the schedule anew after them.
        zlr_schedule: learning rate of z by the epoch from which it holds; the first epoch is 1.
        eps_decay: factor on eps of the soft-L0 gates at the start of each later epoch.
        parts: pieces of a batch, see ``engine.back_propagate``.
        select_ratio: share of patch tokens that selection by image keeps; None selects none.
        total_steps: of the run, for the temperature of this selection.
        patch_l1_weight: factor on the sum of the patch gates in the loss; 0 where patches are not learned.
        official: masks keep stale zeros, evaluation is of the noisy soft network, files are bare state dicts.
        log_interval: steps between records of the structure.
    """

    warmup_epochs: int = 5
    warmup_lr: float = 1e-4
    warmup_reset: bool = False
    zlr_schedule: Mapping[int, float] = field(default_factory=lambda: {0: 10.0})
    eps_decay: float = 0.92
    parts: int = 1
    select_ratio: float | None = None
    total_steps: int = 1
    patch_l1_weight: float = 0.0
    official: bool = False
    log_interval: int = 2000


@dataclass(frozen=True)
class JointRun:
    """All of stage 1."""

    data: Data
    mixing: Mixing
    student: Student
    teacher: Teacher
    run: Run
    primal_dual: PrimalDualSettings
    course: JointSettings
    learning_rate: float
    weight_decay: float
    decay_type: str
    warmup_steps: int
    num_epochs: int


@dataclass(frozen=True)
class PostRun:
    """All of stage 2, and of training a pruning baseline."""

    data: Data
    mixing: Mixing
    teacher: Teacher
    run: Run
    recipe: Recipe
