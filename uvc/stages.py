"""Both stages from settings to the numbers of the table: data, network, loop, result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.data.build import Batches, check_trained_classes, class_names
from common.run.build import build_run, scaled_lr
from common.run.engine import StepInfo, evaluate
from common.run.errors import UsageError
from common.run.files import write_atomic
from common.run.launch import World
from common.run.program import get_logger, is_main
from common.run.settings import RunSettings
from uvc.build import build_objective, build_primal_dual, build_student
from uvc.cost_model import CostModel
from uvc.data import build_mix, open_batches
from uvc.draw_structure import draw_structure
from uvc.engine import FineTuning, JointTraining
from uvc.loading import Masked, file_stem, save_masked
from uvc.models import input_size
from uvc.models.gates import GatedTransformer
from uvc.schedules import warmup_factor
from uvc.settings import JointRun, PostRun
from uvc.structure import Structure

logger = get_logger(__name__)


def validate(model: GatedTransformer, batches: Batches, world: World, run: RunSettings) -> dict[str, float]:
    """Accuracy on the held-out images, under a progress bar where nothing else is done."""
    return evaluate(
        model, batches.held_out, device=world.device, amp=run.amp, title="validation", show_progress=run.eval
    )


def learn(settings: JointRun, world: World) -> dict[str, Any]:
    """Stage 1, or only the evaluation of what ``run.resume`` names; returns the last numbers."""
    run, student, course = settings.run, settings.student, settings.course
    folder = Path(run.output_dir) if run.output_dir else None
    batches = open_batches(settings, size=student.img_size or input_size(student.model_type))
    model = build_student(student, batches.classes).to(world.device)
    primal_dual = build_primal_dual(model, settings.primal_dual, seed=settings.data.seed)
    teacher = None if run.eval else settings.teacher
    criterion = build_objective(teacher, batches.classes, world.device, img_size=student.img_size)
    weights = [p for p in model.parameters() if p.requires_grad and p is not primal_dual.patches]
    optimizer = torch.optim.AdamW(weights, lr=settings.optimizer.lr, weight_decay=settings.optimizer.weight_decay)
    steps = course.num_epochs * (len(batches.train) if batches.train is not None else 1)
    factor = warmup_factor(course.decay_type, warmup_steps=course.warmup_steps, total_steps=steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    trainer = build_run(
        model, world, run, optimizer=optimizer, schedule=scheduler,
        epochs=course.num_epochs + course.official, clip_grad=settings.optimizer.clip_grad,
        arguments=settings.arguments, extra={"uvc": primal_dual}, metric=None, broadcast_buffers=False,
        find_unused_parameters=model.dist_token is not None and criterion.kind == "none",
        own_backward=True, schedule_every="step",
    )  # fmt: skip
    training = JointTraining(
        model=model, network=trainer.network, parts=settings.parts, optimizer=optimizer, scheduler=scheduler,
        primal_dual=primal_dual, criterion=criterion, mix=build_mix(settings.augmentation, batches.classes),
        settings=replace(course, total_steps=steps), record=trainer.record,
        folder=None if run.eval else folder, model_type=student.model_type, classes=class_names(batches.held_out),
    )  # fmt: skip
    training.enter(trainer.state.progress.epoch, trainer.state.progress.step)
    measure = partial(validate, model, batches, world, run)
    if batches.train is None:
        return finish(training.evaluate(measure), folder)
    row = trainer.fit(
        training.step, batches.train, evaluate_fn=partial(training.evaluate, measure),
        epoch_start=training.epoch_start, after_step=training.after_step,
    )  # fmt: skip
    if folder is not None and is_main():
        budget, left = 100 * settings.primal_dual.budget, 100 * training.deployed_ratio()
        title = f"{student.model_type}, budget {budget:g} %: {left:.2f} % remain"
        structure = Structure.from_model(model, remove_patches=primal_dual.patches is not None)
        write_atomic(folder / "structure.png", draw_structure(structure, title=title))
    metrics = {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_")}
    return finish(metrics, folder, remark=" (before post_train.py, whose accuracy counts)")


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
    run = settings.run
    if run.eval and run.resume:
        raise UsageError(
            "--eval does not read --resume: give such a file to post_train.py --eval as --checkpoint_dir, which takes "
            "last.pth and best.pth too"
        )
    folder = Path(run.output_dir) if run.output_dir else None
    model = masked.model.to(world.device)
    cost, size = describe(masked), model.image_size[0]
    batches = open_batches(settings, size=size, data_rate=data_rate)
    classes = batches.classes
    if classes != model.num_classes:
        raise UsageError(
            f"the network has {model.num_classes} classes, the data {classes}: is this the data set it was made with?"
        )
    check_trained_classes({"data": masked.data}, batches.held_out, masked.source)
    criterion = build_objective(None if run.eval else settings.teacher, classes, world.device, img_size=size)
    tuning = FineTuning(
        model=model, criterion=criterion, mix=build_mix(settings.augmentation, classes), parts=settings.parts,
        before_step=before_step, observe=observe,
    )  # fmt: skip

    def test() -> dict[str, float]:
        tuning.apply_masks()
        return validate(model, batches, world, run)

    if batches.train is None:
        return finish({**test(), **cost}, folder)
    if check_length is not None:
        check_length(len(batches.train) * settings.schedule.epochs)
    rate = scaled_lr(settings.optimizer.lr, batch_size=settings.data.batch_size, world_size=world.size)
    trainer = build_run(
        model, world, run, optimizer=replace(settings.optimizer, lr=rate), schedule=settings.schedule,
        arguments=settings.arguments, broadcast_buffers=False, own_backward=True,
        find_unused_parameters=model.dist_token is not None and criterion.kind == "none",
    )  # fmt: skip
    state, manager, tuning.network = trainer.state, trainer.manager, trainer.network
    if run.resume:
        model.fix_blocks()
        tuning.find_masked()
    tuning.steps = state.progress.step

    def test_and_keep() -> dict[str, float]:
        """Evaluate; the best masked weights so far get a file of their own."""
        metrics = test()
        better = manager is not None and manager.improves(metrics["top1_percent"], state.progress.best)
        if better and folder is not None and is_main():
            save_masked(
                folder / f"{file_stem(masked.model_type)}.pth.tar", model, model_type=masked.model_type,
                patch_mode=model.gates.patch, epoch=state.progress.epoch + 1, metrics={**metrics, **cost},
                data={"classes": class_names(batches.held_out)},
            )  # fmt: skip
        return metrics

    if not run.resume:
        logger.info("top-1 before training: %.3f %%", test()["top1_percent"])
    trainer.fit(tuning.step, batches.train, evaluate_fn=test_and_keep, after_step=tuning.after_step)
    best = state.progress.best
    return finish({**({"top1_percent": best} if best is not None else test()), **cost}, folder)


def describe(masked: Masked) -> dict[str, float]:
    """Log and return what survives, and its share of the cost."""
    model = masked.model
    structure = Structure.from_model(model)
    ratio, blocks = CostModel(model).of_structure(structure), len(structure.running)
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
