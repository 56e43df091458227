"""Command line of ``main.py``, the published flags and a few of ours, and flags that the other programs share."""

import argparse
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.run import cli
from common.run.errors import CheckpointError, DataError
from common.run.program import get_logger
from dvt import BUDGETS, SEARCH_IMAGES, TRANSFORMS
from dvt.models import MODELS

logger = get_logger(__name__)

RECIPES: dict[str, dict[str, Any]] = {
    "DVT_Deit_small": {"lr": 1e-3, "warmup_epochs": 5, "batch_size": 128},
    "DVT_desk": {
        "data_set": "digits", "num_classes": 10, "img_size": 32, "batch_size": 32, "workers": 0, "epochs": 36,
        "cooldown_epochs": 0, "warmup_epochs": 2, "lr": 3e-3, "clip_grad": 1.0, "model_ema_decay": 0.99, "aa": "",
        "color_jitter": 0.0, "hflip": 0.0, "reprob": 0.0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0,
    },
}  # fmt: skip
"""Defaults of networks without a published recipe; ours. Any flag given wins over them.

DVT_Deit_small: DeiT-S's rate, 5e-4 per 512 images, for 8 x 128 images per step; five epochs of warm-up."""

DEAD_SWITCHES = {
    "--sync-bn": "these networks have no batch normalisation",
    "--split-bn": "these networks have no batch normalisation",
    "--bn-tf": "these networks have no batch normalisation",
    "--save-images": "nothing is saved",
    "--channels-last": "the tokens of these networks have no such layout",
    "--no-prefetcher": "there is no prefetcher",
    "--use-multi-epochs-loader": "loading processes stay from epoch to epoch anyway",
}
DEAD_VALUES = {
    "--gp": "these networks have no global pooling; the official code fails with it",
    "--drop-connect": "--drop-path sets the rate",
    "--drop-block": "these networks have no such blocks; the official code fails with it",
    "--bn-momentum": "these networks have no batch normalisation",
    "--bn-eps": "these networks have no batch normalisation",
    "--dist-bn": "these networks have no batch normalisation",
    "--tta": "every image is evaluated once",
    "--num-gpu": "start one process per GPU with torchrun",
    "--lr-cycle-mul": "there is one cycle",
    "--lr-cycle-limit": "there is one cycle",
}


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Read the command line; a YAML file (``--config``) and a network's recipe replace defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config", type=Path)
    first.add_argument("--model")
    known, _ = first.parse_known_args(argv)
    settings: dict[str, Any] = {}
    parser = build_parser(description)
    if known.config:
        settings = read_config(parser, known.config)
    parser.set_defaults(**RECIPES.get(known.model or settings.get("model", ""), {}) | settings)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def read_config(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Defaults out of a YAML file; an unknown key is an error."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: cannot be read: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config {path}: expected a mapping of flags to values, found {type(content).__name__}")
    flags = {action.dest for action in parser._actions}
    if unknown := sorted(str(key) for key in content if key not in flags):
        parser.error(f"--config {path}: unknown keys {', '.join(unknown)}; keys are flags with underscores")
    return content


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags with the published defaults."""
    parser = cli.make_parser(description, prog="main.py")
    _add_data(parser)
    _add_model(parser)
    cli.add_augmentation_args(
        parser, color_jitter=0.4, train_interpolation="random", repeated_aug=False, mixup=0.8, cutmix=1.0
    )
    _add_augmentation(parser)
    cli.add_optimizer_args(parser, opt_eps=None)
    cli.add_schedule_args(parser, warmup_epochs=20)
    _add_run(parser)
    cli.add_ignored_args(parser, DEAD_SWITCHES, nargs=0)
    cli.add_ignored_args(parser, DEAD_VALUES)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("data", nargs="?", default="", metavar="DIR", help="folder with train/ and val/ (or validation/)")
    add(
        "--data-set",
        default="IMNET",
        metavar="NAME",
        help="IMNET (class folders), digits (without DIR), CIFAR10, CIFAR, or a name for timm's "
        "create_dataset (default: IMNET)",
    )
    add("--img-size", type=cli.positive_int, default=224, metavar="PIXELS", help="side of the input (default: 224)")
    add(
        "--crop-pct",
        type=cli.fraction,
        default=None,
        help="share that the evaluation crop keeps of the resized image's side (default: 0.875, as DVT's"
        " published numbers; 0.9 for a T2T-ViT alone, as its own)",
    )
    add("--mean", type=float, nargs=3, default=None, help="of the channels (default: ImageNet's)")
    add("--std", type=float, nargs=3, default=None, help="of the channels (default: ImageNet's)")
    add("--interpolation", default="", help="of the evaluation resize (default: bicubic)")
    add(
        "-b",
        "--batch-size",
        "--b",
        type=cli.positive_int,
        default=64,
        metavar="N",
        help="images per step and process (default: 64)",
    )
    add(
        "-vb",
        "--validation-batch-size-multiplier",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="batch of the evaluation, in training batches (default: 1)",
    )
    add("-j", "--workers", type=cli.count, default=cli.default_workers(8), metavar="N",
        help="loading processes per process (default: 8, no more than cores)")  # fmt: skip
    add("--pin-mem", action=cli.Switch, default=None, help="page-locked memory (default: on with CUDA)")
    add(
        "--skip-bad-images",
        action=cli.Switch,
        default=False,
        help="leave out images that cannot be decoded, and count them (default: off)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network").add_argument
    add(
        "--model",
        default="T2t_vit_14",
        choices=sorted(MODELS),
        metavar="NAME",
        help=f"one of {', '.join(sorted(MODELS))} (default: T2t_vit_14)",
    )
    add("--num-classes", type=cli.positive_int, default=1000, metavar="C", help="classes (default: 1000)")
    add(
        "--feature-reuse", action=cli.Switch, default=True, help="later exits of a cascade reuse features (default: on)"
    )
    add(
        "--relation-reuse",
        action=cli.Switch,
        default=True,
        help="later exits of a cascade reuse attention logits (default: on)",
    )
    add("--drop", type=cli.fraction, default=0.0, help="dropout rate (default: 0)")
    add("--drop-path", type=cli.fraction, default=0.1, help="drop-path rate of the last block (default: 0.1)")
    add("--initial-checkpoint", default="", metavar="FILE", help="weights to start from, of any kind of checkpoint")
    add("--pretrained", action="store_true", help="refused: there are no such weights; see --initial-checkpoint")
    add(
        "--no-decay-tokens",
        action="store_true",
        help="leave cls_token and pos_embed out of the weight decay; the published cascades decay them",
    )


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation, continued").add_argument
    add("--no-aug", action="store_true", help="only resize and crop the centre; mixup has its own flags")
    add(
        "--scale",
        type=float,
        nargs=2,
        default=None,
        metavar=("MIN", "MAX"),
        help="area of the random crop (default: 0.08 1.0)",
    )
    add(
        "--ratio",
        type=float,
        nargs=2,
        default=None,
        metavar=("MIN", "MAX"),
        help="aspect ratio of the random crop (default: 3/4 4/3)",
    )
    add("--hflip", type=cli.fraction, default=0.5, help="probability of a horizontal flip (default: 0.5)")
    add("--vflip", type=cli.fraction, default=0.0, help="probability of a vertical flip (default: 0)")
    add(
        "--mixup-off-epoch",
        type=cli.count,
        default=0,
        metavar="N",
        help="no mixup from this epoch on; 0 never stops it (default: 0)",
    )
    add(
        "--aug-splits",
        type=cli.count,
        default=0,
        metavar="N",
        help="views of an image, the first one clean; 0 or at least 2 (default: 0)",
    )
    add("--jsd", action="store_true", help="Jensen-Shannon divergence between the views; needs --aug-splits")
    add("--resplit", action="store_true", help="do not erase parts of the clean view")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file whose keys, flags with underscores, replace defaults",
    )
    add(
        "--eval_checkpoint",
        "--eval-checkpoint",
        default="",
        metavar="FILE",
        help="only evaluate this file: packed, or of a training run",
    )
    add(
        "--resume",
        default="",
        metavar="FILE",
        help="continue this run; auto: the last state of --experiment, if there is one",
    )
    add("--no-resume-opt", action="store_true", help="resume without the state of the optimiser and the loss scale")
    add(
        "--start-epoch",
        type=cli.count,
        default=None,
        metavar="N",
        help="epoch to begin at (default: the next one of the resumed run)",
    )
    add("--output", default="", metavar="DIR", help="results go to DIR/train/<time>-<model>-<size> (default: ./output)")
    add(
        "--experiment",
        default="",
        metavar="NAME",
        help="results go to DIR/train/NAME instead, where --resume auto finds them",
    )
    add(
        "--eval-metric",
        default=None,
        metavar="NAME",
        help="what the best state is chosen by: loss, exit1_top1, exit2_top1, exit3_top1, exit3_top5 "
        "(default: exit3_top1; exit1_top1 with one exit)",
    )
    add("--amp", "--native-amp", action="store_true", help="mixed precision of torch: fp16 on CUDA, bf16 on the CPU")
    add("--apex-amp", action="store_true", help="the same as --amp, with a warning: apex is not used")
    add("--amp-dtype", choices=("fp16", "bf16"), default=None, help="another precision for --amp")
    add("--compile", action=cli.Switch, default=False, help="run the network through torch.compile (default: off)")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, or cuda:N (default: auto)")
    add("--seed", type=cli.count, default=42, help="of all random numbers; each process adds its rank (default: 42)")
    add(
        "--log-interval",
        type=cli.positive_int,
        default=50,
        metavar="N",
        help="steps between two rows of the record (default: 50)",
    )
    add(
        "--recovery-interval",
        type=cli.count,
        default=0,
        metavar="N",
        help="steps between two checkpoints within epochs; 0 for none (default: 0)",
    )
    add("--tensorboard", action=cli.Switch, default=False, help="also write TensorBoard's files (default: off)")
    add("--local-rank", "--local_rank", type=int, default=None, metavar="N", help="set by torch.distributed.launch")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is loaded."""
    exits = 3 if MODELS[args.model].stages else 1
    metrics = ["loss", *(f"exit{number}_top1" for number in range(1, exits + 1)), f"exit{exits}_top5"]
    if args.eval_metric is None:
        args.eval_metric = f"exit{exits}_top1"
    if args.eval_metric not in metrics:
        parser.error(f"--eval-metric {args.eval_metric}: {args.model} has {', '.join(metrics)}")
    if args.eval_metric.endswith("top5") and args.num_classes < 6:
        parser.error(f"--eval-metric {args.eval_metric}: with {args.num_classes} classes it is always 100 %; use top1")
    if args.pretrained:
        parser.error("--pretrained: there are no such weights; give --initial-checkpoint FILE")
    if not args.data and args.data_set != "digits":
        parser.error("DIR is missing: the folder with train/ and val/")
    if args.data and args.data_set == "digits":
        parser.error(f"{args.data}: the digits ship inside scikit-learn; leave DIR out, or say --data-set IMNET")
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    if args.aug_splits == 1:
        parser.error("--aug-splits 1: give 0, or at least 2 views")
    if args.jsd and not args.aug_splits:
        parser.error("--jsd compares views: give --aug-splits 3, for instance")
    if args.aug_splits and mixing:
        parser.error("--aug-splits cannot be mixed: add --mixup 0 --cutmix 0")
    if mixing and args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size}: mixup pairs the images of a batch, so it must be even")
    if args.resume == "auto" and not args.experiment:
        parser.error("--resume auto looks into the folder of --experiment NAME: give one")
    if args.aa == "none":
        args.aa = ""
    if args.apex_amp:
        logger.warning("--apex-amp: apex is not used; torch's own mixed precision is (--amp)")
    args.amp = bool(args.amp or args.apex_amp or args.amp_dtype)


def add_network_args(parser: argparse.ArgumentParser, names: Collection[str], **options: Any) -> None:
    """Flags of the network that a checkpoint holds, shared by the programs that read one."""
    add = parser.add_argument_group("network").add_argument
    add(
        "--model", default="DVT_T2t_vit_12", choices=sorted(names), metavar="NAME",
        help=f"one of {', '.join(sorted(names))} (default: DVT_T2t_vit_12)",
    )  # fmt: skip
    add("--num-classes", type=cli.positive_int, default=None, metavar="C", help="classes (default: the data set's)")
    add(
        "--img-size",
        type=cli.positive_int,
        default=None,
        metavar="PIXELS",
        help="side of the input (default: the network's)",
    )
    for kind in ("feature", "relation"):
        add(
            f"--{kind}-reuse", action=cli.Switch, default=None,
            help="the cascade was trained with it (default: as the checkpoint's weights say)",
        )  # fmt: skip


def add_image_args(parser: argparse.ArgumentParser) -> None:
    """Flags of the images that a checkpoint is run on."""
    add = parser.add_argument_group("images").add_argument
    add(
        "--dataset", default="imagenet", metavar="NAME",
        help="imagenet (train/ and val/), cifar10, cifar100, digits, or a name for timm's create_dataset",
    )  # fmt: skip
    add(
        "--transforms", "--pictures", default=None, choices=TRANSFORMS,
        help="those of training on ImageNet or of the transfer to CIFAR (default: by the data set)",
    )  # fmt: skip
    add("-b", "--batch-size", "--batch_size", type=cli.positive_int, default=64, metavar="N", help="images at once")
    add("-j", "--workers", type=cli.count, default=cli.default_workers(8), metavar="N", help="loading processes")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")


def add_search_args(parser: argparse.ArgumentParser) -> None:
    """Flags of the search for thresholds."""
    add = parser.add_argument_group("search for thresholds").add_argument
    add(
        "--model-ema", action=cli.Switch, default=True,
        help="of a training file take the moving average of the weights (default: on)",
    )  # fmt: skip
    add(
        "--search-images", "--search-pictures", type=cli.positive_int, default=SEARCH_IMAGES, metavar="N",
        help=f"training images that thresholds are found on, at most (default: {SEARCH_IMAGES})",
    )  # fmt: skip
    add(
        "--augment-search", action=cli.Switch, default=True,
        help="crop and flip them at random, as published; off takes them as validation images (default: on)",
    )  # fmt: skip
    add("--seed", type=cli.count, default=0, help="of their draw and augmentation (default: 0)")


def budget_row(text: str) -> int:
    """``--p``: a row of the stored thresholds."""
    value = int(text)
    if not 1 <= value <= BUDGETS:
        raise argparse.ArgumentTypeError(f"must be from 1 to {BUDGETS}, got {text}")
    return value


def check_paths(checkpoints: Iterable[str] = (), *, dataset: str = "", root: str | None = None) -> None:
    """Refuse files and a data folder that are not there, before anything heavy is imported.

    Args:
        checkpoints: files or URLs; an empty one is not looked for.
        dataset: name of a data set; only that of class folders must be there already.
        root: its folder.

    Raises:
        CheckpointError, DataError: naming what is missing.
    """
    for file in checkpoints:
        if file and "://" not in file and not Path(file).is_file():
            raise CheckpointError(f"{file}: no such file")
    if dataset in ("imagenet", "IMNET", "folder") and not Path(root or "").is_dir():
        raise DataError(f"{root}: no such folder; it must hold train/ and val/")
