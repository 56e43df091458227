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
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.data.loaders import DataError, num_classes, train_loader
from common.run import cli
from common.run.checkpoint import CheckpointError
from common.run.distributed import World, get_logger, get_rank, launch, run, seed_everything
from common.run.engine import NonFiniteLoss, StepInfo
from uvc import arguments, baseline_scores, checkpoints
from uvc.data import open_datasets
from uvc.loading import Masked, default_image_size, freeze_structure, image_size
from uvc.models.gates import GatedTransformer, register_masks
from uvc.post_train import fine_tune
from uvc.setup import UsageError, create_named

logger = get_logger(__name__)

METHODS = ("omp", "gmp", "taylor", "synflow", "structured", "gradient-sparsity")
SMALL = 0.01
"""A gradient's element is next to nothing below this share of its layer's root mean square."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments.post_parser(__doc__)
    group = parser.add_argument_group("baseline")
    add = group.add_argument
    add("method", choices=METHODS, metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    add("--density", type=cli.fraction, default=0.5, help="share of weights kept, of gmp at its end (default: 0.5)")
    add("--scope", default="global", choices=("global", "local"), help="one threshold, or one per layer")
    add("--attention-density", type=cli.fraction, default=0.5, help="structured: share of heads kept (default: 0.5)")
    add("--mlp-density", type=cli.fraction, default=0.5, help="structured: share of neurons kept (default: 0.5)")
    add("--score-images", type=cli.positive_int, default=10000, help="training images that taylor scores on")
    add("--pruning_times", type=cli.positive_int, default=20, help="gmp: pruning events (default: 20)")
    add("--delta_t", type=cli.positive_int, default=6250, help="gmp: steps between events (default: 6250)")
    add("--t_start", type=cli.count, default=62500, help="gmp: steps before the first interval (default: 62500)")
    add(
        "--from-scratch", action="store_true",
        help="train masked random weights, as the release does; the scores are those of --model_path all the same",
    )  # fmt: skip
    add(
        "--data_rate", type=arguments.share, metavar="SHARE",
        help="train on the first SHARE of each class's pictures (default: 0.2 for gradient-sparsity, as the release "
        "does, else 1)",
    )  # fmt: skip
    args = arguments.parse(parser, argv)
    if args.data_rate is None:
        args.data_rate = 0.2 if args.method == "gradient-sparsity" else 1.0
    return args


def load_network(args: argparse.Namespace) -> Masked:
    """The dense network of ``--model_path`` with masks of ones, or one of random weights without it."""
    if args.model_path:
        model, _ = checkpoints.load_masked(args.model_path, args.model_type)
    elif args.from_scratch or args.method == "gradient-sparsity":
        size = args.img_size or default_image_size(args.model_type)
        _, held_out = open_datasets(args.dataset, args.data_dir, size, only_evaluate=True)
        options = {"num_classes": num_classes(held_out), "img_size": size}
        model = create_named(args.model_type, flag="--model_type", **options)
        register_masks(model)
    else:
        raise UsageError("--model_path is missing: name the dense network's checkpoint, or give --from-scratch")
    model.fix_blocks([True] * len(model.blocks))
    return Masked(model, args.model_type, {})


def scoring_batches(args: argparse.Namespace, model: GatedTransformer, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches up to a number of images; each rank has its own, and rank 0's scores are taken."""
    pictures, _ = open_datasets(args.dataset, args.data_dir, image_size(model))
    assert pictures is not None
    device, seen = next(model.parameters()).device, 0
    for inputs, labels in train_loader(pictures, batch_size=args.train_batch_size, workers=0, seed=args.seed):
        yield inputs.to(device), labels.to(device)
        seen += len(inputs)
        if seen >= images:
            return


def prune(args: argparse.Namespace, model: GatedTransformer, world: World) -> None:
    """Set the masks that hold from the first step on."""
    scores: dict[str, Tensor] | None = None
    model.train()  # as the release scores
    if args.method == "omp":
        scores = baseline_scores.magnitude_scores(model)
    elif args.method == "taylor":
        scores = baseline_scores.taylor_scores(model, scoring_batches(args, model, args.score_images))
    elif args.method == "synflow":
        scores = baseline_scores.synflow_scores(model, image_size(model))
    elif args.method == "gradient-sparsity":
        generator = torch.Generator().manual_seed(args.seed)
        layers = baseline_scores.magnitude_scores(model)
        scores = {name: torch.rand(value.shape, generator=generator).to(value) for name, value in layers.items()}
    elif args.method == "structured":
        inputs, labels = next(scoring_batches(args, model, 1))
        heads, neurons, _ = baseline_scores.structured_scores(model, inputs, labels)
        kept = baseline_scores.best(heads, args.attention_density), baseline_scores.best(neurons, args.mlp_density)
        baseline_scores.set_structured_masks_(model, *kept)
    if scores is not None:
        baseline_scores.set_masks_(model, baseline_scores.masks_of(scores, args.density, scope=args.scope))
    if world.size > 1:  # ranks may have scored other pictures
        for name, mask in model.named_buffers():
            if name.endswith("mask"):
                torch.distributed.broadcast(mask, src=0)
    if get_rank() == 0:
        logger.info("%s: %.2f %% of the weights are kept", args.method, 100 * baseline_scores.density_of(model))


def gradual(args: argparse.Namespace, model: GatedTransformer) -> Callable[[int], bool]:
    """What gmp does before a step: at each of its events, magnitude masks of the sparsity then due."""

    def before_step(steps: int) -> bool:
        event, rest = divmod(steps - args.t_start, args.delta_t)
        if rest or not 1 <= event <= args.pruning_times:
            return False
        sparsity = baseline_scores.gmp_sparsity(
            steps, start=args.t_start, interval=args.delta_t, times=args.pruning_times, final=1 - args.density
        )
        masks = baseline_scores.masks_of(baseline_scores.magnitude_scores(model), 1 - sparsity, scope=args.scope)
        baseline_scores.set_masks_(model, masks)
        logger.info("gmp at step %d: sparsity %.2f %%", steps, 100 * sparsity)
        return True

    return before_step


def check_gradual(args: argparse.Namespace, steps: int) -> None:
    """Whether a run of so many steps reaches gmp's last event.

    Raises:
        UsageError: it does not, and would end above its density.
    """
    last = args.t_start + args.pruning_times * args.delta_t
    if last >= steps:
        raise UsageError(
            f"gmp would not reach its density: its last event is before step {last + 1}, the run has {steps} steps. "
            "Give a smaller --t_start, --delta_t or --pruning_times, or more --epochs"
        )


@torch.no_grad()
def gradient_sparsity(model: GatedTransformer) -> dict[str, float]:
    """Percent of the kept weights' gradients that are zero, or next to nothing in their layer. Waits for the device."""
    zero = small = total = 0.0
    for layer in baseline_scores.prunable(model).values():
        gradient = layer.get_parameter("weight").grad
        if gradient is None:
            continue
        kept = gradient[layer.get_buffer("mask") != 0].abs()
        if kept.numel():
            zero += float((kept == 0).sum())
            small += float((kept <= SMALL * kept.square().mean().sqrt()).sum())
            total += kept.numel()
    return {"gradient_zero_percent": 100 * zero / max(total, 1), "gradient_small_percent": 100 * small / max(total, 1)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Score, mask, train; returns the best accuracy and the cost."""
    args = parse_args(argv)
    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    masked = load_network(args)
    model = masked.model.to(world.device)
    prune(args, model, world)
    if args.from_scratch:
        fresh = create_named(
            args.model_type, flag="--model_type", num_classes=model.num_classes, img_size=image_size(model)
        )
        own = {name: value for name, value in fresh.state_dict().items() if not name.endswith("gating")}
        model.load_state_dict(own, strict=False)
    freeze_structure(model)
    interval = args.log_every_steps or 50
    observed: dict[str, float] = {}

    def observe(info: StepInfo) -> dict[str, float]:
        if info.step % interval == 0 or not observed:
            observed.update(gradient_sparsity(model))
        return observed

    return fine_tune(
        args, masked, world,
        before_step=gradual(args, model) if args.method == "gmp" else None,
        observe=observe if args.method == "gradient-sparsity" else None, data_rate=args.data_rate,
        check_length=partial(check_gradual, args) if args.method == "gmp" else None,
    )  # fmt: skip


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss, ValueError))
