"""Pack trained weights for inference: the five-entry dictionary of the published checkpoints.

    python dvt/pack.py DIR --model DVT_T2t_vit_12 --checkpoint model_best.pth.tar --output DVT_T2t_vit_12.pth.tar
    python dvt/pack.py DIR --model DVT_T2t_vit_12 --dataset cifar10 --checkpoint best.pth --output cifar.pth.tar

Cost per exit is counted; thresholds of the 59 published budgets are found on training images; accuracies are taken on
the validation images. The result serves ``inference.py`` in every mode, and also of the official release. With
--export the cascade, images to the logits of all exits, is also written as ONNX or for torch.export.load.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.data.paths import check_data_path, reads_folder
from common.run import cli
from common.run.files import check_files, check_output
from common.run.program import get_logger, run
from dvt.arguments import add_image_args, add_network_args, add_search_args, network_options
from dvt.models import CASCADES

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, prog="pack.py")
    add = parser.add_argument
    add("data", nargs="?", default="", metavar="DIR", help="folder of the data set; digits and fashion need none")
    add("--checkpoint", required=True, metavar="FILE",
        help="weights: of main.py, of transfer_learning.py, of the official trainer, packed or plain")  # fmt: skip
    add("--output", required=True, type=Path, metavar="FILE", help="packed checkpoint to write")
    add(
        "--export", type=Path, metavar="FILE", help="also write the cascade there: .onnx, or .pt2 for torch.export.load"
    )
    add_network_args(parser, CASCADES)
    add_image_args(parser)
    add_search_args(parser)
    args = parser.parse_args(argv)
    if not args.data and reads_folder(args.dataset):
        parser.error(f"{args.dataset} needs DIR, the folder of the data set")
    if args.export and args.export.suffix not in (".onnx", ".pt2"):
        parser.error(f"--export {args.export}: expected a file that ends in .onnx or .pt2")
    return args


def main(argv: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Evaluate, search, write; returns what was written."""
    args = parse_args(argv)
    check_files(args.checkpoint)
    check_output(args.output, args.export, inputs=[args.checkpoint])
    check_data_path(args.dataset, args.data)
    import torch

    from common.data.build import check_trained_classes
    from common.run.checkpoint import read_checkpoint, save_atomic
    from common.run.export import export_onnx, export_program
    from common.run.launch import choose_device
    from dvt.costs import exit_gflops
    from dvt.evaluation import ImageSource, collect_scores
    from dvt.exits import find_thresholds
    from dvt.loading import load_network
    from dvt.models.cascade import Cascade

    content, device, options = read_checkpoint(args.checkpoint), choose_device(args.device), network_options(args)
    images = ImageSource.of(args, root=args.data, size=options["img_size"])
    held_out = images.held_out()
    check_trained_classes(content, held_out, args.checkpoint)
    search = images.search(augment=args.augment_search, count=args.search_images, seed=args.seed)
    model = load_network(args.model, content, source=args.checkpoint, average=args.model_ema, **options)
    model = model.to(device).eval()
    assert isinstance(model, Cascade)
    thresholds = find_thresholds(collect_scores(model, search, device=device, title="training images").confidence)
    scores = collect_scores(model, held_out, device=device, title="validation images")
    gflops = exit_gflops(model)
    packed: dict[str, Any] = {
        "model_state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
        "flops": gflops,
        "anytime_classification": scores.anytime,
        "dynamic_threshold": thresholds,
        "budgeted_batch_classification": scores.leave(gflops, thresholds).as_lists(),
    }
    save_atomic(packed, args.output)
    print(json.dumps({name: packed[name] for name in packed if name not in ("model_state_dict", "dynamic_threshold")}))
    logger.info("written to %s", args.output)
    if args.export:
        probe = torch.randn(3, 3, *model.stages[0].img_size, generator=torch.Generator().manual_seed(0))
        names = [f"exit{k}" for k in range(1, len(gflops) + 1)]
        write = partial(export_onnx, outputs=names) if args.export.suffix == ".onnx" else export_program
        off = write(model.float().cpu(), probe, args.export)
        logger.info("written to %s; its outputs are off by %.0e at most", args.export, off)
    shown = "  ".join(f"exit{k} {value:.3f}" for k, value in enumerate(packed["anytime_classification"], 1))
    print(f"{shown}  best budgeted {max(packed['budgeted_batch_classification'][1]):.3f}")
    return packed


if __name__ == "__main__":
    run(main, expected=(OSError, ValueError))
