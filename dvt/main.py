"""Train a cascade with three exits, or a network with one, or evaluate a checkpoint.

    torchrun --nproc_per_node=8 dvt/main.py DIR --model DVT_T2t_vit_12 -b 128 --lr 2e-3 --weight-decay .03 --amp
    python dvt/main.py DIR --model DVT_T2t_vit_12 --eval_checkpoint FILE
    python dvt/main.py --model DVT_desk

Results go to ./output/train/<time>-<model>-<size>/: last.pth.tar and model_best.pth.tar (for --resume and
--eval_checkpoint), args.yaml, summary.csv, log.jsonl, results.json. The learning rate is absolute: nothing scales it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from common.data.loaders import DataError
from common.run import cli
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState, plain
from common.run.engine import NonFiniteLoss, prepare_network, train
from common.run.files import write_atomic
from common.run.launch import launch, seed_everything
from common.run.program import get_logger, is_main, run
from dvt import arguments
from dvt.checkpoints import load_weights, read, resume
from dvt.engine import evaluate_exits
from dvt.training import SummaryRecord, amp_mode, build_loaders, build_model, build_optimizer, build_step

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return arguments.parse_args(argv, __doc__)


def make_folder(args: argparse.Namespace) -> Path:
    """Where this run's results go; only rank 0 writes there."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(args.output or "output") / "train" / (args.experiment or f"{stamp}-{args.model}-{args.img_size}")
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "args.yaml", yaml.safe_dump(plain(vars(args))))
    return folder


def evaluate_both(test: Callable[..., dict[str, float]], model: nn.Module, ema: ModelEmaV3 | None) -> dict[str, float]:
    """Numbers of the averaged weights, by which states are chosen, and of the weights as ``raw_*``; as published."""
    raw = test(model)
    if ema is None:
        return raw
    return test(ema.module, title="test (EMA)") | {f"raw_{name}": raw[name] for name in raw if "exit" in name}


def report(result: dict[str, float], folder: Path | None) -> None:
    """Print the numbers of the table, and keep them."""
    if not is_main():
        return
    if folder is not None:
        write_atomic(folder / "results.json", json.dumps(result, indent=1) + "\n")
    shown = {name: value for name, value in result.items() if name.startswith(("exit", "loss"))}
    print("  ".join(f"{name} {value:.3f}" for name, value in shown.items()), flush=True)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, or with ``--eval_checkpoint`` only evaluate; returns the numbers of the (last) evaluation."""
    args = parse_args(argv)
    world = launch(args.device, local_rank=args.local_rank)
    amp = amp_mode(args, world.device)
    batches, held_out = build_loaders(args)
    model = build_model(args).to(world.device)
    seed_everything(args.seed)
    if args.num_classes < 5:
        logger.warning("top5 is taken over all %d classes", args.num_classes)
    test = partial(evaluate_exits, loader=held_out, device=world.device, amp=amp)
    if args.eval_checkpoint:
        load_weights(model, read(args.eval_checkpoint), source=args.eval_checkpoint, average=args.model_ema)
        result = test(model)
        report(result, Path(args.output) if args.output else None)
        return result

    optimizer = build_optimizer(args, model)
    scheduler, epochs = cli.build_schedule(
        optimizer, epochs=args.epochs, sched=args.sched, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, cooldown_epochs=args.cooldown_epochs, decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate, patience_epochs=args.patience_epochs, noise=args.lr_noise,
        noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std, seed=args.seed,
    )  # fmt: skip
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None)
    state = TrainingState(model, optimizer, scheduler, ema=ema, arguments=vars(args), device=world.device)
    folder = make_folder(args)
    metric = args.eval_metric
    manager = CheckpointManager(
        folder, metric=metric, higher_is_better=metric != "loss", last="last.pth.tar", best="model_best.pth.tar"
    )
    if args.resume == "auto":
        manager.resume(state)
    elif args.resume:
        resume(state, args.resume, optimizer=not args.no_resume_opt, start_epoch=args.start_epoch)
    network = prepare_network(model, world, compiled=args.compile, broadcast_buffers=False)  # constants, alike on all
    shadow = None if args.model_ema_force_cpu else ema
    row = train(
        build_step(args, network, state), state, batches, world=world, epochs=epochs, network=network, amp=amp,
        clip_grad=args.clip_grad, manager=manager,
        evaluate_fn=lambda: evaluate_both(partial(test, show_progress=False), model, shadow),
        record=SummaryRecord(folder / "log.jsonl", tensorboard=folder / "tensorboard" if args.tensorboard else None),
        save_every_steps=args.recovery_interval or None, log_every_steps=args.log_interval,
    )  # fmt: skip
    result = {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_")}
    if result:
        report(result, folder)
    return result


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss, ValueError))
