"""A training run of Scala, and an evaluation of a checkpoint, from settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common.data.build import build_loaders, build_mixup, build_train_transform, check_trained_classes, open_split
from common.data.loaders import num_classes, train_loader
from common.data.transforms import eval_transform
from common.measure.flops import count_parameters
from common.run.build import build_average, build_optimizer, build_run
from common.run.checkpoint import read_checkpoint
from common.run.errors import UsageError
from common.run.files import sharded_name
from common.run.launch import World
from common.run.program import get_logger
from common.run.settings import DataSettings, OptimizerSettings, RunSettings
from common.run.wrapping import gathered, shard
from scala.arguments import (
    DEFAULT_MODEL,
    DEFAULTS,
    CosineSettings,
    EvalSettings,
    LossSettings,
    NetworkSettings,
    ScalaAugmentation,
    StepSettings,
)
from scala.build import build_losses, build_model, build_teacher, check_training
from scala.engine_scala import LaggingSchedule, ScaleCoordination, allow_widths, evaluate_width
from scala.loading import Trained, load_trained, recorded_arguments, resolve_grid
from scala.narrowing import NarrowedNetwork, calibrate_
from scala.record import published_log
from scala.slicing import WidthGrid
from scala.sweep import check_numbers, sweep, write

logger = get_logger(__name__)

LAST = "checkpoint.pth"
"""Name of the file that a run resumes from."""


def per_process_batch(batch_size: int, global_batch_size: int | None, world_size: int, *, even: bool) -> int:
    """Images per step of one process: its share of ``--global-batch-size`` where that is given.

    Raises:
        UsageError: the processes cannot share it evenly, or the share is odd and must be ``even`` for mixup.
    """
    if global_batch_size is None:
        return batch_size
    if global_batch_size % world_size:
        raise UsageError(
            f"--global-batch-size {global_batch_size} cannot be shared by {world_size} processes; give a multiple of "
            f"{world_size}"
        )
    if even and global_batch_size // world_size % 2:
        raise UsageError(f"mixup and CutMix need an even batch per process, got {global_batch_size // world_size}")
    return global_batch_size // world_size


def resumed_bound(run: RunSettings, flags: Mapping[str, Any]) -> dict[str, float]:
    """Bound and granularity of a training run, on which the checkpoint to resume from and the flags must agree."""
    source = run.resume
    if source == "auto":
        last = Path(run.output_dir) / LAST
        last = sharded_name(last) if run.fsdp else last
        source = str(last) if run.output_dir and last.exists() else ""
    content: Any = {}
    if source and run.fsdp:
        from common.run.checkpoint.sharded import read_rest  # only where it is asked for

        content = read_rest(source)
    elif source:
        content = read_checkpoint(source)
    return resolve_grid(flags, recorded_arguments(content), source).arguments


def train_widths(
    world: World,
    run: RunSettings,
    data: DataSettings,
    augmentation: ScalaAugmentation,
    network: NetworkSettings,
    losses: LossSettings,
    step: StepSettings,
    schedule: CosineSettings,
    optimizer: OptimizerSettings,
    *,
    classes: int | None,
    arguments: Mapping[str, Any],
) -> list[dict[str, float]]:
    """Train, resuming where told; then evaluate every trained width.

    Args:
        classes: value of ``--num-classes``.
        arguments: the flags, for checkpoints and the record.
    """
    assert network.granularity is not None
    grid = WidthGrid(network.smallest_ratio, network.largest_ratio, network.granularity)
    transform = build_train_transform(
        data.input_size, augmentation, three_augment=augmentation.ThreeAugment, simple_random_crop=augmentation.src,
        crop_padding=augmentation.crop_padding,
    )  # fmt: skip
    batches = build_loaders(
        data, augmentation, classes=classes, eval_batch_size=int(1.5 * data.batch_size), train=transform
    )
    model = build_model(network, batches.classes)
    if run.fsdp and isinstance(model, NarrowedNetwork):
        raise UsageError(
            f"--fsdp goes by transformer blocks; {network.model} uses the weights of all its blocks at once"
        )
    ratios = check_training(grid, model, alone=step.alone)
    if step.alone and len(grid.ratios) > 1:
        logger.warning(
            "only the largest width is trained, the %d others stay at chance: --full_warm_epoch %d is not below "
            "--epochs %d; that is separate training, and for all widths give fewer epochs of it",
            len(grid.ratios) - 1, step.full_warm_epoch, step.epochs,
        )  # fmt: skip
    model.to(world.device)
    parameters = count_parameters(model)
    logger.info("number of params: %d", parameters)
    teacher = None
    if losses.distillation_type != "none":
        teacher = build_teacher(
            losses.teacher_model, losses.teacher_path, batches.classes, input_size=data.input_size
        ).to(world.device)
        if run.fsdp:
            shard(teacher, world, whole=True)
    if run.compile:
        allow_widths(len(ratios))
    updates = build_optimizer(model, optimizer)
    known = {**arguments, **asdict(network), "num_classes": batches.classes, "batch_size": data.batch_size}
    trainer = build_run(
        model, world, run, optimizer=updates, average=build_average(model, optimizer), clip_grad=optimizer.clip_grad,
        schedule=LaggingSchedule(updates, schedule, seed=run.seed, start_epoch=step.start_epoch), epochs=step.epochs,
        start_epoch=step.start_epoch, arguments=known,
        files=(LAST, "best_checkpoint.pth"),
        published=("log.txt", partial(published_log, parameters=parameters)),
        find_unused_parameters=True, own_backward=True, train_mode=network.train_mode,
    )  # fmt: skip
    assert trainer.network is not None
    assert batches.train is not None
    mixup = build_mixup(augmentation, batches.classes)
    coordination = ScaleCoordination(
        trainer.network, build_losses(losses, teacher, mixing=mixup is not None), grid,
        lambda: trainer.state.progress.epoch, full_warm_epoch=step.full_warm_epoch, transfer_type=step.transfer_type,
        augment=mixup, multi_hot=losses.bce_loss, twice=losses.cosub,
    )  # fmt: skip
    test = partial(evaluate_width, model, batches.held_out, device=world.device, amp=run.amp)
    trainer.fit(coordination, batches.train, evaluate_fn=lambda: test(grid.largest, show_progress=False))
    failed: dict[str, str] = {}
    with gathered(model):
        rows = sweep(model, batches.held_out, ratios, device=world.device, amp=run.amp, failed=failed)
    if trainer.record is not None:
        trainer.record.replace("width", rows, step=trainer.state.progress.step)
    write(rows, run.output_dir, known)
    check_numbers(failed)
    return rows


def evaluate_checkpoint(
    world: World,
    run: RunSettings,
    data: DataSettings,
    settings: EvalSettings,
    *,
    flags: Mapping[str, Any],
    arguments: Mapping[str, Any],
    finetune: str = "",
) -> list[dict[str, float]]:
    """Accuracy of ``--resume`` at some widths; no training images are needed.

    Args:
        flags: what the user says of the network, see ``arguments.given``; a checkpoint says the rest.
        arguments: all flags, for the record.
        finetune: weights to start from where there is no checkpoint.
    """
    content = read_checkpoint(run.resume) if run.resume else {}
    grid = resolve_grid(flags, recorded_arguments(content), run.resume)
    flags = {**flags, **grid.arguments}
    trained = load_trained(content, run.resume, flags=flags) if run.resume else _untrained(data, flags, finetune)
    model, ratios = trained.model, grid.ratios if trained.ratios is None else trained.ratios
    if not isinstance(settings.eval_ratio, str):
        ratios = trained.choose(settings.eval_ratio, allow_untrained=settings.allow_untrained, flag="width ratio")
    for ratio in ratios:
        model.check_ratio(ratio)
    data = replace(data, input_size=trained.input_size)
    batches = build_loaders(data, classes=model.num_classes, eval_batch_size=int(1.5 * data.batch_size))
    check_trained_classes(content, batches.held_out, run.resume)
    model.to(world.device)
    calibrate(model, ratios, data, settings.calibrate_batches, world.device)
    if run.compile:
        allow_widths(len(ratios))
        model = torch.compile(model)
    failed: dict[str, str] = {}
    rows = sweep(model, batches.held_out, ratios, device=world.device, amp=run.amp, failed=failed)
    known = {**arguments, **grid.arguments, "model": trained.name, "input_size": trained.input_size}
    write(rows, run.output_dir, known)
    check_numbers(failed)
    return rows


def _untrained(data: DataSettings, flags: Mapping[str, Any], finetune: str) -> Trained:
    """A network that the flags alone describe, with random weights or those of ``--finetune``."""
    if not finetune:
        logger.warning("no --resume FILE: the weights are random, so the accuracy means nothing")
    values: dict[str, Any] = {"model": DEFAULT_MODEL, "input_size": 224, "finetune": finetune, **flags}
    size = values["input_size"]
    classes = values.pop("num_classes", None) or num_classes(open_split(data, "val", eval_transform(size)))
    model = build_model(NetworkSettings(**values), classes)
    return Trained(model, WidthGrid(*(values[name] for name in DEFAULTS)).ratios, values["model"], size)


def calibrate(model: Any, ratios: Sequence[float], data: DataSettings, batches: int, device: torch.device) -> None:
    """Batch statistics for the widths that have none, from training images without augmentation.

    Raises:
        UsageError: such a width without ``--calibrate-batches``.
    """
    lacking = [ratio for ratio in ratios if isinstance(model, NarrowedNetwork) and not model.knows(ratio)]
    if lacking and not batches:
        raise UsageError(
            f"{type(model).__name__} keeps batch statistics per trained width and has none for "
            f"{', '.join(f'{ratio:g}' for ratio in lacking)}: give --calibrate-batches N, for instance 64"
        )
    for ratio in lacking:
        images = open_split(data, "train", eval_transform(data.input_size, crop_ratio=data.eval_crop_ratio))
        loader = train_loader(images, batch_size=data.batch_size, workers=data.workers, seed=data.seed)
        calibrate_(model, ratio, (batch.to(device) for batch, _ in islice(loader, batches)))
