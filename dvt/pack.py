"""Pack trained weights for inference: the five-entry dictionary of the published checkpoints.

    python dvt/pack.py DIR --model DVT_T2t_vit_12 --checkpoint model_best.pth.tar --output DVT_T2t_vit_12.pth.tar
    python dvt/pack.py DIR --model DVT_T2t_vit_12 --dataset cifar10 --checkpoint best.pth --output cifar.pth.tar

Cost per exit is counted; thresholds of the 59 published budgets are found on training pictures; accuracies are taken on
the validation pictures. The result serves ``inference.py`` in every mode, and also of the official release.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.data.loaders import DataError, default_num_classes
from common.run import cli
from common.run.checkpoint import CheckpointError, save_atomic
from common.run.errors import LaunchError
from common.run.launch import choose_device
from common.run.program import get_logger
from dvt.checkpoints import load_weights, read
from dvt.evaluation import (
    PICTURES,
    SEARCH_PICTURES,
    Scores,
    budgeted,
    cascade_gflops,
    collect_scores,
    held_out_loader,
    search_loader,
    search_thresholds,
)
from dvt.models import MODELS, Cascade, create_model

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", nargs="?", default="", metavar="DIR", help="folder of the data set; the digits need none")
    cascades = [name for name, entry in MODELS.items() if entry.stages]
    add("--model", default="DVT_T2t_vit_12", choices=cascades, help="cascade that was trained")
    add("--checkpoint", required=True, metavar="FILE",
        help="weights: of main.py, of transfer_learning.py, of the official trainer, packed or plain")  # fmt: skip
    add("--output", required=True, type=Path, metavar="FILE", help="packed checkpoint to write")
    add("--model-ema", action=cli.Switch, default=True,
        help="take the moving average of the weights where the file has one")  # fmt: skip
    add("--dataset", default="imagenet", metavar="NAME",
        help="imagenet (train/ and val/), cifar10, cifar100, digits, or a name for timm's create_dataset")  # fmt: skip
    add("--pictures", default=None, choices=PICTURES,
        help="transforms: of training on ImageNet or of the transfer to CIFAR (default: by the data set)")  # fmt: skip
    add("--num-classes", type=cli.positive_int, default=None, help="classes (default: the data set's)")
    add("--img-size", type=cli.positive_int, default=None, metavar="PIXELS", help="side of the pictures (the model's)")
    add("--feature-reuse", action=cli.Switch, default=True, help="the cascade was trained with it")
    add("--relation-reuse", action=cli.Switch, default=True, help="the cascade was trained with it")
    add("--search-pictures", type=cli.positive_int, default=SEARCH_PICTURES, metavar="N",
        help=f"training pictures to find thresholds on, at most (default: {SEARCH_PICTURES})")  # fmt: skip
    add("--augment-search", action=cli.Switch, default=True,
        help="crop and flip them at random, as published; off takes them as the validation pictures")  # fmt: skip
    add("--seed", type=cli.count, default=0, help="of their draw and augmentation")
    add("-b", "--batch-size", type=cli.positive_int, default=64, help="pictures at once")
    add("-j", "--workers", type=cli.count, default=8, help="loading processes")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    args.num_classes = args.num_classes or default_num_classes(args.dataset)
    args.img_size = args.img_size or MODELS[args.model].options.get("img_size", 224)
    if not args.data and args.dataset != "digits":
        parser.error(f"{args.dataset} needs DIR, the folder of the data set")
    return args


def pack_checkpoint(model: Cascade, search: Scores, held_out: Scores) -> dict[str, Any]:
    """The five entries of the published format.

    Args:
        model: trained.
        search: scores on the pictures that thresholds are found on.
        held_out: scores on the pictures that accuracies are reported on.

    Returns:
        ``model_state_dict``; ``flops``, cumulative GFLOPs per exit; ``anytime_classification``, top-1 in percent per
        exit; ``dynamic_threshold`` (59, 3); ``budgeted_batch_classification``, [59 costs, 59 accuracies].
    """
    gflops = cascade_gflops(model)
    thresholds = search_thresholds(search)
    return {
        "model_state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
        "flops": gflops,
        "anytime_classification": held_out.anytime,
        "dynamic_threshold": thresholds,
        "budgeted_batch_classification": budgeted(held_out, gflops, thresholds).as_lists(),
    }


def main(argv: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Evaluate, search, write; returns what was written."""
    args = parse_args(argv)
    device = choose_device(args.device)
    root = args.data or None
    common = {"size": args.img_size, "batch_size": args.batch_size, "workers": args.workers,
              "pictures": args.pictures}  # fmt: skip
    held_out = held_out_loader(args.dataset, root, **common)
    search = search_loader(
        args.dataset, root, **common, augment=args.augment_search, count=args.search_pictures, seed=args.seed
    )
    model = create_model(
        args.model, num_classes=args.num_classes, img_size=args.img_size, feature_reuse=args.feature_reuse,
        relation_reuse=args.relation_reuse,
    )  # fmt: skip
    assert isinstance(model, Cascade)
    load_weights(model, read(args.checkpoint), source=args.checkpoint, average=args.model_ema)
    model.to(device).eval()
    packed = pack_checkpoint(
        model,
        collect_scores(model, search, device=device, title="training pictures"),
        collect_scores(model, held_out, device=device, title="validation pictures"),
    )
    save_atomic(packed, args.output)
    summary = {name: packed[name] for name in ("flops", "anytime_classification", "budgeted_batch_classification")}
    print(json.dumps(summary))
    logger.info("written to %s", args.output)
    shown = "  ".join(f"exit{k} {value:.3f}" for k, value in enumerate(packed["anytime_classification"], 1))
    print(f"{shown}  best budgeted {max(packed['budgeted_batch_classification'][1]):.3f}")
    return packed


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError, LaunchError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
