"""What a command line says, as small frozen dataclasses; below the entry points nothing sees the parser.

Fields have the names of the published flags where there is one, see their help for units and defaults.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from common.run import cli
from common.run.flags import flag, not_negative
from common.run.settings import (
    AugmentationSettings,
    DataSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
    Settings,
)
from uvc.flags import share, switch
from uvc.schedules import DECAYS


@dataclass(frozen=True)
class Student(Settings):
    """The network that stage 1 trains; ``model_path`` only where ``pretrained``."""

    model_type: str
    model_path: str | None
    img_size: int | None
    enable_deit: bool
    enable_jumping: bool
    pretrained: bool = flag(True, "load --model_path into the student", type=switch)
    enable_block_gating: bool = flag(True, "learn to skip blocks", type=switch)
    use_gumbel: bool = flag(True, "1 Gumbel softmax gates, 0 soft-L0 gates", type=switch)
    eps: float = flag(0.1, "epsilon of soft-L0 gates", type=cli.positive_float)
    enable_patch_gating: int = flag(
        2, "0 off, 1 a learned gate per patch position, 2 selection of patch tokens by image", choices=(0, 1, 2)
    )


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
    """Numbers of the primal-dual step; ``zlr`` is the learning rate of z at first.

    With ``learn_patches`` patch gates enter the cost and have an optimizer of their own here.
    """

    budget: float = flag(0.5, "share B of the dense network's cost that may remain", type=share)
    enable_pruning: bool = flag(
        True, "learn s and r; 0 learns gates alone, and leaves the weights to their step", type=switch
    )
    soptim: str = flag("sgd", "optimizer of s", choices=("sgd", "adam", "rmsprop"))
    roptim: str = flag("sgd", "optimizer of r", choices=("sgd", "adam", "rmsprop"))
    slr: float = flag(0.02, "learning rate of s", type=not_negative)
    rlr: float = flag(0.02, "learning rate of r", type=not_negative)
    ylr: float = flag(1e-4, "learning rate of y", type=not_negative)
    plr: float = flag(1e-4, "learning rate of p", type=not_negative)
    sl2wd: float = flag(0.0, "decay of s and r relative to their bounds", type=not_negative)
    z_grad_clip: float = flag(
        0.5, "bound of cost minus budget where it is differentiated; z sees it unclipped", type=cli.positive_float
    )
    flops_with_mhsa: bool = flag(
        True,
        "0 puts the budget on the output projections alone; what is printed and written as remaining cost is the whole "
        "network's all the same, as in stage 2",
        type=switch,
    )
    glr: float = flag(1e-3, "learning rate of the gates' SGD", type=not_negative)
    gating_interval: int = flag(100, "steps between its updates", type=cli.positive_int, metavar="N")
    gating_weight: float = flag(5.0, "factor on the cost's gradient there", type=not_negative)
    patchlr: float = flag(0.01, "learning rate of the patch gates, mode 1", type=not_negative)
    patch_weight: float = flag(5.0, "factor on the cost's gradient of the patch gates, mode 1", type=not_negative)
    zlr: float = 10.0
    enable_block_gating: bool = True
    learn_patches: bool = False


@dataclass(frozen=True)
class JointSettings(Settings):
    """Course of stage 1.

    Attributes:
        zlr_schedule: learning rate of z by the epoch from which it holds; the first epoch is 1.
        select_ratio: share of patch tokens that selection by image keeps; None selects none.
        total_steps: of the run, for the temperature of this selection.
        official: masks keep stale zeros, evaluation is of the noisy soft network, files are bare state dicts.
    """

    num_epochs: int = flag(20, "epochs, one more under --official", type=cli.positive_int)
    decay_type: str = flag("cosine", "course of the learning rate", choices=DECAYS)
    warmup_steps: int = flag(500, "steps over which the learning rate rises", type=cli.count)
    warmup_epochs: int = flag(
        5, "first epochs, in which every block's update is halved and nothing is pruned or skipped", type=cli.count
    )
    warmup_lr: float = flag(1e-4, "learning rate of the first step of each of them", type=not_negative)
    warmup_reset: bool = flag(False, "start optimizer and schedule anew after them", type=switch)
    log_interval: int = flag(2000, "steps between records of the structure", type=cli.positive_int, metavar="N")
    eps_decay: float = flag(0.92, "factor on --eps at each epoch after the warm-up", type=cli.positive_float)
    patch_l1_weight: float = flag(0.01, "factor on the sum of the patch gates in the loss, mode 1")
    zlr_schedule: Mapping[int, float] = field(default_factory=lambda: {0: 10.0})
    select_ratio: float | None = None
    total_steps: int = 1
    official: bool = False


@dataclass(frozen=True)
class Run:
    """What both stages take. ``optimizer`` is of the weights; ``arguments`` is what files say of the flags.

    ``parts``: pieces in which a batch is taken. ``augment``: whether training images are cropped at random and flipped.
    """

    data: DataSettings
    augmentation: AugmentationSettings
    eval_batch_size: int
    teacher: Teacher
    run: RunSettings
    optimizer: OptimizerSettings
    arguments: Mapping[str, Any]
    parts: int
    augment: bool


@dataclass(frozen=True)
class JointRun(Run):
    """All of stage 1."""

    student: Student
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
    density: float = flag(0.5, "share of weights kept, of gmp at its end", type=cli.fraction)
    scope: Literal["global", "local"] = flag("global", "one threshold, or one per layer", choices=("global", "local"))
    attention_density: float = flag(0.5, "structured: share of heads kept", "--attention-density", type=cli.fraction)
    mlp_density: float = flag(0.5, "structured: share of neurons kept", "--mlp-density", type=cli.fraction)
    score_images: int = flag(10000, "training images that taylor scores on", "--score-images", type=cli.positive_int)
    pruning_times: int = flag(20, "gmp: pruning events", type=cli.positive_int)
    delta_t: int = flag(6250, "gmp: steps between events", type=cli.positive_int)
    t_start: int = flag(62500, "gmp: steps before the first interval", type=cli.count)
