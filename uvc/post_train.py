"""Stage 2 of UVC: train the weights of the architecture that stage 1 found, masks and skips fixed.

    python uvc/post_train.py --model_type deit_tiny_patch16_224 --checkpoint_dir FILE --data_dir DIR \
        --model_path pretrained --distillation-type soft --distillation-alpha 0.1
    python uvc/post_train.py --checkpoint_dir FILE --data_dir DIR --eval

FILE is of stage 1 or 2, ours or an official bare state dict with masks. Writes into OUTPUT_DIR/NAME: last.pth and
best.pth (--resume auto continues exactly), <model_type>.pth.tar, the best masked weights for compress.py, log.jsonl and
result.json. run_post_train.sh is the published command.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.data.loaders import DataError, eval_loader, num_classes, train_loader
from common.run import cli
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState
from common.run.distributed import World, get_logger, is_main, launch, run, seed_everything
from common.run.engine import NonFiniteLoss, StepInfo, prepare_network, train
from common.run.files import write_atomic
from common.run.metrics import Record
from uvc import arguments
from uvc.cost_model import CostModel
from uvc.data import build_mix, first_of_each_class, open_datasets
from uvc.engine import FineTuning
from uvc.loading import Masked, image_size, load_masked, save_masked
from uvc.setup import UsageError, build_teacher_loss
from uvc.structure import Structure

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return arguments.parse(arguments.post_parser(__doc__), argv)


def load_network(args: argparse.Namespace, argv: Sequence[str] | None) -> Masked:
    """The masked network of ``--checkpoint_dir``; its own name where ``--model_type`` is not given."""
    if args.pretrained:
        raise UsageError("--pretrained 1 reads a folder that does not exist here: name the file with --checkpoint_dir")
    if not args.checkpoint_dir:
        raise UsageError("--checkpoint_dir is missing: name the file that joint_train.py wrote after an epoch")
    given = any(word.split("=")[0] == "--model_type" for word in (sys.argv[1:] if argv is None else argv))
    mode = None if args.patch_mode == "auto" else args.patch_mode
    masked = load_masked(args.checkpoint_dir, model_type=args.model_type if given else None, patch_mode=mode)
    if args.img_size not in (None, image_size(masked.model)):
        raise UsageError(f"--img_size {args.img_size}: the file's network takes {image_size(masked.model)} pixels")
    if not given and args.model_path in (None, arguments.WEIGHTS.get(args.model_type)):
        args.model_path = arguments.WEIGHTS.get(masked.model_type)  # what "pretrained" meant was of the default name
    args.model_type = masked.model_type
    if args.model_path is None:
        args.model_path = arguments.WEIGHTS.get(args.model_type)
    if args.enable_jumping:
        masked.model.gates.jumping = True
    return masked


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


def fine_tune(
    args: argparse.Namespace,
    masked: Masked,
    world: World,
    *,
    before_step: Callable[[int], bool] | None = None,
    observe: Callable[[StepInfo], dict[str, float]] | None = None,
    extra: Mapping[str, Any] | None = None,
    data_rate: float = 1.0,
    check_length: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train a masked network, or with ``args.eval`` only evaluate it; returns the best accuracy and the cost.

    Args:
        args: of ``parse_args``.
        masked: from ``load_masked``; it moves to this process's device.
        world: from ``launch``.
        before_step, observe: see ``FineTuning``.
        extra: state that belongs to ``before_step``, for exact resume.
        data_rate: share of each class's training pictures to take.
        check_length: gets the number of steps of the whole run before the first, to refuse one that is too short.
    """
    if args.eval and args.resume:
        raise UsageError(
            "--eval does not read --resume: give such a file to post_train.py --eval as --checkpoint_dir, which takes "
            "last.pth and best.pth too"
        )
    model = masked.model.to(world.device)
    cost = describe(masked)
    pictures, held_out = open_datasets(args.dataset, args.data_dir, image_size(model), only_evaluate=args.eval)
    classes = num_classes(held_out)
    if classes != model.num_classes:
        raise UsageError(
            f"the network has {model.num_classes} classes, the data {classes}: is this the data set it was made with?"
        )
    args.img_size = image_size(model)
    test_batches = eval_loader(held_out, batch_size=args.eval_batch_size, workers=args.num_workers)
    folder = Path(args.output_dir) / args.name if args.output_dir and not args.eval else None
    criterion = build_teacher_loss(args, classes, world.device)
    unused = getattr(model, "head_dist", None) is not None and criterion.kind == "none"
    network = prepare_network(
        model, world, compiled=args.compile, find_unused_parameters=unused, broadcast_buffers=False
    )
    mix = build_mix(
        classes, mixup=args.mixup, cutmix=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, smoothing=args.smoothing,
    )  # fmt: skip
    tuning = FineTuning(
        model,
        network,
        criterion=criterion,
        mix=mix,
        parts=args.gradient_accumulation_steps,
        before_step=before_step,
        observe=observe,
    )
    test = partial(tuning.evaluate, test_batches, world, amp=args.amp)
    if args.eval or pictures is None:
        return finish({**test(), **cost}, None)

    pictures = first_of_each_class(pictures, data_rate)
    batches = train_loader(pictures, batch_size=args.train_batch_size, workers=args.num_workers, seed=args.seed)
    if check_length is not None:
        check_length(len(batches) * args.epochs)
    rate = cli.scaled_lr(args.learning_rate, batch_size=args.train_batch_size, world_size=world.size)
    optimizer = cli.build_optimizer(
        model, opt=args.opt, lr=rate, weight_decay=args.weight_decay, eps=args.opt_eps, betas=args.opt_betas,
        momentum=args.momentum,
    )  # fmt: skip
    scheduler, _ = cli.build_schedule(
        optimizer, epochs=args.epochs, sched=args.sched, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, cooldown_epochs=0, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        patience_epochs=args.patience_epochs, noise=args.lr_noise, noise_pct=args.lr_noise_pct,
        noise_std=args.lr_noise_std,
    )  # fmt: skip
    state = TrainingState(
        model, optimizer, scheduler, extra=dict(extra or {}), arguments=vars(args), device=world.device
    )  # fmt: skip
    manager = CheckpointManager(folder) if folder else None
    if args.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, args.resume)
        model.fix_blocks()
        tuning.find_masked()
    tuning.steps = state.progress.step

    def test_and_keep() -> dict[str, float]:
        """Evaluate; the best masked weights so far get a file of their own."""
        metrics = test()
        better = manager is not None and manager.improves(metrics["top1_percent"], state.progress.best)
        if better and folder is not None and is_main():
            save_masked(
                folder / f"{masked.model_type}.pth.tar", model, model_type=masked.model_type,
                patch_mode=model.gates.patch, epoch=state.progress.epoch + 1, metrics={**metrics, **cost},
            )  # fmt: skip
        return metrics

    if not args.resume:
        logger.info("top-1 before training: %.3f %%", test()["top1_percent"])
    boards = folder / "tensorboard" if args.tensorboard and folder else None
    train(
        tuning.step, state, batches, world=world, epochs=args.epochs, network=network, amp=args.amp,
        clip_grad=args.max_grad_norm, own_backward=True, evaluate_fn=test_and_keep, manager=manager,
        record=Record(folder / "log.jsonl", tensorboard=boards) if folder else None,
        save_every_steps=args.save_every_steps, log_every_steps=args.log_every_steps, after_step=tuning.after_step,
    )  # fmt: skip
    best = state.progress.best
    metrics = {"top1_percent": best} if best is not None else test()
    return finish({**metrics, **cost}, folder)


def finish(metrics: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Print the numbers of the table, and write them."""
    if is_main():
        if folder is not None:
            write_atomic(folder / "result.json", json.dumps(metrics, indent=1))
        print(f"top-1 {metrics['top1_percent']:.3f} %, remaining cost {metrics['remaining_cost_percent']:.2f} %")
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run stage 2, or with ``--eval`` only evaluate ``--checkpoint_dir``."""
    args = parse_args(argv)
    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    masked = load_network(args, argv)
    return fine_tune(args, masked, world)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss, ValueError))
