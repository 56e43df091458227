"""Both stages from settings to the numbers of the table: data, network, optimiser, loop, result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.data.loaders import eval_loader, num_classes, train_loader
from common.run import cli
from common.run.checkpoint import CheckpointManager, TrainingState
from common.run.engine import StepInfo, prepare_network, train
from common.run.errors import UsageError
from common.run.files import write_atomic
from common.run.launch import World
from common.run.metrics import Record
from common.run.program import get_logger, is_main
from uvc.build import build_objective, build_primal_dual, build_student
from uvc.cost_model import CostModel
from uvc.data import build_mix, first_of_each_class, open_datasets
from uvc.draw_structure import draw_structure
from uvc.engine import FineTuning, JointTraining
from uvc.loading import Masked, save_masked
from uvc.models import input_size
from uvc.models.gates import GatedTransformer
from uvc.schedules import warmup_factor
from uvc.settings import JointRun, PostRun, Run
from uvc.structure import Structure

logger = get_logger(__name__)


def learn(settings: JointRun, world: World) -> dict[str, Any]:
    """Stage 1, or only the evaluation of what ``run.resume`` names; returns the last numbers."""
    data, run, student = settings.data, settings.run, settings.student
    size = student.img_size or input_size(student.model_type)
    images, held_out = open_datasets(data.dataset, data.data_dir, size, only_evaluate=run.eval)
    classes = num_classes(held_out)
    test_batches = eval_loader(held_out, batch_size=data.eval_batch_size, workers=data.num_workers)
    model = build_student(student, classes).to(world.device)
    primal_dual = build_primal_dual(model, settings.primal_dual, seed=data.seed)
    learned = settings.primal_dual.learn_patches
    weights = [p for p in model.parameters() if p.requires_grad and not (learned and p is model.patch_gating)]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    batches = None
    if images is not None:
        batches = train_loader(images, batch_size=data.train_batch_size, workers=data.num_workers, seed=data.seed)
    steps = settings.num_epochs * (len(batches) if batches is not None else 1)
    factor = warmup_factor(settings.decay_type, warmup_steps=settings.warmup_steps, total_steps=steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    state = TrainingState(
        model, optimizer, scheduler, extra={"uvc": primal_dual}, arguments=dict(run.arguments), device=world.device
    )  # fmt: skip
    manager = CheckpointManager(run.folder, metric=None) if run.folder else None
    if run.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, run.resume)
    teacher = None if run.eval else settings.teacher
    criterion = build_objective(teacher, classes, world.device, img_size=student.img_size)
    record = open_record(run)
    training = JointTraining(
        model, wrap(model, world, run, learns=criterion.kind != "none"), optimizer=optimizer, scheduler=scheduler,
        primal_dual=primal_dual, criterion=criterion, mix=build_mix(classes, settings.mixing),
        settings=replace(settings.course, total_steps=steps), record=record,
        folder=None if run.eval else run.folder, model_type=student.model_type,
    )  # fmt: skip
    training.enter(state.progress.epoch, state.progress.step)
    test = partial(training.evaluate, test_batches, world, amp=run.amp)
    if batches is None:
        return finish(test(show_progress=True), run.folder)
    row = train(
        training.step, state, batches, world=world, epochs=settings.num_epochs + settings.course.official,
        network=training.network, amp=run.amp, clip_grad=run.max_grad_norm, own_backward=True,
        schedule_every="step", evaluate_fn=test, manager=manager, record=record,
        save_every_steps=run.save_every_steps, log_every_steps=run.log_every_steps or settings.course.log_interval,
        epoch_start=training.epoch_start, after_step=training.after_step,
    )  # fmt: skip
    if run.folder is not None and is_main():
        budget, left = 100 * settings.primal_dual.budget, 100 * training.deployed_ratio()
        title = f"{student.model_type}, budget {budget:g} %: {left:.2f} % remain"
        write_atomic(run.folder / "structure.png", draw_structure(training.structure(), title=title))
    metrics = {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_")}
    return finish(metrics, run.folder, remark=" (before post_train.py, whose accuracy counts)")


def fine_tune(
    settings: PostRun,
    masked: Masked,
    world: World,
    *,
    before_step: Callable[[int], bool] | None = None,
    observe: Callable[[StepInfo], dict[str, float]] | None = None,
    data_rate: float = 1.0,
    check_length: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Stage 2: train a masked network, or only evaluate it; returns the best accuracy and the cost.

    Args:
        settings: of the run.
        masked: from ``build.load_network``; it moves to this process's device.
        world: from ``launch``.
        before_step, observe: see ``FineTuning``.
        data_rate: share of each class's training images to take.
        check_length: gets the number of steps of the whole run before the first, to refuse one that is too short.
    """
    data, run, recipe = settings.data, settings.run, settings.recipe
    if run.eval and run.resume:
        raise UsageError(
            "--eval does not read --resume: give such a file to post_train.py --eval as --checkpoint_dir, which takes "
            "last.pth and best.pth too"
        )
    model = masked.model.to(world.device)
    cost = describe(masked)
    size = model.image_size[0]
    images, held_out = open_datasets(data.dataset, data.data_dir, size, only_evaluate=run.eval)
    classes = num_classes(held_out)
    if classes != model.num_classes:
        raise UsageError(
            f"the network has {model.num_classes} classes, the data {classes}: is this the data set it was made with?"
        )
    test_batches = eval_loader(held_out, batch_size=data.eval_batch_size, workers=data.num_workers)
    teacher = None if run.eval else settings.teacher
    criterion = build_objective(teacher, classes, world.device, img_size=size)
    tuning = FineTuning(
        model, wrap(model, world, run, learns=criterion.kind != "none"), criterion=criterion,
        mix=build_mix(classes, settings.mixing), parts=run.gradient_accumulation_steps, before_step=before_step,
        observe=observe,
    )  # fmt: skip
    test = partial(tuning.evaluate, test_batches, world, amp=run.amp)
    if images is None:
        return finish({**test(show_progress=True), **cost}, run.folder)

    images = first_of_each_class(images, data_rate)
    batches = train_loader(images, batch_size=data.train_batch_size, workers=data.num_workers, seed=data.seed)
    if check_length is not None:
        check_length(len(batches) * recipe.epochs)
    rate = cli.scaled_lr(recipe.learning_rate, batch_size=data.train_batch_size, world_size=world.size)
    optimizer = cli.build_optimizer(
        model, opt=recipe.opt, lr=rate, weight_decay=recipe.weight_decay, eps=recipe.opt_eps, betas=recipe.opt_betas,
        momentum=recipe.momentum,
    )  # fmt: skip
    scheduler, _ = cli.build_schedule(
        optimizer, epochs=recipe.epochs, sched=recipe.sched, warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr, min_lr=recipe.min_lr, cooldown_epochs=0, decay_epochs=recipe.decay_epochs,
        decay_rate=recipe.decay_rate, patience_epochs=recipe.patience_epochs, noise=recipe.lr_noise,
        noise_pct=recipe.lr_noise_pct, noise_std=recipe.lr_noise_std,
    )  # fmt: skip
    state = TrainingState(model, optimizer, scheduler, arguments=dict(run.arguments), device=world.device)
    manager = CheckpointManager(run.folder) if run.folder else None
    if run.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, run.resume)
        model.fix_blocks()
        tuning.find_masked()
    tuning.steps = state.progress.step

    def test_and_keep() -> dict[str, float]:
        """Evaluate; the best masked weights so far get a file of their own."""
        metrics = test()
        better = manager is not None and manager.improves(metrics["top1_percent"], state.progress.best)
        if better and run.folder is not None and is_main():
            save_masked(
                run.folder / f"{masked.model_type}.pth.tar", model, model_type=masked.model_type,
                patch_mode=model.gates.patch, epoch=state.progress.epoch + 1, metrics={**metrics, **cost},
            )  # fmt: skip
        return metrics

    if not run.resume:
        logger.info("top-1 before training: %.3f %%", test()["top1_percent"])
    train(
        tuning.step, state, batches, world=world, epochs=recipe.epochs, network=tuning.network, amp=run.amp,
        clip_grad=run.max_grad_norm, own_backward=True, evaluate_fn=test_and_keep, manager=manager,
        record=open_record(run), save_every_steps=run.save_every_steps, log_every_steps=run.log_every_steps,
        after_step=tuning.after_step,
    )  # fmt: skip
    best = state.progress.best
    return finish({**({"top1_percent": best} if best is not None else test()), **cost}, run.folder)


def wrap(model: GatedTransformer, world: World, run: Run, *, learns: bool) -> nn.Module:
    """What the training step calls; without a teacher a distillation head gets no gradient."""
    unused = getattr(model, "head_dist", None) is not None and not learns
    return prepare_network(model, world, compiled=run.compile, find_unused_parameters=unused, broadcast_buffers=False)


def open_record(run: Run) -> Record | None:
    """The record of a run that trains and has a folder."""
    if run.folder is None or run.eval:
        return None
    return Record(run.folder / "log.jsonl", tensorboard=run.folder / "tensorboard" if run.tensorboard else None)


def describe(masked: Masked) -> dict[str, float]:
    """Log and return what survives, and its share of the cost."""
    model = masked.model
    structure = Structure.from_model(model)
    ratio, blocks = CostModel.of(model).of_structure(structure), len(structure.running)
    logger.info("%s: %d of %d blocks run, %.2f %% of the dense cost", masked.model_type, blocks, len(model.blocks),
                100 * ratio)  # fmt: skip
    if blocks == 0:
        logger.warning("no block runs: the head sees the embedding alone, and its accuracy will be near chance")
    return {"remaining_cost_percent": 100 * ratio, "blocks_running": blocks}


def finish(metrics: Mapping[str, Any], folder: Path | None, *, remark: str = "") -> dict[str, Any]:
    """Write the numbers of the table and print them in the last line."""
    if metrics and is_main():
        if folder is not None:
            write_atomic(folder / "result.json", json.dumps(metrics, indent=1))
        names = {"top1_percent": "top-1 {:.3f} %", "remaining_cost_percent": "remaining cost {:.2f} %"}
        names |= {"top5_percent": "top-5 {:.3f} %", "loss": "loss {:.4f}"}
        print(", ".join(text.format(metrics[name]) for name, text in names.items() if name in metrics) + remark)
    return dict(metrics)
