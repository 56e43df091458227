"""Fine-tune a trained cascade (or a network with one exit) on CIFAR-10, CIFAR-100 or another data set.

    python dvt/transfer_learning.py --model DVT_T2t_vit_12 --dataset cifar10 --data DIR --lr 0.05 --b 64 \\
        --transfer-learning True --transfer-model DVT_T2t_vit_12.pth.tar
    torchrun --nproc_per_node=2 dvt/transfer_learning.py --model T2t_vit_14 --dataset cifar100 --data DIR --lr 0.05 \\
        --b 64 --transfer-learning True --transfer-model T2t_vit_14.pth.tar

The recipe is T2T-ViT's, see ``cifar.py``. Results go to ``checkpoint_<dataset>_<model>/``: last.pth, best.pth (by the
last exit), log.jsonl and, at the end, ckpt_<lr>_<wd>_<accuracy>.pth with net, acc and epoch. Thresholds then
come from ``pack.py`` or ``inference.py --eval_mode 2`` with the same --model, --dataset and --num-classes.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.data.loaders import DataError, build_dataset, default_num_classes, eval_loader, train_loader
from common.run import cli
from common.run.checkpoint import (
    CheckpointError,
    CheckpointManager,
    TrainingState,
    load_safely,
    save_atomic,
    select_state,
)
from common.run.engine import NonFiniteLoss, prepare_network, train
from common.run.launch import launch, seed_everything
from common.run.metrics import Record
from common.run.program import get_logger, is_main, run
from dvt import cifar
from dvt.checkpoints import WEIGHT_KEYS, read
from dvt.engine import CascadeStep, evaluate_exits
from dvt.models import EXITS, MODELS, create_model

logger = get_logger(__name__)

IGNORED = {
    "--gp": "these networks have no global pooling",
    "--drop-connect": "--drop-path sets the rate",
    "--drop-block": "these networks have no such blocks",
    "--bn-momentum": "these networks have no batch normalisation",
    "--bn-eps": "these networks have no batch normalisation",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="DVT_T2t_vit_12", choices=sorted(MODELS), metavar="NAME", help="network, by published name")
    add("--dataset", default="cifar10", metavar="NAME",
        help="cifar10, cifar100, digits (without --data), folder, or a name for timm's create_dataset")  # fmt: skip
    add("--data", default="./data", metavar="DIR", help="folder of the data set (default: ./data)")
    add("--download", action="store_true", help="fetch the data set into --data if it is not there")
    add("--num-classes", type=cli.positive_int, default=None, help="classes (default: the data set's)")
    add("--img-size", type=cli.positive_int, default=None, metavar="PIXELS",
        help="side that pictures are resized to (default: 224, or the size of a desk network)")  # fmt: skip
    add("--b", "--batch-size", dest="batch_size", type=cli.positive_int, default=128, metavar="N",
        help="pictures per step, over all processes")  # fmt: skip
    add("--lr", type=cli.positive_float, default=0.01, help="learning rate of the heads")
    add("--transfer-ratio", type=cli.positive_float, default=0.01, help="the backbone's rate over that of the heads")
    add("--min-lr", type=float, default=2e-4, help="rate at the end of the cosine, of backbone and heads alike")
    add("--wd", type=float, default=5e-4, help="weight decay, of every tuned parameter")
    add("--epochs", type=cli.positive_int, default=60, help="epochs, and length of the cosine")
    add("--drop", type=cli.fraction, default=0.0, help="dropout")
    add("--drop-path", type=cli.fraction, default=0.1, help="rate of the last block")
    add("--hflip", type=cli.fraction, default=None, help="probability of a flip (default: 0.5; 0 for digits)")
    add("--transfer-learning", default="", metavar="WORD", help="any word: begin from --transfer-model, as published")
    add("--transfer-model", default="", metavar="FILE",
        help="checkpoint to begin from: packed, training, T2T-ViT's, or plain weights")  # fmt: skip
    add("-r", "--resume", action="store_true", help="continue from last.pth of the output folder")
    add("--output", type=Path, default=None, metavar="DIR", help="default: checkpoint_<dataset>_<model>")
    add("--workers", "-j", type=cli.count, default=4, help="loading processes per process")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, or cuda:N")
    add("--seed", type=cli.count, default=0, help="of all random numbers")
    add("--local-rank", "--local_rank", type=int, default=-1, help="set by torch.distributed.launch")
    cli.add_ignored_args(parser, IGNORED)
    args = parser.parse_args(argv)
    if args.transfer_learning and not args.transfer_model:
        parser.error("--transfer-learning needs --transfer-model FILE, the checkpoint to begin from")
    if args.transfer_model and not args.transfer_learning:
        parser.error("--transfer-model is used only with --transfer-learning True, as in T2T-ViT's script; give both")
    args.num_classes = args.num_classes or default_num_classes(args.dataset)
    args.img_size = args.img_size or MODELS[args.model].options.get("img_size", 224)
    args.hflip = (0.0 if args.dataset == "digits" else 0.5) if args.hflip is None else args.hflip
    name = args.dataset.replace("/", "_")
    args.output = args.output or Path(f"checkpoint_{name}_{args.model}")
    return args


def build_loaders(args: argparse.Namespace, world_size: int) -> tuple[Any, Any]:
    """Batches to train on and to test on; the test takes 100 pictures at once, as published."""
    if args.batch_size % world_size:
        raise ValueError(f"--b {args.batch_size} is the batch of all {world_size} processes: give a multiple of it")
    root = None if args.dataset == "digits" else args.data
    open_split = partial(build_dataset, args.dataset, root, download=args.download)
    held_out = eval_loader(open_split("val", cifar.test_picture(args.img_size)), batch_size=100, workers=args.workers)
    pictures = open_split("train", cifar.train_picture(args.img_size, hflip=args.hflip))
    batch = args.batch_size // world_size
    return train_loader(pictures, batch_size=batch, workers=args.workers, seed=args.seed), held_out


def build_model(args: argparse.Namespace) -> nn.Module:
    """The network, from the checkpoint where one is given."""
    torch.manual_seed(args.seed)
    model = create_model(
        args.model, num_classes=args.num_classes, img_size=args.img_size, drop_rate=args.drop,
        drop_path_rate=args.drop_path,
    )  # fmt: skip
    if args.transfer_model:
        state = select_state(read(args.transfer_model), WEIGHT_KEYS, source=args.transfer_model)
        fresh = cifar.load_backbone(model, state, source=args.transfer_model)
        logger.info("weights of %s; %s", args.transfer_model, f"new: {', '.join(fresh)}" if fresh else "heads kept")
    return model


def export_best(manager: CheckpointManager, args: argparse.Namespace, metric: str) -> Path:
    """Write the best state under the published name, with the published entries."""
    best = load_safely(manager.best)
    accuracy = float(best["progress"]["best"])
    path = args.output / f"ckpt_{args.lr}_{args.wd}_{accuracy}.pth"
    save_atomic({"net": best["model"], "acc": accuracy, "epoch": best["epoch"]}, path)
    logger.info("%s: best %s %.2f, epoch %d", path, metric, accuracy, best["epoch"])
    return path


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Fine-tune; returns the last epoch's accuracies and the best one."""
    args = parse_args(argv)
    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    batches, held_out = build_loaders(args, world.size)
    model = build_model(args).to(world.device)
    optimizer = cifar.build_optimizer(model, lr=args.lr, ratio=args.transfer_ratio, weight_decay=args.wd)
    scheduler = cifar.build_schedule(optimizer, epochs=args.epochs, min_lr=args.min_lr)
    state = TrainingState(model, optimizer, scheduler, arguments=vars(args), device=world.device)
    metric = f"exit{EXITS if MODELS[args.model].stages else 1}_top1"
    manager = CheckpointManager(args.output, metric=metric)
    if args.resume and not manager.resume(state):
        raise CheckpointError(f"--resume: there is no {manager.last}; leave the flag out to start a new run")
    network = prepare_network(model, world)
    row = train(
        CascadeStep(network, nn.CrossEntropyLoss(), progress=state.progress), state, batches, world=world,
        epochs=args.epochs, network=network, manager=manager, record=Record(args.output / "log.jsonl"),
        evaluate_fn=lambda: evaluate_exits(model, held_out, device=world.device, show_progress=False),
    )  # fmt: skip
    result = {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_exit")}
    assert state.progress.best is not None
    result["best_top1"] = state.progress.best
    if is_main():
        export_best(manager, args, metric)
        print("  ".join(f"{name} {value:.2f}" for name, value in result.items()), flush=True)
    return result


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss, ValueError))
