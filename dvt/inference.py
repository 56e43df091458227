"""Anytime and budgeted-batch results of a checkpoint, as published, and early exit that is timed.

    python dvt/inference.py --model DVT_T2t_vit_12 --checkpoint_path FILE --eval_mode 0
    python dvt/inference.py --model DVT_T2t_vit_12 --checkpoint_path FILE --eval_mode 1 --data_url DIR --batch_size 64
    python dvt/inference.py --model DVT_T2t_vit_12 --checkpoint_path FILE --eval_mode 2 --data_url DIR --batch_size 64
    python dvt/inference.py --model DVT_T2t_vit_12 --checkpoint_path FILE --data_url DIR --dynamic --budget 1.5
    python dvt/inference.py --networks deit_tiny_patch16_224=A.pth deit_small_patch16_224=B.pth --data_url DIR --dynamic

Mode 0 prints what the file says. Mode 1 runs the validation images under the file's thresholds. Mode 2 finds
thresholds on 50,000 training images first; it needs only weights, so a training file will do. GFLOPs are
multiply-accumulates.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.data.paths import check_data_path
from common.run import cli
from common.run.files import check_files, check_output, write_atomic
from common.run.flags import Group
from common.run.program import run
from dvt.arguments import add_image_args, add_network_args, add_search_args, network_options
from dvt.models import MODELS, find_entry

STORED = ("flops", "anytime_classification", "budgeted_batch_classification")
"""Entries that mode 0 prints, and names of the three lines that every mode ends with."""

NEEDED = ("model_state_dict", "flops", "dynamic_threshold")
"""Entries without which mode 1 cannot do."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, prog="inference.py")
    add = parser.add_argument
    add("--checkpoint_path", default="", metavar="FILE", help="packed checkpoint; mode 2 also takes training files")
    add("--networks", nargs="+", default=[], metavar="NAME=FILE",
        help="in its place: trained networks that share nothing, small to large, as python -m common.hosts names them, "
        "each with its weights; or .safetensors files of leanvit.save")  # fmt: skip
    add("--eval_mode", type=int, default=2, choices=(0, 1, 2), help="see above (default: 2)")
    add("--data_url", default="./data", metavar="DIR", help="folder with train/ (mode 2) and val/; ends in / or not")
    add("--output", type=Path, default=None, metavar="FILE", help="write the results as JSON")
    add_network_args(parser, MODELS)
    add_image_args(parser)
    add_search_args(parser)
    early = Group(parser, "early exit")
    early("--dynamic", bool, False,
        "let images leave early for real, and measure accuracy, GFLOPs and throughput together")  # fmt: skip
    early("--budget", float, [], "mean GFLOPs per image; thresholds from the training images (mode 2) or the stored "
        "curve (mode 1)", nargs="+", metavar="G")  # fmt: skip
    early("--threshold", float, [], "confidence of the exits but the last", nargs="+", metavar="T")
    early("--compile", bool, False, "compile every exit, for any number of images left")
    args = parser.parse_args(argv)
    for flag in ("budget", "threshold", "compile"):
        if getattr(args, flag) and not args.dynamic:
            parser.error(f"--{flag} belongs to --dynamic: add it")
    if bool(args.networks) == bool(args.checkpoint_path):
        parser.error("give either --checkpoint_path FILE or --networks NAME=FILE NAME=FILE")
    if args.networks and (args.eval_mode != 2 or len(args.networks) < 2):
        parser.error("--networks: give at least two, and --eval_mode 2, which finds thresholds on training images")
    try:
        args.exits = len(args.networks) or find_entry(args.model, args.grids).exits
    except ValueError as error:
        parser.error(f"--grids: {error}")
    if args.exits == 1 and (args.dynamic or args.eval_mode != 2):
        parser.error(f"{args.model} has one exit and no thresholds: use --eval_mode 2, without --dynamic")
    if args.dynamic and args.eval_mode == 0:
        parser.error("--dynamic runs images: use --eval_mode 1 (thresholds of the file) or 2 (of training images)")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the results of a mode, or of early exit; returns them."""
    args = parse_args(argv)
    mode, file = args.eval_mode, args.checkpoint_path
    check_files(file, *(name.partition("=")[2] for name in args.networks))
    check_output(args.output, inputs=[file])
    if mode:
        check_data_path(args.dataset, args.data_url)
    from common.data.build import check_trained_classes
    from common.run.checkpoint import read_checkpoint
    from common.run.launch import choose_device
    from dvt.costs import exit_gflops, exit_gmacs
    from dvt.evaluation import ImageSource, collect_scores
    from dvt.exits import check_budget, find_thresholds
    from dvt.loading import load_network, read_packed
    from dvt.models.cascade import Exits
    from dvt.networks import open_networks
    from dvt.throughput import choose_settings, measure_dynamic

    by_threshold = bool(args.threshold and not args.budget)
    content = read_checkpoint(file) if file else None
    needed = {0: STORED, 1: NEEDED, 2: ()}[mode]
    if mode == 1 and args.dynamic:
        needed = () if by_threshold else (*NEEDED, "budgeted_batch_classification")
    if "flops" not in needed and isinstance(content, dict) and "flops" in content:
        needed = (*needed, "flops")
    why = f"--eval_mode {mode}" + (" with --dynamic" if args.dynamic else "")
    packed = read_packed(content, needed, source=file, why=why, exits=args.exits)
    if mode == 0:
        return report(packed, vars(args), args.output)

    device = choose_device(args.device)
    if args.networks:
        model, seen = open_networks(args.networks, args.img_size)
        images = ImageSource.of(args, root=args.data_url, **seen)
        held_out = images.held_out()
        flops = exit_gmacs(model.to(device), next(iter(held_out))[0][:8].to(device))
    else:
        options = network_options(args)
        images = ImageSource.of(args, root=args.data_url, size=options["img_size"])
        held_out = images.held_out()
        check_trained_classes(content, held_out, file)
        model = load_network(args.model, content, source=file, average=args.model_ema, **options).to(device).eval()
        flops = packed.get("flops") or exit_gflops(model)
    for budget in args.budget:
        check_budget(budget, flops)
    search, thresholds = None, packed.get("dynamic_threshold")
    if mode == 2 and len(flops) > 1 and not by_threshold:
        batches = images.search(augment=args.augment_search, count=args.search_images, seed=args.seed)
        search = collect_scores(model, batches, device=device, title="training images")
        thresholds = find_thresholds(search.confidence)
    if args.dynamic:
        costs, _ = packed.get("budgeted_batch_classification", ((), ()))
        settings = choose_settings(
            flops, budgets=args.budget, thresholds=args.threshold, search=search, stored=thresholds, stored_costs=costs
        )
        assert isinstance(model, Exits)
        results = measure_dynamic(model, settings, held_out, flops, device=device, compiled=args.compile)
        for row in results:
            print(row.line(), flush=True)
        result = {"flops": flops, "rows": [asdict(row) for row in results]}
        if args.output:
            record = {
                "model": args.networks or args.model,
                "checkpoint": file,
                "batch_size": args.batch_size,
                "compiled": args.compile,
            }
            write_atomic(args.output, json.dumps(record | described(device) | result, indent=1) + "\n")
        return result
    scores = collect_scores(model, held_out, device=device, title="validation images")
    curve = [flops, scores.anytime] if thresholds is None else scores.leave(flops, thresholds).as_lists()
    result: dict[str, Any] = dict(zip(STORED, (flops, scores.anytime, curve), strict=True))
    if thresholds is not None:
        result["dynamic_threshold"] = thresholds.tolist()
    return report(result | {"images": scores.correct.shape[1]}, vars(args), args.output)


def described(device: Any) -> dict[str, Any]:
    """Where and when something was measured, for a record."""
    import torch

    from common.ledger.results import current_commit, now
    from common.measure.benchmark import describe_device

    threads = torch.get_num_threads() if device.type == "cpu" else None
    return {"device": describe_device(device), "threads": threads, "commit": current_commit(), "created": now()}


def report(result: dict[str, Any], arguments: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """Print the three published lines; keep everything in ``output``, if there is one. Returns ``result``."""
    if output:
        write_atomic(output, json.dumps({**result, "arguments": arguments}, indent=1, default=str) + "\n")
    for name in STORED:
        print(f"{name} : {result[name]}")
    return result


if __name__ == "__main__":
    run(main, expected=(OSError, ValueError))
