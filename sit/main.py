"""Train a slimmed network with feature recalibration distillation, train its teacher, or evaluate either.

    torchrun --nproc_per_node=8 sit/main.py --model sit_lvvit_tiny --teacher-model sit_lvvit_tiny \
        --teacher-path teacher.pth --finetune teacher.pth --data-path DIR --output_dir output/sit_t \
        --batch-size 128 --epochs 125 --lr 2e-4 --drop-path 0
    python sit/main.py --eval --model sit_lvvit_tiny --finetune checkpoint.pth --data-path DIR

Writes checkpoint.pth after every epoch and best_checkpoint.pth (both resumable with --resume), log.jsonl with every
term, and log.txt with the published keys. The last line printed is the accuracy of the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.paths import check_data_path
from common.run.files import check_files, check_output
from common.run.program import get_logger, is_main, run
from sit import arguments
from sit.arguments import Job

if TYPE_CHECKING:
    from common.run.launch import World

logger = get_logger(__name__)


parse_args = partial(arguments.parse_args, description=__doc__)


def evaluate_checkpoint(job: Job, world: World) -> dict[str, float]:
    """Accuracy of --finetune, or of --resume; prints the published lines and writes results.json to --output_dir."""
    import torch

    from common.data.build import build_loaders, check_trained_classes
    from sit import build, engine
    from sit.loading import read_weights

    file = read_weights(job.own.finetune, key=job.own.finetune_key)
    batches = build_loaders(
        job.data, classes=job.own.num_classes or file.classes, eval_batch_size=int(1.5 * job.data.batch_size)
    )
    check_trained_classes({"data": file.data}, batches.held_out, file.source)
    model = build.build_student(job.own, batches.classes, file, evaluates=True)
    model = build.deployed(model.to(world.device), fold_batch_norm=False)
    network: Any = torch.compile(model) if job.run.compile else model
    result = engine.evaluate(batches.held_out, network, world.device, amp=job.run.amp)
    report(job, world, result)
    return result


def report(job: Job, world: World, result: dict[str, float]) -> None:
    """The published lines, the number of the table last, and the same as a file."""
    from common.measure.benchmark import describe_device
    from common.run.files import write_atomic
    from sit.engine import full_summary_line

    if not world.is_main:
        return
    print(full_summary_line(result))
    if job.run.output_dir:
        content = {"result": result, "arguments": job.arguments, "processes": world.size}
        text = json.dumps(content | {"device": describe_device(world.device)}, indent=1, default=str)
        write_atomic(Path(job.run.output_dir, "results.json"), text + "\n")
    print(f"Accuracy of the network on the {result['images']} test images: {result['acc1']:.1f}%", flush=True)


def train_model(job: Job, world: World) -> dict[str, float]:
    """All epochs and those of the cooldown; returns the last one's row."""
    from common.data.build import build_loaders
    from common.run.build import build_average, build_optimizer, build_run
    from sit import build, engine
    from sit.loading import read_weights
    from sit.meters import Logs, published_log

    own, schedule = job.own, job.schedule
    batches = build_loaders(
        job.data, None if own.token_label_data else job.augmentation, classes=own.num_classes,
        eval_batch_size=int(1.5 * job.data.batch_size),
    )  # fmt: skip
    file = read_weights(own.finetune, key=own.finetune_key) if own.finetune else None
    model = build.build_student(own, batches.classes, file, evaluates=False).to(world.device)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    logger.info("number of params: %d", trained)
    trainer = build_run(
        model, world, job.run,
        optimizer=build_optimizer(engine.get_param_groups(model, job.optimizer.weight_decay), job.optimizer),
        schedule=None, epochs=schedule.epochs + schedule.cooldown_epochs, cooldown_epochs=schedule.cooldown_epochs,
        average=build_average(model, job.optimizer), clip_grad=job.optimizer.clip_grad, arguments=job.arguments,
        start_epoch=own.start_epoch, files=("checkpoint.pth", "best_checkpoint.pth"),
        published=("log.txt", partial(published_log, n_parameters=trained)),
        wrapped=build.wrapped(own, model), units=("rtsm",),
        show_progress=not own.print_freq,
    )  # fmt: skip
    assert trainer.network is not None
    step = build.build_step(job, model, trainer.network, world)
    images = batches.train or build.label_loader(own.token_label_data, job.data, job.augmentation)
    logs = Logs(step, batches=len(images), print_freq=own.print_freq)

    def epoch_start(epoch: int) -> None:
        groups, peak = trainer.optimization.optimizer.param_groups, job.optimizer.lr
        rates = engine.adjust_learning_rate(
            groups, peak, schedule.min_lr, epoch, schedule.epochs, warmup=own.linear_warmup
        )
        logs.begin_epoch()
        logger.info(engine.rates_line(*rates))

    test = partial(engine.evaluate_both, trainer.state, batches.held_out, world.device, amp=job.run.amp)
    row = trainer.fit(logs.step, images, evaluate_fn=test, epoch_start=epoch_start, after_step=logs.after_step)
    if is_main() and row:
        best = trainer.state.progress.best
        print(f"Max accuracy: {row['test_acc1'] if best is None else best:.2f}%")
    return row


def run_with(args: argparse.Namespace) -> dict[str, float]:
    """What one process does."""
    check_output(args.output_dir, folder=True)
    check_files(args.finetune, "" if args.eval else args.teacher_path)
    check_files(args.resume, sharded=args.fsdp and not args.eval)
    check_data_path(args.data_set, args.data_path)
    from common.run.launch import launch, seed_everything
    from sit.build import check_flags

    world = launch(args.device, local_rank=args.local_rank)
    if args.eval:
        args.finetune = args.finetune or args.resume
    job = Job.of(args, processes=world.size, on_gpu=world.device.type == "cuda")
    check_flags(job)
    seed_everything(args.seed)
    return evaluate_checkpoint(job, world) if args.eval else train_model(job, world)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train or evaluate as the words of a command line say."""
    return run_with(parse_args(argv))


def __getattr__(name: str) -> Any:
    """``get_param_groups`` and ``adjust_learning_rate`` are published in this file."""
    if name in ("get_param_groups", "adjust_learning_rate"):
        from sit import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    run(main)
