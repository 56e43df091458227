"""A run that distils features into every width, from settings (design; see ``features.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch import Tensor

from common.data.build import build_mixup, build_train_transform, open_split
from common.data.loaders import eval_loader, train_loader
from common.data.transforms import eval_transform
from common.run.build import build_run
from common.run.checkpoint import save_atomic
from common.run.launch import World, reduce_sums
from common.run.precision import autocast
from common.run.program import get_logger
from common.run.settings import AugmentationSettings, DataSettings, OptimizerSettings, RunSettings, ScheduleSettings
from scala.arguments import NetworkSettings, StepSettings
from scala.build import check_training
from scala.engine_scala import ScaleCoordination, allow_widths
from scala.features import FeatureLosses, FeatureStudent, FeatureTeacher, FeatureWeights, build_student
from scala.slicing import make_grid

logger = get_logger(__name__)


@torch.no_grad()
def held_out_losses(
    student: FeatureStudent, losses: FeatureLosses, loader: Any, ratios: Sequence[float], world: World, amp: str
) -> dict[str, float]:
    """Loss of each width against the teacher, mean over the images of all ranks; ``loss`` is the last ratio's."""
    student.eval()
    sums = dict.fromkeys([f"loss_{ratio:g}" for ratio in ratios] + ["images"], 0.0)
    for images, targets in loader:
        images = images.to(world.device, non_blocking=True)
        with autocast(amp, world.device):
            for ratio in ratios:
                loss = losses.full(images, student(images, ratio), targets)
                sums[f"loss_{ratio:g}"] += float(loss) * len(images)
        sums["images"] += len(images)
    total = reduce_sums(sums)
    count = total.pop("images")
    means = {name: value / count for name, value in total.items()}
    return means | {"loss": means[f"loss_{ratios[-1]:g}"], "images": count}


def mix_images(mixup: Mixup | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup of images whose labels nobody reads, or None."""
    return mixup and (lambda images, targets: mixup(images, torch.zeros_like(targets)))


def train_features(
    world: World,
    run: RunSettings,
    data: DataSettings,
    augmentation: AugmentationSettings,
    teacher: FeatureTeacher,
    network: NetworkSettings,
    weights: FeatureWeights,
    step: StepSettings,
    optimizer: OptimizerSettings,
    schedule: ScheduleSettings,
    *,
    arguments: Mapping[str, Any],
) -> dict[str, float]:
    """Train, or with ``run.eval`` only measure; returns the last losses, ``loss`` that of the largest width.

    Source: arXiv:2412.04786, Section 5.4: DINOv2 as the teacher, without cross entropy (design).
    """
    assert network.granularity is not None
    grid = make_grid(network.smallest_ratio, network.largest_ratio, network.granularity)
    student: FeatureStudent = build_student(
        network.model, teacher, weights, img_size=data.input_size, smallest_ratio=grid.smallest,
        largest_ratio=grid.largest, drop_path_rate=network.drop_path, init_values=network.init_values,
    ).to(world.device)  # fmt: skip
    ratios = check_training(grid, student, alone=step.alone)
    losses = FeatureLosses(teacher.to(world.device), weights)
    loading: dict[str, Any] = {"batch_size": data.batch_size, "workers": data.workers, "pin_memory": data.pin_mem}
    held_out = open_split(data, "val", eval_transform(data.input_size, crop_ratio=data.eval_crop_ratio))
    bounds, kept = [grid.smallest, grid.largest], eval_loader(held_out, **loading)
    if run.compile:
        allow_widths(len(ratios))
    trainer = build_run(
        student, world, run, optimizer=optimizer, schedule=schedule, arguments=arguments, metric="loss",
        higher_is_better=False, find_unused_parameters=not weights.feature, own_backward=True,
    )  # fmt: skip

    def test() -> dict[str, float]:
        return held_out_losses(student, losses, kept, bounds, world, run.amp)

    if run.eval:
        return test()
    images = open_split(data, "train", build_train_transform(data.input_size, augmentation))
    batches = train_loader(images, seed=data.seed, repeated_aug=augmentation.repeated_aug, **loading)
    assert trainer.network is not None
    coordination = ScaleCoordination(
        trainer.network, losses, grid, lambda: trainer.state.progress.epoch, full_warm_epoch=step.full_warm_epoch,
        transfer_type=step.transfer_type, augment=mix_images(build_mixup(augmentation, classes=1)),
    )  # fmt: skip
    row = trainer.fit(coordination, batches, evaluate_fn=test)
    if run.output_dir and world.is_main:
        file = Path(run.output_dir) / "weights.pth"
        backbone = {key: value.cpu() for key, value in student.backbone.state_dict().items()}
        save_atomic({"model": backbone, "args": dict(arguments)}, file)
        logger.info("the student alone, for linear_probe.py and export.py: %s", file)
    return row | {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_")}
