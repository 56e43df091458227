"""What flags say, as named values: one small dataclass for each group of ``common.run.cli``. Imports no torch.

settings = OptimizerSettings.of(args, lr=peak)      # values of the flags of these names, and one computed
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self


class Settings:
    """Base of the groups."""

    @classmethod
    def of(cls, args: argparse.Namespace, **changes: Any) -> Self:
        """Fields by their flags' names.

        Args:
            args: a parser's result; a flag that the program does not have keeps the field's default.
            changes: fields whose flag has another name, or whose value is computed.

        Raises:
            TypeError: a field without default is in neither.
        """
        values = dict(changes)
        for field in fields(cls):  # pyright: ignore[reportArgumentType] - every subclass is a dataclass
            if field.name not in values and hasattr(args, field.name):
                values[field.name] = getattr(args, field.name)
            elif field.name not in values and field.default is MISSING:
                raise TypeError(f"{cls.__name__} needs {field.name}, and the program has no such flag")
        return cls(**values)


@dataclass(frozen=True)
class DataSettings(Settings):
    """Of ``add_data_args``; ``batch_size`` is per process and step."""

    data_set: str
    data_path: str
    input_size: int
    batch_size: int
    seed: int = 0
    workers: int = 10
    pin_mem: bool = True
    skip_bad_images: bool = False
    inat_category: str = "name"
    eval_crop_ratio: float = 0.875


@dataclass(frozen=True)
class AugmentationSettings(Settings):
    """Of ``add_augmentation_args``, and the probability of a flip."""

    aa: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float | None = 0.3
    train_interpolation: str = "bicubic"
    hflip: float = 0.5
    repeated_aug: bool = True
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.8
    cutmix: float = 1.0
    cutmix_minmax: Sequence[float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    smoothing: float = 0.1

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, which takes an even number of them."""
        return bool(self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax)


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Of ``add_optimizer_args``; ``lr`` is the peak that is used, scaled already."""

    lr: float
    opt: str = "adamw"
    weight_decay: float = 0.05
    opt_eps: float | None = None
    opt_betas: Sequence[float] | None = None
    momentum: float = 0.9
    clip_grad: float | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.99996
    model_ema_force_cpu: bool = False


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """Of ``add_schedule_args``; ``seed`` is of the noise."""

    epochs: int
    sched: str = "cosine"
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 10
    decay_epochs: float = 30
    decay_rate: float = 0.1
    patience_epochs: int = 10
    lr_noise: Sequence[float] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0
    noise_seed: int = 42


@dataclass(frozen=True)
class RunSettings(Settings):
    """Of ``add_runtime_args``: what concerns the run and not the result."""

    amp: str = "none"
    compile: bool = False
    eval: bool = False
    output_dir: str = ""
    resume: str = ""
    tensorboard: bool = False
    save_every_steps: int | None = None
    log_every_steps: int | None = None
