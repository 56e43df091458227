"""From settings to the objects of a training run; data is opened by ``common.data.build``.

trainer = build_run(
    model, world, RunSettings.of(args),
    optimizer=OptimizerSettings.of(args, lr=peak), schedule=ScheduleSettings.of(args), arguments=vars(args),
)
step = partial(my_step, network=trainer.network)
row = trainer.fit(step, batches, evaluate_fn=test)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from timm.scheduler import create_scheduler_v2  # pyright: ignore[reportPrivateImportUsage] - likewise
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from common.run.checkpoint import CheckpointManager, Stateful, TrainingState
from common.run.engine import Trainer
from common.run.errors import UsageError
from common.run.launch import World, broadcast_tensors
from common.run.metrics import Record
from common.run.precision import make_scaler
from common.run.settings import OptimizerSettings, RunSettings, ScheduleSettings
from common.run.wrapping import prepare_network, shard


def scaled_lr(lr: float, *, batch_size: int, world_size: int, reference: int = 512) -> float:
    """DeiT's linear scaling: ``lr`` is for ``reference`` images per step over all processes."""
    return lr * batch_size * world_size / reference


def build_optimizer(
    model_or_groups: nn.Module | Sequence[Mapping[str, Any]],
    settings: OptimizerSettings,
    *,
    group_fn: Callable[[nn.Module], Any] | None = None,
) -> torch.optim.Optimizer:
    """timm's optimiser; of a model, one-dimensional weights, biases and its ``no_weight_decay()`` are not decayed.

    Args:
        model_or_groups: the bare model, or parameter groups, whose own ``weight_decay`` and ``lr`` count.
        settings: betas and epsilon of None are the optimiser's own.
        group_fn: makes the groups of a model by another rule.

    Raises:
        UsageError: a name that timm does not know, or one of apex's optimisers where apex does not import.
    """
    extra: dict[str, Any] = {}
    if settings.opt_eps is not None:
        extra["eps"] = settings.opt_eps
    if settings.opt_betas is not None:
        extra["betas"] = tuple(settings.opt_betas)
    try:
        return create_optimizer_v2(
            model_or_groups,  # pyright: ignore[reportArgumentType] - timm names only the mutable kinds of groups
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            param_group_fn=group_fn,
            **extra,
        )
    except (AssertionError, ImportError, ValueError) as error:
        if settings.opt.lower().startswith("fused"):
            plain = settings.opt.lower().removeprefix("fused")
            raise UsageError(
                f"--opt {settings.opt} is one of apex's optimisers, which need a CUDA device and "
                f"https://github.com/NVIDIA/apex built with --cuda_ext ({error}); --opt {plain} is the same in torch"
            ) from error
        raise UsageError(f"--opt {settings.opt}: {error}") from error


def build_schedule(optimizer: torch.optim.Optimizer, settings: ScheduleSettings) -> tuple[Scheduler, int]:
    """timm's schedule, one step per epoch, and the number of epochs with the cooldown.

    The cosine is not shifted by the warm-up: the first epoch after it is already ``warmup_epochs`` down the curve.
    """
    noise = settings.lr_noise
    scheduler, total = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        cooldown_epochs=settings.cooldown_epochs,
        decay_epochs=settings.decay_epochs,  # pyright: ignore[reportArgumentType] - timm takes fractions too
        decay_rate=settings.decay_rate,
        patience_epochs=settings.patience_epochs,
        noise=list(noise) if noise is not None else None,  # pyright: ignore[reportArgumentType] - one or two numbers
        noise_pct=settings.lr_noise_pct,
        noise_std=settings.lr_noise_std,
        noise_seed=settings.noise_seed,
    )
    if scheduler is None:
        raise UsageError(f"--sched {settings.sched!r} is not known to timm")
    return scheduler, total


def build_average(model: nn.Module, settings: OptimizerSettings) -> ModelEmaV3 | None:
    """``--model-ema``: the moving average of the weights, or None; call it on every rank.

    It begins with rank 0's weights, which become those of all: seeds differ, and DistributedDataParallel comes later.
    """
    if not settings.model_ema:
        return None
    broadcast_tensors((*model.parameters(), *model.buffers()))
    where = torch.device("cpu") if settings.model_ema_force_cpu else None
    return ModelEmaV3(model, settings.model_ema_decay, device=where)


def build_run(
    model: nn.Module,
    world: World,
    settings: RunSettings,
    *,
    optimizer: OptimizerSettings | torch.optim.Optimizer,
    schedule: ScheduleSettings | Stateful | None,
    epochs: int | None = None,
    cooldown_epochs: int = 0,
    average: ModelEmaV3 | None = None,
    clip_grad: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    extra: Mapping[str, Stateful] | None = None,
    start_epoch: int = 0,
    metric: str | None = "top1_percent",
    higher_is_better: bool = True,
    files: tuple[str, str] = ("last.pth", "best.pth"),
    published: tuple[str, Callable[[list[dict[str, Any]]], str]] | None = None,
    resume: Callable[[TrainingState], object] | None = None,
    wrapped: nn.Module | None = None,
    units: Sequence[str] = (),
    find_unused_parameters: bool = False,
    broadcast_buffers: bool = True,
    **options: Any,
) -> Trainer:
    """Optimiser, schedule, average, scaler, state (resumed where told), what runs under the gradient exchange, files.

    Args:
        model: bare, on its device.
        optimizer: settings for timm's optimiser, which bring average and clipping too; or an optimiser, with
            ``average`` and ``clip_grad`` where wanted.
        schedule: settings for timm's schedule, which bring the number of epochs; or a scheduler (None for rates set by
            hand) with ``epochs`` in total, ``cooldown_epochs`` of them cooldown.
        arguments: the flags, for the record and the checkpoints.
        extra: a paper's own state by name.
        start_epoch: of a new run.
        metric, higher_is_better: what of an evaluation decides which state is best.
        files: names of the last and the best state in ``--output-dir``.
        published: a file beside ``log.jsonl`` in ``--output-dir``; see ``common.run.metrics.Record``.
        resume: instead of ``--resume``'s own reading; called with the state.
        wrapped: the module around ``model`` that the step calls, where it is not ``model`` itself; under ``--fsdp`` it
            runs the model's weights :func:`common.run.wrapping.within` it.
        units: see ``common.run.wrapping.shard``.
        find_unused_parameters, broadcast_buffers: see ``prepare_network``.
        options: further fields of ``Trainer``: own_backward, train_mode, schedule_every, show_progress.
    """
    if isinstance(optimizer, OptimizerSettings):
        average, clip_grad = average or build_average(model, optimizer), optimizer.clip_grad
        optimizer = build_optimizer(model, optimizer)
    if isinstance(schedule, ScheduleSettings):
        cooldown_epochs = schedule.cooldown_epochs
        schedule, epochs = build_schedule(optimizer, schedule)
    if epochs is None:
        raise TypeError("a scheduler that is built already needs epochs=")
    mesh = None
    if settings.fsdp:
        if average is not None and average.device is not None:
            raise UsageError("--fsdp keeps the average with the weights it divides: leave --model-ema-force-cpu out")
        mesh = shard(model, world, optimizer, also=units)
        if average is not None:
            shard(average.module, world, also=units)
            average.foreach &= not any(True for _ in model.buffers())  # torch takes no list of both kinds of tensors
    state = TrainingState(
        model, optimizer, schedule, make_scaler(settings.amp, world.device), average, dict(extra or {}),
        dict(arguments or {}), world.device, mesh=mesh,
    )  # fmt: skip
    state.progress.epoch = start_epoch
    folder = Path(settings.output_dir) if settings.output_dir else None
    last, best = files
    manager = None
    if folder:
        manager = CheckpointManager(
            folder, metric=metric, higher_is_better=higher_is_better, last=last, best=best, sharded=settings.fsdp
        )
        if not settings.eval:
            manager.lock()
    if resume is not None:
        resume(state)
    elif settings.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, settings.resume)
    network = wrapped or model
    if not settings.fsdp:
        network = prepare_network(
            network, world, compiled=settings.compile, broadcast_buffers=broadcast_buffers,
            find_unused_parameters=find_unused_parameters,
        )  # fmt: skip
    record = None
    if folder and not settings.eval:
        board = folder / "tensorboard" if settings.tensorboard else None
        record = Record(folder / "log.jsonl", tensorboard=board, published=published)
    return Trainer(
        state, world, epochs, network, amp=settings.amp, clip_grad=clip_grad, cooldown_epochs=cooldown_epochs,
        manager=manager, record=record, save_every_steps=settings.save_every_steps,
        log_every_steps=settings.log_every_steps, **options,
    )  # fmt: skip
