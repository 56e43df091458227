"""What a command line says, as small frozen dataclasses; below the entry points nothing sees the parser.

Fields have the names of the published flags where there is one, see their help for units and defaults.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from common.run.settings import (
    AugmentationSettings,
    DataSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
    Settings,
)


@dataclass(frozen=True)
class Student(Settings):
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
class Teacher(Settings):
    """The dense network that is learned from: its name and weights, and the weight of its term."""

    model_type: str
    source: str | None
    distillation_type: str
    distillation_alpha: float
    distillation_tau: float


@dataclass(frozen=True)
class PrimalDualSettings(Settings):
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
class JointSettings(Settings):
    """Course of stage 1.

    Attributes:
        warmup_epochs: first epochs, in which every block's update is halved and nothing is pruned or skipped.
        warmup_lr: learning rate of the first step of each of them.
        warmup_reset: forget the optimizer's moments and start the schedule anew after them.
        zlr_schedule: learning rate of z by the epoch from which it holds; the first epoch is 1.
        eps_decay: factor on eps of the soft-L0 gates at the start of each later epoch.
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
    select_ratio: float | None = None
    total_steps: int = 1
    patch_l1_weight: float = 0.0
    official: bool = False
    log_interval: int = 2000


@dataclass(frozen=True)
class Run:
    """What both stages take. ``optimizer`` is of the weights; ``arguments`` is what files say of the flags.

    ``parts``: pieces in which a batch is taken.
    """

    data: DataSettings
    augmentation: AugmentationSettings
    eval_batch_size: int
    teacher: Teacher
    run: RunSettings
    optimizer: OptimizerSettings
    arguments: Mapping[str, Any]
    parts: int


@dataclass(frozen=True)
class JointRun(Run):
    """All of stage 1."""

    student: Student
    decay_type: str
    warmup_steps: int
    num_epochs: int
    primal_dual: PrimalDualSettings
    course: JointSettings


@dataclass(frozen=True)
class PostRun(Run):
    """All of stage 2, and of training a pruning baseline; the rate of ``optimizer`` is for 512 images per step."""

    schedule: ScheduleSettings


@dataclass(frozen=True)
class PruningSettings(Settings):
    """How a pruning baseline masks, by the flags of ``baselines.py``."""

    method: str
    density: float
    scope: Literal["global", "local"]
    attention_density: float
    mlp_density: float
    score_images: int
    pruning_times: int
    delta_t: int
    t_start: int
