"""The flags that the papers share, with DeiT's names and defaults, and what they say as named values. Imports no torch.

settings = OptimizerSettings.of(args, lr=peak)      # values of the flags of these names, and one computed

One dataclass for each group of ``common.run.cli``; a field that is no ``flag`` is set by programs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass

from common.run.errors import UsageError
from common.run.flags import Settings as Settings
from common.run.flags import amp_mode, count, flag, fraction, not_negative, positive_float, positive_int

CACHE_DECODED = (
    "folder that keeps evaluation images decoded, resized and cropped, for later evaluations at this size: 3 bytes a "
    "pixel, 0.15 MB an image at 224"
)
FSDP = (
    "keep a part of the weights, their average and the optimiser's state on each process (FSDP2), for networks that do "
    "not fit on one device; checkpoints are folders, see the README"
)
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


@dataclass(frozen=True)
class DataSettings(Settings):
    """Of ``add_data_args``; ``batch_size`` is per process and step."""

    data_set: str = flag(
        "IMNET",
        "IMNET (class folders under train/ and val/), CIFAR (CIFAR-100), CIFAR10, INAT (2018), INAT19, digits, "
        "fashion (small photographs; both ship inside), fashion_full (all of them), folder, tar, "
        "or a name for timm's create_dataset such as hfds/ORG/SET",
        own=MISSING, metavar="NAME",
    )  # fmt: skip
    data_path: str = flag("", "folder of the dataset; digits and fashion need none", own=MISSING, metavar="DIR")
    input_size: int = flag(224, "side of the square input, in pixels", own=MISSING, type=positive_int, metavar="PIXELS")
    batch_size: int = flag(64, "images per step and process", "-b", own=MISSING, type=positive_int, metavar="N")
    seed: int = 0
    workers: int = flag(
        10, "loading processes per process, no more than cores by default; 0 loads in the process itself",
        "--num-workers", "--num_workers", "-j", type=count, metavar="N",
    )  # fmt: skip
    pin_mem: bool = flag(True, "page-locked memory for faster copies to the GPU")
    skip_bad_images: bool = flag(False, "leave out images that cannot be decoded, and count them, instead of stopping")
    cache_decoded: str = flag("", CACHE_DECODED, metavar="DIR")
    inat_category: str = flag("name", "level of iNaturalist's taxonomy that makes the classes", choices=INAT_CATEGORIES)
    eval_crop_ratio: float = flag(
        0.875, "share of the resized image's side that the evaluation crop keeps", type=fraction, metavar="RATIO"
    )


@dataclass(frozen=True)
class AugmentationSettings(Settings):
    """Of ``add_augmentation_args``, and the probability of a flip."""

    color_jitter: float | None = flag(0.3, "strength of colour jitter; used where --aa is none", type=not_negative)
    aa: str | None = flag("rand-m9-mstd0.5-inc1", "timm's automatic augmentation; '' for none", metavar="POLICY")
    train_interpolation: str = flag(
        "bicubic", "resampling of the training crop; random is either per image",
        choices=("bicubic", "bilinear", "random"),
    )  # fmt: skip
    hflip: float = 0.5
    repeated_aug: bool = flag(True, "three augmented versions of an image per epoch's share")
    reprob: float = flag(0.25, "probability of random erasing", type=fraction)
    remode: str = flag("pixel", "what random erasing fills in", choices=("const", "rand", "pixel"))
    recount: int = flag(1, "areas that random erasing takes", type=positive_int)
    mixup: float = flag(0.8, "mixup's Beta parameter; 0 for no mixup", type=not_negative, metavar="ALPHA")
    cutmix: float = flag(1.0, "CutMix's Beta parameter; 0 for no CutMix", type=not_negative, metavar="ALPHA")
    cutmix_minmax: Sequence[float] | None = flag(
        None, "smallest and largest side of CutMix's box as a share of the image's, instead of --cutmix",
        type=float, nargs=2, metavar=("MIN", "MAX"),
    )  # fmt: skip
    mixup_prob: float = flag(1.0, "probability of mixup or CutMix per batch", type=fraction)
    mixup_switch_prob: float = flag(0.5, "probability of CutMix where both are on", type=fraction)
    mixup_mode: str = flag("batch", "what one mixing ratio is drawn for", choices=("batch", "pair", "elem"))
    smoothing: float = flag(0.1, "label smoothing: probability spread over all classes", type=fraction)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, which takes an even number of them."""
        return bool(self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax)


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Of ``add_optimizer_args``; ``lr`` is the peak that is used, scaled already."""

    lr: float = flag(
        5e-4, "peak learning rate; each paper's README says how it scales", own=MISSING, type=positive_float
    )
    opt: str = flag("adamw", "timm's name of the optimiser", metavar="NAME")
    opt_eps: float | None = flag(1e-8, "epsilon of Adam-like optimisers", own=None, type=positive_float, metavar="EPS")
    opt_betas: Sequence[float] | None = flag(
        None, "betas of Adam-like optimisers; none is the optimiser's own, 0.9 0.999 for AdamW",
        type=float, nargs="+", metavar="BETA",
    )  # fmt: skip
    momentum: float = flag(0.9, "of SGD-like optimisers", type=not_negative)
    weight_decay: float = flag(0.05, "decoupled decay per step and learning rate", type=not_negative)
    clip_grad: float | None = flag(
        None, "largest L2 norm of all gradients together; none does not clip", type=positive_float, metavar="NORM"
    )
    model_ema: bool = flag(True, "keep a moving average of the weights", own=False)
    model_ema_decay: float = flag(0.99996, "share of the average kept per step", type=fraction, metavar="D")
    model_ema_force_cpu: bool = flag(False, "keep the average in host memory (slower)")


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """Of ``add_schedule_args``."""

    epochs: int = flag(300, "epochs, without the cooldown", own=MISSING, type=positive_int)
    sched: str = flag(
        "cosine", "course of the learning rate over the epochs",
        choices=("cosine", "tanh", "step", "multistep", "plateau", "poly"),
    )  # fmt: skip
    lr_noise: Sequence[float] | None = flag(
        None, "from which, and up to which, fraction of the epochs the learning rate gets noise",
        type=float, nargs="+", metavar="FRACTION",
    )  # fmt: skip
    lr_noise_pct: float = flag(0.67, "bound of that noise, as a fraction of the rate", type=not_negative)
    lr_noise_std: float = flag(1.0, "standard deviation of that noise", type=not_negative)
    noise_seed: int = 42
    warmup_lr: float = flag(1e-6, "learning rate at the first epoch of the warm-up", type=not_negative)
    min_lr: float = flag(1e-5, "learning rate at the end of the schedule", type=not_negative)
    decay_epochs: float = flag(30, "epochs between two decays of --sched step", type=float)
    warmup_epochs: int = flag(5, "epochs of linear warm-up", type=count)
    cooldown_epochs: int = flag(10, "epochs at --min-lr after --epochs", type=count)
    patience_epochs: int = flag(10, "epochs without gain before --sched plateau decays", type=count)
    decay_rate: float = flag(0.1, "factor of a decay of --sched step and plateau", "--dr")


@dataclass(frozen=True)
class RunSettings(Settings):
    """Of ``add_runtime_args``: what concerns the run and not the result.

    Raises:
        UsageError: flags that do not go together.
    """

    device: str = flag("auto", "auto (CUDA if there is one), cpu, cuda, or cuda:N")
    amp: str = flag(
        "none",
        "mixed precision: none, fp16 (CUDA only), bf16, auto (fp16 on CUDA, none on the CPU), or no word for fp16 on "
        "CUDA and bf16 on the CPU",
        "--native-amp", nargs="?", const="on", type=amp_mode, metavar="MODE",
    )  # fmt: skip
    compile: bool = flag(False, "run the model through torch.compile")
    fsdp: bool = False
    seed: int = flag(0, "of all random numbers; each process adds its rank", type=count)
    output_dir: str = flag(
        "", "where checkpoints and the record go; without it nothing is written", "--output_dir", metavar="DIR"
    )
    resume: str = flag("", "continue from this file or URL; auto: from --output-dir's last", metavar="FILE")
    eval: bool = flag(False, "evaluate only")
    tensorboard: bool = flag(False, "also write TensorBoard's files into --output-dir")
    save_every_steps: int | None = flag(
        None, "also write a checkpoint within epochs, every N optimiser steps; none only after epochs",
        type=positive_int, metavar="N",
    )  # fmt: skip
    log_every_steps: int | None = flag(
        None, "also record the loss terms every N optimiser steps; none only after epochs",
        type=positive_int, metavar="N",
    )  # fmt: skip
    local_rank: int = flag(
        -1, "set by torch.distributed.launch: this process's place on its machine; -1 without a launcher",
        "--local_rank", metavar="N",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.fsdp and self.compile:
            raise UsageError(
                "--fsdp gathers weights between the blocks, which --compile cannot follow: give one of them"
            )
        if self.fsdp and self.eval:
            raise UsageError("--fsdp is for training: leave it out, and evaluate one file")
