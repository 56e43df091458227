"""Train one Vision Transformer that runs at many widths, or evaluate it at any of them.

    torchrun --nproc_per_node=4 scala/main_scala.py --data-path DIR --batch-size 256 --epochs 100 --lr 2e-3 \\
        --model deit_small_distilled_patch16_224_scala --granularity 0.25 --output_dir log/scala_s_x4
    python scala/main_scala.py --eval --data-path DIR --model deit_small_distilled_patch16_224_scala \\
        --resume FILE --eval_ratio all

The commands of record are run.sh and eval.sh. Training writes checkpoint.pth and best_checkpoint.pth (resumable with
--resume auto), log.txt, log.jsonl and, at the end, the accuracy of every width: widths.json, widths.md, widths.png. The
last line printed is the accuracy in percent at the last width named, the largest one with --eval_ratio all.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3

from common.data.loaders import DataError, eval_loader, train_loader
from common.measure.flops import count_parameters
from common.run import cli
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState, load_safely
from common.run.engine import NonFiniteLoss, prepare_network, train
from common.run.launch import World, launch, seed_everything
from common.run.program import get_logger, run
from scala import arguments, building, sweep
from scala.building import SettingError
from scala.engine_scala import LaggingSchedule, ScaleCoordination, evaluate_width
from scala.record import ScalaRecord
from scala.slicing import WidthError, WidthGrid

logger = get_logger(__name__)

parse_args = partial(arguments.parse_args, description=__doc__)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or with ``--eval`` evaluate; returns the last width's row, with those of all under ``widths``."""
    args = parse_args(argv)
    world = launch(args.device, local_rank=args.local_rank)
    args.amp = args.amp or ("fp16" if world.device.type == "cuda" else "none")
    seed_everything(args.seed)
    args.pin_mem = args.pin_mem and world.device.type == "cuda"
    building.per_process_batch(args, world.size)
    folder = Path(args.output_dir) if args.output_dir else None
    rows = evaluate_checkpoint(args, world) if args.eval else train_widths(args, world, folder)
    if folder:
        sweep.write(rows, folder, vars(args))
    if world.is_main:
        print(sweep.table(rows))
        print(f"{rows[-1]['top1_percent']:.3f}")
    return {**rows[-1], "widths": rows}


def test_loader(args: argparse.Namespace) -> tuple[Any, int]:
    """The validation pictures, and the classes of the network."""
    held_out = building.open_split(args, "val")
    classes = building.count_classes(args, held_out)
    batch = int(1.5 * args.batch_size)
    return eval_loader(held_out, batch_size=batch, workers=args.workers, pin_memory=args.pin_mem), classes


def evaluate_checkpoint(args: argparse.Namespace, world: World) -> list[dict[str, float]]:
    """Accuracy of ``--resume`` at the widths of ``--eval_ratio``; no training pictures are needed."""
    content = building.read_checkpoint(args.resume) if args.resume else {}
    trained = building.trained_arguments(content)
    grid = building.resolve_grid(args, trained, args.resume)
    ratios = building.choose_ratios(args, grid, trained)
    batches, classes = test_loader(args)
    model = building.build_model(args, classes)
    for ratio in ratios:
        model.check_ratio(ratio)
    if args.resume:
        building.load_model(model, content, args.resume)
    elif not args.finetune:
        logger.warning("no --resume FILE: the weights are random, so the accuracy means nothing")
    model.to(world.device)
    building.calibrate(args, model, ratios, world.device)
    if args.compile:
        model = allow_widths(len(ratios)) and torch.compile(model)
    return sweep.sweep(model, batches, ratios, device=world.device, amp=args.amp)


def train_widths(args: argparse.Namespace, world: World, folder: Path | None) -> list[dict[str, float]]:
    """Train, resuming where told; then evaluate every trained width."""
    manager = None
    if folder:
        manager = CheckpointManager(folder, last="checkpoint.pth", best="best_checkpoint.pth")
    grid = resume_grid(args, manager)
    test_batches, classes = test_loader(args)
    model = building.build_model(args, classes)
    building.check_training(args, grid, model)
    model.to(world.device)
    logger.info("number of params: %d", count_parameters(model))
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None)
    mixup = building.build_mixup(args, classes)
    teacher = None
    if args.distillation_type != "none":
        teacher = building.build_teacher(args, classes).to(world.device)
    curve = building.build_curve(args, world.size)
    optimizer = cli.build_optimizer(
        model, opt=args.opt, lr=curve.base, weight_decay=args.weight_decay, eps=args.opt_eps, betas=args.opt_betas,
        momentum=args.momentum,
    )  # fmt: skip
    schedule = LaggingSchedule(optimizer, curve, start_epoch=args.start_epoch)
    state = TrainingState(model, optimizer, schedule, ema=ema, arguments=vars(args), device=world.device)
    state.progress.epoch = args.start_epoch
    if args.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, args.resume)
    batches = train_loader(
        building.open_split(args, "train"), batch_size=args.batch_size, workers=args.workers, seed=args.seed,
        repeated_aug=args.repeated_aug and world.size > 1, pin_memory=args.pin_mem,
    )  # fmt: skip
    if args.compile:
        allow_widths(len(grid.ratios))
    network = prepare_network(model, world, compiled=args.compile, find_unused_parameters=True)
    step = ScaleCoordination(
        network, building.build_losses(args, teacher, mixing=mixup is not None), grid, lambda: state.progress.epoch,
        full_warm_epoch=args.full_warm_epoch, transfer_type=args.transfer_type, augment=mixup,
        multi_hot=args.bce_loss, twice=args.cosub,
    )  # fmt: skip
    boards = folder / "tensorboard" if args.tensorboard and folder else None
    record = None
    if folder:
        record = ScalaRecord(folder / "log.jsonl", parameters=count_parameters(model), tensorboard=boards)
    test = partial(evaluate_width, model, test_batches, device=world.device, amp=args.amp)
    train(
        step, state, batches, world=world, epochs=args.epochs, network=network, amp=args.amp, clip_grad=args.clip_grad,
        own_backward=True, train_mode=args.train_mode, manager=manager, record=record,
        evaluate_fn=lambda: test(grid.largest, show_progress=False),
        save_every_steps=args.save_every_steps, log_every_steps=args.log_every_steps,
    )  # fmt: skip
    alone = args.full_warm_epoch >= args.epochs
    ratios = [grid.largest] if alone else grid.ratios
    rows = sweep.sweep(model, test_batches, ratios, device=world.device, amp=args.amp)
    for row in rows if record else ():
        assert record is not None
        record.write("width", {"step": state.progress.step, **row})
    return rows


def resume_grid(args: argparse.Namespace, manager: CheckpointManager | None) -> WidthGrid:
    """Bound and granularity, which a checkpoint to resume from must agree with."""
    source = args.resume
    if source == "auto":
        source = str(manager.last) if manager and manager.last.exists() else ""
    return building.resolve_grid(args, building.trained_arguments(load_safely(source) if source else {}), source)


def allow_widths(count: int) -> bool:
    """Let torch.compile keep one specialised graph per width."""
    import torch._dynamo.config as config  # only where it is used: importing it takes seconds

    config.specialize_float = True
    config.recompile_limit = max(config.recompile_limit, 4 * count + 8)
    return True


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss, SettingError, WidthError))
