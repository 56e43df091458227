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
from collections.abc import Sequence
from pathlib import Path

from common.data.paths import check_data_path
from common.run import cli
from common.run.errors import CheckpointError, UsageError
from common.run.files import check_files, check_output
from common.run.flags import Group
from common.run.program import get_logger, is_main, run
from common.run.settings import DataSettings, RunSettings
from dvt.arguments import DEAD_OPTIONS, add_network_args, network_options
from dvt.models import MODELS, check_filled

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, prog="transfer_learning.py")
    add_network_args(parser, MODELS, any_vit=False)
    add = Group(parser, "transfer")
    add("--dataset", str, "cifar10", metavar="NAME",
        help="cifar10, cifar100, digits and fashion (without --data), folder, or a name for timm's "
        "create_dataset")  # fmt: skip
    add("--data", str, "./data", "folder of the data set", metavar="DIR")
    add("--download", bool, False, "fetch the data set into --data if it is not there")
    add("--b --batch-size", cli.positive_int, 128, "images per step, over all processes", metavar="N",
        dest="batch_size")  # fmt: skip
    add("--lr", cli.positive_float, 0.01, "learning rate of the heads")
    add("--transfer-ratio", cli.positive_float, 0.01, "the backbone's rate over that of the heads")
    add("--min-lr", cli.not_negative, 2e-4, "rate at the end of the cosine, of backbone and heads alike")
    add("--wd", cli.not_negative, 5e-4, "weight decay, of every tuned parameter")
    add("--epochs", cli.positive_int, 60, "epochs, and length of the cosine")
    add("--drop", cli.fraction, 0.0, "dropout")
    add("--drop-path", cli.fraction, 0.1, "rate of the last block")
    add("--hflip", cli.fraction, None, "probability of a flip (default: 0.5; 0 for digits)")
    add("--transfer-learning", str, "", "any word: begin from --transfer-model, as published", metavar="WORD")
    add("--transfer-model", str, "", "checkpoint to begin from: packed, training, T2T-ViT's, or plain weights",
        metavar="FILE")  # fmt: skip
    add("-r --resume", bool, False, "continue from last.pth of the output folder")
    add("--output", Path, None, "folder of the results (default: checkpoint_<dataset>_<model>)", metavar="DIR")
    add("--workers -j", cli.count, cli.default_workers(4), "loading processes per process")
    add("--device", str, "auto", "auto (CUDA if there is one), cpu, cuda, or cuda:N")
    add("--seed", cli.count, 0, "of all random numbers")
    add("--local-rank --local_rank", int, -1, "set by torch.distributed.launch")
    cli.add_ignored_args(parser, DEAD_OPTIONS)
    args = parser.parse_args(argv)
    if args.transfer_learning and not args.transfer_model:
        parser.error("--transfer-learning needs --transfer-model FILE, the checkpoint to begin from")
    if args.transfer_model and not args.transfer_learning:
        parser.error("--transfer-model is used only with --transfer-learning True, as in T2T-ViT's script; give both")
    args.img_size = args.img_size or MODELS[args.model].img_size
    args.hflip = (0.0 if args.dataset == "digits" else 0.5) if args.hflip is None else args.hflip
    args.output = args.output or Path(f"checkpoint_{args.dataset.replace('/', '_')}_{args.model}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Fine-tune; returns the last epoch's accuracies and the best one."""
    args = parse_args(argv)
    last = args.output / "last.pth"
    if args.resume and not last.exists():
        raise CheckpointError(f"--resume: there is no {last}; leave the flag out to start a new run")
    check_filled(args.model, args.img_size)
    check_files(args.transfer_model)
    check_output(args.output, folder=True)
    if not args.download:
        check_data_path(args.dataset, args.data)
    import torch

    from common.data.build import check_same_classes, count_classes, open_split
    from common.data.loaders import eval_loader, train_loader
    from common.run.build import build_run
    from common.run.checkpoint import load_safely, read_checkpoint, save_atomic
    from common.run.launch import launch, seed_everything
    from dvt import cifar
    from dvt.engine import CascadeStep, evaluate_exits
    from dvt.loading import load_network

    world = launch(args.device, local_rank=args.local_rank)
    if args.batch_size % world.size:
        raise UsageError(f"--b {args.batch_size} is the batch of all {world.size} processes: give a multiple of it")
    content = read_checkpoint(args.transfer_model) if args.transfer_model else None
    seed_everything(args.seed)
    data = DataSettings.of(
        args, data_set=args.dataset, data_path=args.data, input_size=args.img_size,
        batch_size=args.batch_size // world.size,
    )  # fmt: skip
    held_out = open_split(data, "val", cifar.test_transform(args.img_size), download=args.download)
    transform = cifar.train_transform(args.img_size, hflip=args.hflip)
    images = open_split(data, "train", transform, download=args.download)
    check_same_classes(data.data_set, images, held_out)
    options = network_options(args)
    count_classes(data.data_set, images, options["num_classes"])
    batches = train_loader(images, batch_size=data.batch_size, workers=args.workers, seed=args.seed)
    tests = eval_loader(held_out, batch_size=100, workers=args.workers)  # as published
    torch.manual_seed(args.seed)
    model = load_network(
        args.model, content, source=args.transfer_model, new_heads=True, drop_rate=args.drop,
        drop_path_rate=args.drop_path, **options,
    ).to(world.device)  # fmt: skip
    optimizer = cifar.build_optimizer(model, lr=args.lr, ratio=args.transfer_ratio, weight_decay=args.wd)
    metric = f"exit{MODELS[args.model].exits}_top1"
    trainer = build_run(
        model, world, RunSettings(output_dir=str(args.output), resume="auto" if args.resume else ""),
        optimizer=optimizer, schedule=cifar.build_schedule(optimizer, epochs=args.epochs, min_lr=args.min_lr),
        epochs=args.epochs, arguments=vars(args), metric=metric,
    )  # fmt: skip
    assert trainer.network is not None
    assert trainer.manager is not None
    row = trainer.fit(
        CascadeStep(trainer.network, torch.nn.CrossEntropyLoss(), progress=trainer.state.progress), batches,
        evaluate_fn=lambda: evaluate_exits(model, tests, device=world.device, show_progress=False),
    )  # fmt: skip
    result = {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_exit")}
    best_top1 = trainer.state.progress.best
    assert best_top1 is not None
    result["best_top1"] = best_top1
    if is_main():  # the best state under the published name, with the published entries
        best = load_safely(trainer.manager.best)
        path = args.output / f"ckpt_{args.lr}_{args.wd}_{float(best_top1)}.pth"
        save_atomic({"net": best["model"], "acc": float(best_top1), "epoch": best["epoch"]}, path)
        logger.info("%s: best %s %.2f, epoch %d", path, metric, best_top1, best["epoch"])
        print("  ".join(f"{name} {value:.2f}" for name, value in result.items()), flush=True)
    return result


if __name__ == "__main__":
    run(main, expected=(ValueError,))
