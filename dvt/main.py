"""Train a cascade with three exits, or a network with one, or evaluate a checkpoint.

    torchrun --nproc_per_node=8 dvt/main.py DIR --model DVT_T2t_vit_12 -b 128 --lr 2e-3 --weight-decay .03 --amp
    python dvt/main.py DIR --model DVT_T2t_vit_12 --eval_checkpoint FILE
    python dvt/main.py --model DVT_desk
    python dvt/main.py DIR --model timm:vit_small_patch16_224 --grids 7 10 14 --weights FILE

Results go to ./output/train/<time>-<model>-<size>/: last.pth.tar and model_best.pth.tar (for --resume and
--eval_checkpoint), args.yaml, summary.csv, log.jsonl, results.json. The learning rate is absolute: nothing scales it.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from common.data.paths import check_data_path
from common.run.files import check_files, check_output, make_folder, write_atomic
from common.run.program import get_logger, is_main, run
from common.run.settings import DataSettings, OptimizerSettings, RunSettings, ScheduleSettings
from dvt import arguments
from dvt.models import check_filled, find_entry

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return arguments.parse_args(argv, __doc__)


def evaluate_both(test: Callable[..., dict[str, float]], model: Any, average: Any) -> dict[str, float]:
    """Numbers of the averaged weights, by which states are chosen, and of the weights as ``raw_*``; as published."""
    raw = test(model)
    if average is None:
        return raw
    return test(average.module, title="test (EMA)") | {f"raw_{name}": raw[name] for name in raw if "exit" in name}


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
    resumed = "" if args.resume == "auto" else args.resume
    start = args.eval_checkpoint or args.initial_checkpoint
    if not args.eval_checkpoint:
        check_filled(args.model, args.img_size, args.grids)
    check_files(args.eval_checkpoint, args.initial_checkpoint, args.weights)
    check_files(args.resume, sharded=args.fsdp)
    check_output(args.output, folder=True)
    check_data_path(args.data_set, args.data)

    import torch
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.data.random_erasing import RandomErasing

    from common.data.build import build_loaders, build_mixup, check_trained_classes
    from common.data.transforms import eval_transform
    from common.run.build import build_average, build_run
    from common.run.checkpoint import plain, read_checkpoint
    from common.run.launch import launch, seed_everything
    from dvt.build import TrainingImages, build_optimizer, published_summary
    from dvt.engine import CascadeStep, evaluate_exits
    from dvt.loading import load_network, resume, select_weights
    from dvt.losses import build_criterion

    world = launch(args.device, local_rank=args.local_rank)
    content = read_checkpoint(start) if start else None
    amp = (args.amp_dtype or "on") if args.amp else "none"
    augmentation = TrainingImages.of(args)
    colours = {"mean": args.mean or IMAGENET_DEFAULT_MEAN, "std": args.std or IMAGENET_DEFAULT_STD}
    entry = find_entry(args.model, args.grids)
    alone = entry.family == "t2t" and not entry.stages
    batches = build_loaders(
        DataSettings.of(args, data_path=args.data, input_size=args.img_size),
        None if args.eval_checkpoint else augmentation,
        classes=args.num_classes,
        eval_batch_size=args.batch_size * args.validation_batch_size_multiplier,
        train=augmentation.transform(args.img_size, **colours),
        held_out=eval_transform(
            args.img_size, crop_ratio=args.crop_pct or (0.9 if alone else 0.875),
            interpolation=args.interpolation or "bicubic", **colours,
        ),
    )  # fmt: skip
    if args.num_classes is None:
        logger.info("%s: %d classes, those of the data", args.model, batches.classes)
        args.num_classes = batches.classes
    own: dict[str, Any] = {"grids": args.grids} if args.grids else {}
    if args.weights and not args.eval_checkpoint:
        own |= {"weights": select_weights(read_checkpoint(args.weights), args.weights), "source": args.weights}
    torch.manual_seed(args.seed)
    model = load_network(
        args.model, content, source=start, average=args.model_ema or not args.eval_checkpoint,
        feature_reuse=args.feature_reuse, relation_reuse=args.relation_reuse, num_classes=args.num_classes,
        img_size=args.img_size, drop_rate=args.drop, drop_path_rate=args.drop_path, own=own,
    ).to(world.device)  # fmt: skip
    seed_everything(args.seed)
    if args.num_classes < 5:
        logger.warning("top5 is taken over all %d classes", args.num_classes)
    test = partial(evaluate_exits, loader=batches.held_out, device=world.device, amp=amp)
    if args.eval_checkpoint:
        check_trained_classes(content, batches.held_out, start)
        result = test(model)
        report(result, Path(args.output) if args.output else None)
        return result

    name = args.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}-{args.img_size}"
    folder = Path(args.output or "output") / "train" / name
    if is_main():
        make_folder(folder)
        write_atomic(folder / "args.yaml", yaml.safe_dump(plain(vars(args))))
    optimization = OptimizerSettings.of(args)
    average = build_average(model, optimization)
    trainer = build_run(
        model, world,
        RunSettings.of(
            args, amp=amp, output_dir=str(folder), save_every_steps=args.recovery_interval or None,
            log_every_steps=args.log_interval,
        ),
        optimizer=build_optimizer(model, optimization, decay_tokens=not args.no_decay_tokens),
        schedule=ScheduleSettings.of(args, noise_seed=args.seed), average=average, clip_grad=args.clip_grad,
        arguments=vars(args), metric=args.eval_metric, higher_is_better=args.eval_metric != "loss",
        files=("last.pth.tar", "model_best.pth.tar"), published=("summary.csv", published_summary),
        resume=partial(resume, path=resumed, optimizer=not args.no_resume_opt, start_epoch=args.start_epoch)
        if resumed else None,
        broadcast_buffers=False,  # constants, alike on all
    )  # fmt: skip
    assert trainer.network is not None
    assert batches.train is not None
    mixup = build_mixup(augmentation, args.num_classes)
    step = CascadeStep(
        trainer.network,
        build_criterion(mixup is not None, args.smoothing, jsd_views=args.aug_splits if args.jsd else 0),
        mixup=mixup,
        mixup_epochs=args.mixup_off_epoch,
        erasing=None if args.no_aug or not args.reprob else RandomErasing(
            args.reprob, mode=args.remode, max_count=args.recount, device=str(world.device),
            num_splits=args.aug_splits if args.resplit else 0,
        ),
        progress=trainer.state.progress,
    )  # fmt: skip
    shadow = None if args.model_ema_force_cpu else average
    row = trainer.fit(
        step, batches.train, evaluate_fn=lambda: evaluate_both(partial(test, show_progress=False), model, shadow)
    )
    result = {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_")}
    if result:
        report(result, folder)
    return result


if __name__ == "__main__":
    run(main, expected=(ValueError,))
