"""Pruning baselines that UVC is compared with, each trained by stage 2's trainer with its masks.

    python uvc/baselines.py omp --density 0.4 --model_type deit_small_patch16_224 --model_path pretrained --data_dir DIR
    python uvc/baselines.py gmp|taylor|synflow ...
    python uvc/baselines.py structured --attention-density 0.7 --mlp-density 0.6 ...
    python uvc/baselines.py gradient-sparsity --density 0.2 --model_type deit_tiny_patch16_224 --data_dir DIR

omp masks the smallest weights at once, gmp gradually while training, taylor and synflow by their scores; structured
removes whole heads and neurons; gradient-sparsity trains under a fixed random mask and records how much of the gradient
is next to nothing. All other flags are post_train.py's. Unstructured masks save no time by themselves: compress.py
removes only what a mask switches off as a whole. The last line is top-1 and the remaining cost.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from common.run.errors import UsageError
from common.run.flags import Group, add_flags
from common.run.program import run
from uvc import arguments
from uvc.flags import share
from uvc.settings import PruningSettings

METHODS = ("omp", "gmp", "taylor", "synflow", "structured", "gradient-sparsity")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments.post_parser(__doc__)
    add_flags(parser, "pruning", PruningSettings, dash="_")
    add = Group(parser, "baseline")
    add.group.add_argument("method", choices=METHODS, metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    add("--from-scratch", bool, False,
           "train masked random weights, as the release does; the scores are those of --model_path "
           "all the same")  # fmt: skip
    add("--data_rate", share, None,
        "train on the first SHARE of each class's images; none is 0.2 for gradient-sparsity, as in the release, else 1",
        metavar="SHARE")  # fmt: skip
    args = arguments.parse(parser, argv)
    if args.data_rate is None:
        args.data_rate = 0.2 if args.method == "gradient-sparsity" else 1.0
    if not (args.model_path or args.from_scratch or args.method == "gradient-sparsity"):
        raise UsageError("--model_path is missing: name the dense network's checkpoint, or give --from-scratch")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Score, mask, train; returns the best accuracy and the cost."""
    args = parse_args(argv)
    arguments.check_paths(args)
    settings, pruning = arguments.post_run(args, args.model_type), PruningSettings.of(args)
    from common.run.launch import launch, seed_everything
    from uvc import baseline_runs
    from uvc.stages import fine_tune

    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    masked = baseline_runs.open_dense(settings.data, args.model_type, args.model_path, img_size=args.img_size)
    model = masked.model.to(world.device)
    baseline_runs.prune(model, pruning, settings)
    baseline_runs.prepare(model, args.model_type if args.from_scratch else None)
    gradual = baseline_runs.Gradual(model, pruning) if args.method == "gmp" else None
    observe = baseline_runs.gradient_observer(model, args.log_every_steps or 50)
    return fine_tune(
        settings, masked, world, before_step=gradual, check_length=gradual.check if gradual else None,
        observe=observe if args.method == "gradient-sparsity" else None, data_rate=args.data_rate,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
