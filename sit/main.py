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
import copy
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3

from common.data.loaders import DataError, Loader
from common.measure.benchmark import describe_device
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState
from common.run.engine import NonFiniteLoss, train
from common.run.files import write_atomic
from common.run.launch import World, launch, seed_everything
from common.run.program import get_logger, is_main, run
from sit import build
from sit.arguments import parse_args as parse_flags
from sit.engine import adjust_learning_rate, evaluate, rates_line, summary_line
from sit.meters import Logs
from sit.models import LVViT

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of a command line; see ``sit.arguments``."""
    return parse_flags(argv, __doc__)


def evaluate_checkpoint(args: argparse.Namespace, world: World) -> dict[str, float]:
    """Accuracy of --finetune, or of --resume; prints the published lines and writes results.json to --output_dir."""
    if not args.finetune and not args.resume:
        raise build.FlagError("--eval needs weights: --finetune FILE, or --resume FILE of a training run")
    loader, classes = build.build_eval_loader(args, world)
    args.finetune = args.finetune or args.resume
    model = build.build_student(args, classes).to(world.device).deployed(fold_batch_norm=False)
    network: Any = torch.compile(model) if args.compile else model
    result = evaluate(loader, network, world.device, amp=build.resolve_amp(args, world))
    report(args, world, result)
    return result


def report(args: argparse.Namespace, world: World, result: dict[str, float]) -> None:
    """The published lines, the number of the table last, and the same as a file."""
    if not world.is_main:
        return
    print(summary_line(result))
    if args.output_dir:
        content = {"result": result, "arguments": vars(args), "processes": world.size}
        text = json.dumps(content | {"device": describe_device(world.device)}, indent=1, default=str)
        write_atomic(Path(args.output_dir, "results.json"), text + "\n")
    print(f"Accuracy of the network on the {result['images']} test images: {result['acc1']:.1f}%", flush=True)


def make_state(args: argparse.Namespace, model: LVViT, world: World) -> TrainingState:
    """Model, optimiser and, with --model-ema, the average of the weights."""
    average = None
    if args.model_ema:
        where = torch.device("cpu") if args.model_ema_force_cpu else None
        average = ModelEmaV3(model, args.model_ema_decay, device=where)
    optimizer = build.build_optimizer(args, model)
    state = TrainingState(model, optimizer, ema=average, arguments=vars(args), device=world.device)
    state.progress.epoch = args.start_epoch
    return state


def evaluate_both(state: TrainingState, loader: Loader, world: World, amp: str) -> dict[str, float]:
    """Accuracy of the weights and, under ``ema_``, of their average."""
    result = evaluate(loader, state.model, world.device, amp=amp, show_progress=False)
    average: Any = state.ema
    if average is not None:
        smoothed = average.module
        if next(smoothed.parameters()).device != world.device:  # --model-ema-force-cpu
            smoothed = copy.deepcopy(smoothed).to(world.device)
        smooth = evaluate(loader, smoothed, world.device, amp=amp, show_progress=False)
        result |= {f"ema_{name}": smooth[name] for name in ("loss", "acc1", "acc5")}
    if is_main():
        print(summary_line(result), flush=True)
    return result


def train_model(args: argparse.Namespace, world: World) -> dict[str, float]:
    """All epochs and those of the cooldown; returns the last one's row."""
    amp = build.resolve_amp(args, world)
    test_batches, classes = build.build_eval_loader(args, world)
    model = build.build_student(args, classes).to(world.device)
    if args.token_label_data:
        model.aux_head.requires_grad_(True)
    state = make_state(args, model, world)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    logger.info("number of params: %d", trained)
    epochs = args.epochs + args.cooldown_epochs
    cooldown = f": {args.epochs} and a cooldown of {args.cooldown_epochs} at --min-lr (--cooldown-epochs)"
    logger.info("training %d epochs%s", epochs, cooldown if args.cooldown_epochs else "")
    folder = Path(args.output_dir) if args.output_dir else None
    manager = CheckpointManager(folder, last="checkpoint.pth", best="best_checkpoint.pth") if folder else None
    if args.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, args.resume)
    network, step = build.build_step(args, model, world, amp)
    batches = build.build_train_loader(args, world)
    logs = Logs(folder, trained, batches=len(batches), print_freq=args.print_freq, step=step,
                tensorboard=args.tensorboard)  # fmt: skip
    peak = build.peak_rate(args, world)

    def epoch_start(epoch: int) -> None:
        groups = state.optimizer.param_groups  # pyright: ignore
        rates = adjust_learning_rate(groups, peak, args.min_lr, epoch, args.epochs, warmup=args.linear_warmup)
        logs.begin_epoch()
        logger.info(rates_line(*rates))

    row = train(
        logs.step, state, batches, world=world, epochs=epochs, network=network, amp=amp,
        clip_grad=args.clip_grad, evaluate_fn=partial(evaluate_both, state, test_batches, world, amp),
        manager=manager, record=logs.record, save_every_steps=args.save_every_steps,
        log_every_steps=args.log_every_steps, epoch_start=epoch_start, after_step=logs.after_step,
        show_progress=not args.print_freq,
    )  # fmt: skip
    if is_main() and row:
        print(f"Max accuracy: {state.progress.best if state.progress.best is not None else row['test_acc1']:.2f}%")
    return row


def run_with(args: argparse.Namespace) -> dict[str, float]:
    """What one process does."""
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    world = launch(args.device, local_rank=args.local_rank)
    build.check_flags(args, world)
    seed_everything(args.seed)
    return evaluate_checkpoint(args, world) if args.eval else train_model(args, world)


EXPECTED = (DataError, CheckpointError, NonFiniteLoss, build.FlagError)
"""Errors whose message says all; see ``common.run.launch.run``."""


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train or evaluate as the words of a command line say."""
    return run_with(parse_args(argv))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=EXPECTED)
