"""Accuracy of any network of hubconf.py on ImageNet-1K, or on another data set that it was trained for.

    python hourglass_swag/imagenet_1k_eval.py -m hourglass_vit_l16_in1k -r 512 -b 256 -l 12 -n 529 DIR
    torchrun --nproc-per-node 8 hourglass_swag/imagenet_1k_eval.py -m vit_l16_in1k -r 512 DIR
    python hourglass_swag/imagenet_1k_eval.py -m hourglass_vit_desk -r 32 -l 2 -n 16 --dataset digits --weights FILE
    python hourglass_swag/imagenet_1k_eval.py --sweep "hourglass-l16-*,tome-l16-*" --cache-decoded FOLDER DIR

DIR holds val/<class>/ or img_val/<class>/. The last line printed is the accuracy in percent. --sweep evaluates many
networks of the same weights and resolution in one pass over the images, and last prints a table of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from common.data.paths import check_data_path, reads_folder
from common.run.cli import default_workers
from common.run.errors import DataError, UsageError
from common.run.files import check_files, check_output
from common.run.program import get_logger, run
from common.run.settings import CACHE_DECODED
from hourglass_swag.tools.parser import (
    check_method_flags,
    get_default_parser,
    get_model_args,
    parse_network,
    positionals_first,
)
from hourglass_swag.tools.processes import device_name, images_per_process, set_environment, start_one_per_gpu
from hourglass_swag.tools.sweep import Setting, read_settings
from hourglass_swag.tools.sweep import table as sweep_table

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset

    from common.run.launch import World

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """All published flags, and those of this script."""
    parser = get_default_parser(__doc__)
    parser.set_defaults(workers=default_workers(4))
    group = parser.add_argument_group("beyond the published script")
    group.add_argument(
        "--dataset", "--data-set", default="imagenet", help="imagenet, digits, fashion, inat18, hfds/NAME ..."
    )
    group.add_argument("--split", default="val", help="part of the data set")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    group.add_argument("--skip-bad-images", action="store_true", help="leave out and count undecodable images")
    group.add_argument("--cache-decoded", metavar="DIR", help=CACHE_DECODED)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--amp", default="none", choices=("none", "fp16", "bf16"), help="mixed precision")
    group.add_argument("--compile", action="store_true", help="compile the network first; on a CPU ATS gets slower")
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the random projections of ACT and SMYRF, N + rank in every process; without it "
        "their results vary within noise, as published",
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON, too")
    group.add_argument(
        "--sweep", default="", metavar="ROWS",
        help="in place of -m, -r and the flags of a method: published rows or tables, such as "
        "tome,hourglass-l16-*, or a text file with such flags in every line",
    )  # fmt: skip
    args = parser.parse_args(positionals_first(sys.argv[1:] if argv is None else argv))
    if args.data is None and reads_folder(args.dataset):
        parser.error(f"DIR is missing: the root of {args.dataset}, which holds val/ or img_val/")
    for flag, value in (("--batch-size", args.batch_size), ("--print-freq", args.print_freq)):
        if value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1, got {args.limit}")
    if args.sweep and vars(args) != vars(args) | vars(parse_network("")):
        parser.error("--sweep says which networks: leave out -m, -r and the flags of methods")
    return args


def build_models(args: argparse.Namespace, settings: Sequence[Setting], device: torch.device) -> dict[str, nn.Module]:
    """The networks of settings that share weights, which are loaded once, in evaluation mode on ``device``."""
    import torch

    from common.run.launch import get_rank, main_process_first
    from common.run.precision import amp_dtype
    from hourglass_swag.models import create
    from hourglass_swag.models.ops.projections import set_generator

    if args.no_pretrained and not args.weights:
        logger.warning("--no-pretrained: the weights are random, so the accuracy means nothing")
    first: nn.Module | None = None
    models: dict[str, nn.Module] = {}
    for setting in settings:
        network = setting.network
        try:
            amp_dtype(args.amp, device)
            check_method_flags(network)
            flags = {"image_size": network.resolution, **get_model_args(network)}
            if first is None:
                with main_process_first():  # one download serves all
                    pretrained = not args.no_pretrained
                    first = create(network.model, pretrained=pretrained, weights=args.weights, **flags)
                    model = first = first.eval().to(device)
            else:
                with torch.device("meta"):
                    model = create(network.model, **flags).eval()
                model.load_state_dict(first.state_dict(), assign=True)
        except ValueError as error:
            raise SystemExit(f"error: {network.model}: {error}") from error
        if setting.name and args.seed is not None:  # each its own, so that the others change nothing
            set_generator(model, torch.Generator(device).manual_seed(args.seed + get_rank()))
        models[setting.name] = torch.compile(model) if args.compile else model  # pyright: ignore[reportArgumentType]
    return models


def build_data(args: argparse.Namespace, resolution: int) -> Dataset[Any]:
    """The images to evaluate on."""
    from torch.utils.data import IterableDataset, Subset

    from common.data.loaders import build_dataset
    from hourglass_swag.evaluation import swag_eval_transform

    dataset = build_dataset(
        args.dataset,
        args.data,
        args.split,
        swag_eval_transform(resolution),
        on_bad_image="skip" if args.skip_bad_images else "raise",
        batch_size=args.batch_size,
        keep_decoded=args.cache_decoded,
    )
    if args.limit is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        raise DataError(f"--limit does not work with {args.dataset}, which is a stream")
    return Subset(dataset, range(min(args.limit, len(dataset))))  # pyright: ignore[reportArgumentType]


def warn_of_classes(dataset: Dataset[Any], model: nn.Module) -> None:
    """Say so if the data set's classes cannot be those that the network was trained for."""
    classes = getattr(getattr(dataset, "dataset", dataset), "classes", None)  # of the whole, if it is a part
    outputs = getattr(model, "num_classes", None)
    if classes and outputs and len(classes) != outputs:
        logger.warning(
            "the data set has %d classes and the network %d: unless the classes are its first ones in order, the "
            "accuracy means nothing",
            len(classes),
            outputs,
        )


def evaluate_network(args: argparse.Namespace) -> dict[str, Any]:
    """What one process does."""
    check_files(args.weights)
    check_output(args.output, inputs=[args.weights, args.sweep])
    check_data_path(args.dataset, args.data)
    groups = read_settings(args.sweep) if args.sweep else [[Setting("", args)]]
    if args.weights and len(groups) > 1:
        shared = ", ".join(
            f"{weights} at {resolution}" for resolution, weights in (group[0].shares for group in groups)
        )
        raise UsageError(f"--weights is one file, and the networks of --sweep take {shared}: name those of one")
    import torch

    from common.data.loaders import eval_loader
    from common.measure.benchmark import describe_device
    from common.run.files import write_atomic
    from common.run.launch import launch
    from hourglass_swag.evaluation import evaluate_all

    set_environment(args)
    world = launch(device_name(args), local_rank=args.local_rank)
    report_devices(args, world)
    if args.seed is not None:
        torch.manual_seed(args.seed + world.rank)
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    measured: dict[str, Any] = {}
    for settings in groups:
        dataset = build_data(args, settings[0].network.resolution)
        models = build_models(args, settings, world.device)
        warn_of_classes(dataset, next(iter(models.values())))
        batch = images_per_process(args.batch_size, world.size)
        loader = eval_loader(dataset, batch_size=batch, workers=args.workers)
        rows |= evaluate_all(
            models, loader, world, amp=args.amp, print_freq=args.print_freq, failed=failed if args.sweep else None
        )
        measured = {"rows": rows} if args.sweep else rows[""]
        measured |= {"arguments": vars(args) | {"output": str(args.output)}, "processes": world.size}
        if args.output and world.is_main:  # after each group: what follows may fail, and takes hours
            content = measured | {"device": describe_device(world.device)}
            write_atomic(args.output, json.dumps(content, indent=1) + "\n")
    if args.sweep and world.is_main and rows:
        print(sweep_table([setting for settings in groups for setting in settings if setting.name in rows], rows))
    if failed:
        raise DataError("; ".join(failed.values()))
    return measured


def report_devices(args: argparse.Namespace, world: World) -> None:
    """Say what runs where, on rank 0."""
    if not world.is_main:
        return
    import torch

    print(args)
    if world.device.type == "cpu":
        print("using CPU, this will be slow")
    elif world.size == 1 and args.gpu is None and torch.cuda.device_count() > 1:
        logger.info("one of %d GPUs is used; --multiprocessing-distributed uses all", torch.cuda.device_count())
    if world.backend and world.device.type == "cuda" and args.dist_backend != world.backend:
        logger.warning("--dist-backend %s is ignored: CUDA devices talk through %s", args.dist_backend, world.backend)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script; ``argv`` as on the command line. Returns what ``--output`` holds, but for the device."""
    args = parse_args(argv)
    if not args.multiprocessing_distributed:
        return run(partial(evaluate_network, args))
    words = list(sys.argv[1:] if argv is None else argv)
    with TemporaryDirectory() as folder:
        output = args.output or Path(folder, "result.json")
        start_one_per_gpu(args, __file__, [*words, "--output", str(output)])
        return json.loads(output.read_text())


if __name__ == "__main__":
    main()
