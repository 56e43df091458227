"""Stage 1 of UVC: learn weights, pruning numbers and skips of a dense ViT together, under a budget on its cost.

    python uvc/joint_train.py --model_type deit_tiny_patch16_224 --model_path pretrained --data_dir DIR --budget 0.5
    torchrun --nproc_per_node=8 uvc/joint_train.py --model_type deit_small_patch16_224 --data_dir DIR ...

Writes into OUTPUT_DIR/NAME: <model_type>_<epoch>.pth.tar after each epoch, what post_train.py takes; last.pth, from
which --resume auto continues exactly; log.jsonl; structure.png, what of the network is left; result.json.
run_uvc_train.sh is the published command.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.data.loaders import DataError, eval_loader, num_classes, train_loader
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState
from common.run.distributed import World, get_logger, is_main, launch, run, seed_everything
from common.run.engine import NonFiniteLoss, prepare_network, train
from common.run.files import write_atomic
from common.run.metrics import Record
from uvc import arguments
from uvc.data import build_mix, open_datasets
from uvc.draw_structure import draw_structure
from uvc.engine import JointTraining
from uvc.loading import default_image_size
from uvc.schedules import warmup_factor
from uvc.setup import build_model, build_primal_dual, build_settings, build_teacher_loss

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return arguments.parse(arguments.joint_parser(__doc__), argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run stage 1, or with ``--eval`` only evaluate what ``--resume`` names; returns the last numbers."""
    args = parse_args(argv)
    world: World = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    size = args.img_size or default_image_size(args.model_type)
    pictures, held_out = open_datasets(args.dataset, args.data_dir, size, only_evaluate=args.eval)
    classes = num_classes(held_out)
    test_batches = eval_loader(held_out, batch_size=args.eval_batch_size, workers=args.num_workers)

    model = build_model(args, classes).to(world.device)
    primal_dual = build_primal_dual(args, model)
    learned = primal_dual.settings.learn_patches
    weights = [p for p in model.parameters() if p.requires_grad and not (learned and p is model.patch_gating)]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=args.weight_decay)
    batches = None
    if pictures is not None:
        batches = train_loader(pictures, batch_size=args.train_batch_size, workers=args.num_workers, seed=args.seed)
    steps = len(batches) if batches is not None else 1
    factor = warmup_factor(args.decay_type, warmup_steps=args.warmup_steps, total_steps=steps * args.num_epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    state = TrainingState(
        model, optimizer, scheduler, extra={"uvc": primal_dual}, arguments=vars(args), device=world.device
    )  # fmt: skip
    folder = Path(args.output_dir) / args.name if args.output_dir else None
    manager = CheckpointManager(folder, metric=None) if folder else None
    if args.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, args.resume)

    criterion = build_teacher_loss(args, classes, world.device)
    unused = getattr(model, "head_dist", None) is not None and criterion.kind == "none"
    network = prepare_network(
        model, world, compiled=args.compile, find_unused_parameters=unused, broadcast_buffers=False
    )
    boards = folder / "tensorboard" if args.tensorboard and folder else None
    record = Record(folder / "log.jsonl", tensorboard=boards) if folder and not args.eval else None
    mix = build_mix(
        classes, mixup=args.mixup, cutmix=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, smoothing=args.smoothing,
    )  # fmt: skip
    training = JointTraining(
        model, network, optimizer=optimizer, scheduler=scheduler, primal_dual=primal_dual,
        criterion=criterion, mix=mix, settings=build_settings(args, steps),
        record=record, folder=folder if not args.eval else None, model_type=args.model_type,
    )  # fmt: skip
    training.enter(state.progress.epoch, state.progress.step)
    test = partial(training.evaluate, test_batches, world, amp=args.amp)
    if args.eval or batches is None:
        return finish(test(), None)
    row = train(
        training.step, state, batches, world=world, epochs=args.num_epochs + args.official, network=network,
        amp=args.amp, clip_grad=args.max_grad_norm, own_backward=True, schedule_every="step", evaluate_fn=test,
        manager=manager, record=record, save_every_steps=args.save_every_steps,
        log_every_steps=args.log_every_steps or args.log_interval, epoch_start=training.epoch_start,
        after_step=training.after_step,
    )  # fmt: skip
    if folder is not None and is_main():
        title = f"{args.model_type}, budget {100 * args.budget:g} %: {100 * training.deployed_ratio():.2f} % remain"
        write_atomic(folder / "structure.png", draw_structure(training.structure(), title=title))
    return finish(
        {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_")}, folder
    )


def finish(metrics: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Print the numbers of the table, and write them."""
    if not is_main() or not metrics:
        return metrics
    if folder is not None:
        write_atomic(folder / "result.json", json.dumps(metrics, indent=1))
    print(
        f"top-1 {metrics['top1_percent']:.3f} %, remaining cost {metrics['remaining_cost_percent']:.2f} % "
        "(before post_train.py, whose accuracy counts)"
    )
    return metrics


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss, ValueError))
