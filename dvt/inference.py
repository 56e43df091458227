"""Anytime and budgeted-batch results of a checkpoint, as published, and early exit that is timed.

    python dvt/inference.py --model DVT_T2t_vit_12 --checkpoint_path FILE --eval_mode 0
    python dvt/inference.py --model DVT_T2t_vit_12 --checkpoint_path FILE --eval_mode 1 --data_url DIR --batch_size 64
    python dvt/inference.py --model DVT_T2t_vit_12 --checkpoint_path FILE --eval_mode 2 --data_url DIR --batch_size 64
    python dvt/inference.py --model DVT_T2t_vit_12 --checkpoint_path FILE --data_url DIR --dynamic --budget 1.5

Mode 0 prints what the file says. Mode 1 runs the validation pictures under the file's thresholds. Mode 2 finds
thresholds on 50,000 training pictures first; it needs only weights, so a training file will do. GFLOPs are
multiply-accumulates.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from common.data.loaders import DataError, default_num_classes
from common.measure.flops import gmacs
from common.run import cli
from common.run.checkpoint import CheckpointError
from common.run.errors import LaunchError
from common.run.files import write_atomic
from common.run.launch import choose_device
from common.run.program import get_logger
from dvt.arguments import add_inference_args
from dvt.checkpoints import Packed, load_weights, read, read_packed
from dvt.evaluation import (
    Scores,
    budgeted,
    cascade_gflops,
    collect_scores,
    held_out_loader,
    search_loader,
    search_thresholds,
)
from dvt.models import MODELS, Backbone, Cascade, create_model
from dvt.throughput import add_dynamic_args, choose_settings, run_dynamic

logger = get_logger(__name__)

STORED = ("flops", "anytime_classification", "budgeted_batch_classification")
"""Entries that mode 0 prints, and names of the three lines that every mode ends with."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, prog="inference.py")
    add_inference_args(parser)
    add_dynamic_args(parser)
    args = parser.parse_args(argv)
    if args.num_classes is None:
        args.num_classes = default_num_classes(args.dataset)
    if args.img_size is None:
        args.img_size = MODELS[args.model].options.get("img_size", 224)
    for flag in ("budget", "threshold", "compile"):
        if getattr(args, flag) and not args.dynamic:
            parser.error(f"--{flag} belongs to --dynamic: add it")
    if not MODELS[args.model].stages and (args.dynamic or args.eval_mode != 2):
        parser.error(f"{args.model} has one exit and no thresholds: use --eval_mode 2, without --dynamic")
    if args.dynamic and args.eval_mode == 0:
        parser.error("--dynamic runs pictures: use --eval_mode 1 (thresholds of the file) or 2 (of training pictures)")
    return args


def needed_entries(args: argparse.Namespace) -> tuple[str, ...]:
    """Entries of the checkpoint that the command cannot do without."""
    if args.eval_mode == 0:
        return STORED
    if args.eval_mode == 2:
        return ()
    if not args.dynamic:
        return ("model_state_dict", "flops", "dynamic_threshold")
    if args.threshold and not args.budget:
        return ()
    return ("model_state_dict", "flops", "dynamic_threshold", "budgeted_batch_classification")


class OneExit(nn.Module):
    """A network with one exit as a cascade of one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Logits (B, C) of the exit."""
        return (self.network(images),)


def load_model(args: argparse.Namespace, content: Any) -> Cascade | Backbone:
    """The network with the checkpoint's weights, in evaluation mode."""
    options = {"num_classes": args.num_classes, "img_size": args.img_size, "drop_path_rate": 0.1}
    if MODELS[args.model].stages:
        options |= {"feature_reuse": args.feature_reuse, "relation_reuse": args.relation_reuse}
    model = create_model(args.model, **options)
    load_weights(model, content, source=args.checkpoint_path, average=args.model_ema)
    return model.to(choose_device(args.device)).eval()


def collect_search(args: argparse.Namespace, model: nn.Module) -> Scores:
    """Scores of the pictures that thresholds are found on."""
    pictures = search_loader(
        args.dataset, args.data_url, size=args.img_size, batch_size=args.batch_size, workers=args.workers,
        augment=args.augment_search, count=args.search_pictures, seed=args.seed, pictures=args.pictures,
    )  # fmt: skip
    device = next(model.parameters()).device
    return collect_scores(model, pictures, device=device, title="training pictures")


def evaluate(args: argparse.Namespace, packed: Packed, content: Any) -> dict[str, Any]:
    """Modes 1 and 2: the three results on the validation pictures, or what early exit measures."""
    pictures = held_out_loader(
        args.dataset, args.data_url, size=args.img_size, batch_size=args.batch_size, workers=args.workers,
        pictures=args.pictures,
    )  # fmt: skip
    model = load_model(args, content)
    device = next(model.parameters()).device
    if not isinstance(model, Cascade):
        held_out = collect_scores(OneExit(model), pictures, device=device, title="validation pictures")
        flops = [gmacs(model.count_ops(published=True), "fvcore")]
        curve = [flops, held_out.anytime]
        return dict(zip(STORED, (flops, held_out.anytime, curve), strict=True)) | {"images": len(held_out.correct[0])}
    flops = packed.flops or cascade_gflops(model)
    search = None
    if args.eval_mode == 2 and not (args.threshold and not args.budget):
        search = collect_search(args, model)
    thresholds = packed.thresholds if search is None else search_thresholds(search)
    if args.dynamic:
        settings = choose_settings(
            flops, budgets=args.budget, thresholds=args.threshold, search=search, stored=thresholds,
            stored_costs=packed.curve[0] if packed.curve else (),
        )  # fmt: skip
        rows = run_dynamic(
            model, pictures, settings, flops, device=device, batch_size=args.batch_size, compiled=args.compile,
            output=args.output, model=args.model, checkpoint=args.checkpoint_path,
        )  # fmt: skip
        return {"flops": flops, "rows": [row.as_dict() for row in rows]}
    assert thresholds is not None
    held_out = collect_scores(model, pictures, device=device, title="validation pictures")
    curve = budgeted(held_out, flops, thresholds).as_lists()
    result = {"flops": flops, "anytime_classification": held_out.anytime, "budgeted_batch_classification": curve}
    return {**result, "dynamic_threshold": thresholds.tolist(), "images": held_out.correct.shape[1]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the results of a mode, or of early exit; returns them."""
    args = parse_args(argv)
    content = read(args.checkpoint_path)
    why = f"--eval_mode {args.eval_mode}" + (" with --dynamic" if args.dynamic else "")
    needed = needed_entries(args)
    packed = read_packed(content, needed, source=args.checkpoint_path, why=why)
    if "flops" not in needed and isinstance(content, dict) and "flops" in content:
        packed = read_packed(content, ("flops",), source=args.checkpoint_path, why=why)
    if args.eval_mode == 0:
        values = (packed.flops, packed.anytime, packed.curve)
        result: dict[str, Any] = dict(zip(STORED, values, strict=True))
    else:
        result = evaluate(args, packed, content)
    if args.dynamic:
        return result
    if args.output:
        write_atomic(args.output, json.dumps({**result, "arguments": vars(args)}, indent=1, default=str) + "\n")
    for name in STORED:
        print(f"{name} : {result[name]}")
    return result


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError, LaunchError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
