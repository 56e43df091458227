"""Command line of ``main.py``, the published flags and a few of ours, and flags that the other programs share."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.data.paths import INSIDE, reads_folder
from common.run import cli
from common.run.flags import Group
from common.run.program import get_logger
from common.run.settings import CACHE_DECODED, FSDP
from common.sizes import TIMM, Names
from dvt import BUDGETS, SEARCH_IMAGES, TRANSFORMS
from dvt.models import GRIDS, MODELS, find_entry

logger = get_logger(__name__)

RECIPES: dict[str, dict[str, Any]] = {
    "DVT_Deit_small": {"lr": 1e-3, "warmup_epochs": 5, "batch_size": 128},
    "DVT_desk": {
        "data_set": "digits", "num_classes": 10, "img_size": 32, "batch_size": 32, "workers": 0, "epochs": 36,
        "cooldown_epochs": 0, "warmup_epochs": 2, "lr": 3e-3, "model_ema_decay": 0.99, "aa": "",
        "color_jitter": 0.0, "hflip": 0.0, "reprob": 0.0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0,
    },
}  # fmt: skip
"""Defaults of networks without a published recipe; ours. Any flag given wins over them.

DVT_Deit_small: DeiT-S's rate, 5e-4 per 512 images, for 8 x 128 images per step; five epochs of warm-up."""

NO_BATCH_NORM = "these networks have no batch normalisation"
DEAD_SWITCHES = {
    "--sync-bn, --split-bn, --bn-tf": NO_BATCH_NORM,
    "--save-images": "nothing is saved",
    "--channels-last": "the tokens of these networks have no such layout",
    "--no-prefetcher": "there is no prefetcher",
    "--use-multi-epochs-loader": "loading processes stay from epoch to epoch anyway",
}
DEAD_OPTIONS = {
    "--gp": "these networks have no global pooling; the official code fails with it",
    "--drop-connect": "--drop-path sets the rate",
    "--drop-block": "these networks have no such blocks; the official code fails with it",
    "--bn-momentum, --bn-eps": NO_BATCH_NORM,
}
"""Of the networks, in T2T-ViT's transfer script too."""

DEAD_VALUES = {
    "--dist-bn": NO_BATCH_NORM,
    "--tta": "every image is evaluated once",
    "--num-gpu": "start one process per GPU with torchrun",
    "--lr-cycle-mul, --lr-cycle-limit": "there is one cycle",
}


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Read the command line; a YAML file (``--config``) and a network's recipe replace defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config", type=Path)
    first.add_argument("--model")
    known, _ = first.parse_known_args(argv)
    parser = build_parser(description)
    settings = read_config(parser, known.config) if known.config else {}
    model = known.model or settings.get("model", "")
    recipe = {"num_classes": None} if model.startswith(TIMM) else RECIPES.get(model, {})
    parser.set_defaults(**recipe | settings)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def read_config(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Defaults out of a YAML file; an unknown key is an error."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: cannot be read: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config {path}: expected a mapping of flags to values, found {type(content).__name__}")
    actions = {action.dest: action for action in parser._actions}
    if unknown := sorted(str(key) for key in content if key not in actions):
        parser.error(f"--config {path}: unknown keys {', '.join(unknown)}; keys are flags with underscores")
    return {key: _checked(parser, path, actions[key], value) for key, value in content.items()}


def _checked(parser: argparse.ArgumentParser, path: Path, action: argparse.Action, value: Any) -> Any:
    """A value of a YAML file, as its flag takes it."""
    if action.nargs == 0:
        if not isinstance(value, (bool, type(None))):
            parser.error(f"--config {path}: {action.dest}: expected true or false, got {value!r:.80}")
        return value
    words = value if isinstance(value, list) else [value]
    if value is None:
        return None
    if not all(isinstance(word, (str, int, float)) for word in words):
        parser.error(f"--config {path}: {action.dest}: expected values, and none that hold others")
    wanted = action.nargs if isinstance(action.nargs, int) else 1 if action.nargs != "+" else len(words) or 1
    if len(words) != wanted:
        parser.error(f"--config {path}: {action.dest}: expected {wanted} values, got {len(words)}")
    try:
        return parser._get_values(action, [str(word) for word in words])
    except argparse.ArgumentError as error:
        parser.error(f"--config {path}: {error}")


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags with the published defaults."""
    parser = cli.make_parser(description, prog="main.py")
    add = Group(parser, "data")
    add("data", str, "", "folder with train/ and val/ (or validation/)", nargs="?", metavar="DIR")
    add("--data-set", str, "IMNET", metavar="NAME",
        help="IMNET (class folders), digits and fashion (without DIR), CIFAR10, CIFAR, or a name for timm's "
        "create_dataset")  # fmt: skip
    add("--img-size", cli.positive_int, 224, "side of the input", metavar="PIXELS")
    add("--crop-pct", cli.fraction, None, "share that the evaluation crop keeps of the resized image's side "
        "(default: 0.875, as DVT's published numbers; 0.9 for a T2T-ViT alone, as its own)")  # fmt: skip
    add("--mean", float, None, "of the channels (default: ImageNet's)", nargs=3)
    add("--std", float, None, "of the channels (default: ImageNet's)", nargs=3)
    add("--interpolation", str, "", "of the evaluation resize (default: bicubic)")
    add("-b --batch-size --b", cli.positive_int, 64, "images per step and process", metavar="N")
    add("-vb --validation-batch-size-multiplier", cli.positive_int, 1, "batch of the evaluation, in training batches",
        metavar="N")  # fmt: skip
    add("-j --workers", cli.count, cli.default_workers(8),
        "loading processes per process (default: 8, no more than cores)", metavar="N")  # fmt: skip
    add("--pin-mem", cli.Switch, None, "page-locked memory (default: on with CUDA)")
    add("--skip-bad-images", cli.Switch, False, "leave out images that cannot be decoded, and count them")
    add("--cache-decoded", str, "", CACHE_DECODED, metavar="DIR")

    add = Group(parser, "network")
    add_model_args(add, MODELS, "T2t_vit_14")
    add("--num-classes", cli.positive_int, 1000, f"classes (default: 1000; of {TIMM}NAME the data's)", metavar="C")
    add("--feature-reuse", cli.Switch, True, "later exits of a cascade reuse features")
    add("--relation-reuse", cli.Switch, True, "later exits of a cascade reuse attention logits")
    add("--drop", cli.fraction, 0.0, "dropout rate")
    add("--drop-path", cli.fraction, 0.1, "drop-path rate of the last block")
    add("--initial-checkpoint", str, "", "weights to start from, of any kind of checkpoint", metavar="FILE")
    add("--weights", str, "", f"of {TIMM}NAME: weights of the plain network, which every stage begins with",
        metavar="FILE")  # fmt: skip
    add("--pretrained", bool, False, "refused: there are no such weights; see --initial-checkpoint")
    add("--no-decay-tokens", bool, False,
        "leave cls_token and pos_embed out of the weight decay; the published cascades decay them")  # fmt: skip

    cli.add_augmentation_args(
        parser, color_jitter=0.4, train_interpolation="random", repeated_aug=False, mixup=0.8, cutmix=1.0
    )

    add = Group(parser, "augmentation, continued")
    limits: dict[str, Any] = {"nargs": 2, "metavar": ("MIN", "MAX")}
    add("--no-aug", bool, False, "only resize and crop the centre; mixup has its own flags")
    add("--scale", float, None, "area of the random crop (default: 0.08 1.0)", **limits)
    add("--ratio", float, None, "aspect ratio of the random crop (default: 3/4 4/3)", **limits)
    add("--hflip", cli.fraction, 0.5, "probability of a horizontal flip")
    add("--vflip", cli.fraction, 0.0, "probability of a vertical flip")
    add("--mixup-off-epoch", cli.count, 0, "no mixup from this epoch on; 0 never stops it", metavar="N")
    add("--aug-splits", cli.count, 0, "views of an image, the first one clean; 0 or at least 2", metavar="N")
    add("--jsd", bool, False, "Jensen-Shannon divergence between the views; needs --aug-splits")
    add("--resplit", bool, False, "do not erase parts of the clean view")

    cli.add_optimizer_args(parser, opt_eps=None)
    cli.add_schedule_args(parser, warmup_epochs=20)

    add = Group(parser, "run")
    add("-c --config", Path, None, "YAML file whose keys, flags with underscores, replace defaults", metavar="FILE")
    add("--eval_checkpoint --eval-checkpoint", str, "", "only evaluate this file: packed, or of a training run",
        metavar="FILE")  # fmt: skip
    add("--resume", str, "", "continue this run; auto: the last state of --experiment, if there is one", metavar="FILE")
    add("--no-resume-opt", bool, False, "resume without the state of the optimiser and the loss scale")
    add("--start-epoch", cli.count, None, "epoch to begin at (default: the next one of the resumed run)", metavar="N")
    add("--output", str, "", "results go to DIR/train/<time>-<model>-<size> (default: ./output)", metavar="DIR")
    add("--experiment", str, "", "results go to DIR/train/NAME instead, where --resume auto finds them", metavar="NAME")
    add("--eval-metric", str, None, metavar="NAME",
        help="what the best state is chosen by: loss, exit1_top1, exit2_top1, exit3_top1, exit3_top5 "
        "(default: exit3_top1; exit1_top1 with one exit)")  # fmt: skip
    add("--amp --native-amp", bool, False, "mixed precision of torch: fp16 on CUDA, bf16 on the CPU")
    add("--apex-amp", bool, False, "the same as --amp, with a warning: apex is not used")
    add("--amp-dtype", ("fp16", "bf16"), None, "another precision for --amp")
    add("--compile", cli.Switch, False, "run the network through torch.compile")
    add("--fsdp", bool, False, FSDP)
    add("--device", str, "auto", "auto (CUDA if there is one), cpu, cuda, or cuda:N")
    add("--seed", cli.count, 42, "of all random numbers; each process adds its rank")
    add("--log-interval", cli.positive_int, 50, "steps between two rows of the record", metavar="N")
    add("--recovery-interval", cli.count, 0, "steps between two checkpoints within epochs; 0 for none", metavar="N")
    add("--tensorboard", cli.Switch, False, "also write TensorBoard's files")
    add("--local-rank --local_rank", int, None, "set by torch.distributed.launch", metavar="N")

    cli.add_ignored_args(parser, DEAD_SWITCHES, nargs=0)
    cli.add_ignored_args(parser, DEAD_OPTIONS | DEAD_VALUES)
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is loaded."""
    try:
        exits = find_entry(args.model, args.grids).exits
    except ValueError as error:
        parser.error(f"--grids: {error}")
    metrics = ["loss", *(f"exit{number}_top1" for number in range(1, exits + 1)), f"exit{exits}_top5"]
    metric = args.eval_metric = args.eval_metric or f"exit{exits}_top1"
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    inside = cli.dataset_name(args.data_set) in INSIDE
    for wrong, message in (
        (metric not in metrics, f"--eval-metric {metric}: {args.model} has {', '.join(metrics)}"),
        (args.weights and not args.model.startswith(TIMM),
         f"--weights belongs to --model {TIMM}NAME; {args.model} begins with --initial-checkpoint"),
        (args.weights and args.initial_checkpoint,
         "--weights is a plain network, --initial-checkpoint a whole cascade: give one of them"),
        (metric.endswith("top5") and args.num_classes is not None and args.num_classes < 6,
         f"--eval-metric {metric}: with {args.num_classes} classes it is always 100 %; use top1"),
        (args.pretrained, "--pretrained: there are no such weights; give --initial-checkpoint FILE"),
        (not args.data and reads_folder(args.data_set), "DIR is missing: the folder with train/ and val/"),
        (args.data and inside,
         f"{args.data}: {args.data_set} ships inside and reads no folder; leave DIR out, or say --data-set IMNET"),
        (args.aug_splits == 1, "--aug-splits 1: give 0, or at least 2 views"),
        (args.jsd and not args.aug_splits, "--jsd compares views: give --aug-splits 3, for instance"),
        (args.aug_splits and mixing, "--aug-splits cannot be mixed: add --mixup 0 --cutmix 0"),
        (mixing and args.batch_size % 2,
         f"--batch-size {args.batch_size}: mixup pairs the images of a batch, so it must be even"),
        (args.fsdp and args.eval_checkpoint, "--fsdp is for training: leave it out, and evaluate one file"),
        (args.resume == "auto" and not args.experiment,
         "--resume auto looks into the folder of --experiment NAME: give one"),
    ):  # fmt: skip
        if wrong:
            parser.error(message)
    if args.aa == "none":
        args.aa = ""
    if args.apex_amp:
        logger.warning("--apex-amp: apex is not used; torch's own mixed precision is (--amp)")
    args.amp = bool(args.amp or args.apex_amp or args.amp_dtype)


def add_model_args(add: Group, names: Collection[str], default: str, *, any_vit: bool = True) -> None:
    """--model, one of these names or, with ``any_vit``, of timm's; and --grids."""
    known = sorted(names)
    shown, kind = ", ".join(known), Names if any_vit else tuple
    more = f", or {TIMM}NAME for any plain Vision Transformer of timm" if any_vit else ""
    add("--model", kind(known), default, f"one of {shown}{more}", metavar="NAME")
    if any_vit:
        shown = " ".join(map(str, GRIDS))
        said = f"of {TIMM}NAME: tokens along a side of each stage, from few to many; one for a network with one exit"
        add("--grids", cli.positive_int, None, f"{said} (default: {shown})", nargs="+", metavar="N")


def add_network_args(parser: argparse.ArgumentParser, names: Collection[str], *, any_vit: bool = True) -> None:
    """Flags of the network that a checkpoint holds, shared by the programs that read one."""
    add = Group(parser, "network")
    add_model_args(add, names, "DVT_T2t_vit_12", any_vit=any_vit)
    add("--num-classes", cli.positive_int, None, f"classes (default: the data set's; of {TIMM}NAME the file's)",
        metavar="C")  # fmt: skip
    add("--img-size", cli.positive_int, None, "side of the input (default: the network's)", metavar="PIXELS")
    for kind in ("feature", "relation"):
        add(f"--{kind}-reuse", cli.Switch, None,
            "the cascade was trained with it (default: as the checkpoint's weights say, on without any)")  # fmt: skip


def network_options(args: argparse.Namespace) -> dict[str, Any]:
    """What these flags say, as options of ``dvt.loading.load_network``."""
    from common.data.loaders import default_num_classes

    if args.model.startswith(TIMM):
        own: dict[str, Any] = {"grids": args.grids, "num_classes": args.num_classes}
    else:
        own = {"num_classes": args.num_classes or default_num_classes(args.dataset)}
    return {
        **own,
        "img_size": args.img_size or find_entry(args.model).img_size,
        "feature_reuse": args.feature_reuse,
        "relation_reuse": args.relation_reuse,
    }


def add_image_args(parser: argparse.ArgumentParser) -> None:
    """Flags of the images that a checkpoint is run on."""
    add = Group(parser, "images")
    add("--dataset", str, "imagenet", metavar="NAME",
        help="imagenet (train/ and val/), cifar10, cifar100, digits, fashion, or a name for timm's "
        "create_dataset")  # fmt: skip
    add("--transforms --pictures", TRANSFORMS, None,
        "those of training on ImageNet or of the transfer to CIFAR (default: by the data set)")  # fmt: skip
    add("-b --batch-size --batch_size", cli.positive_int, 64, "images at once", metavar="N")
    add("-j --workers", cli.count, cli.default_workers(8), "loading processes", metavar="N")
    add("--device", str, "auto", "auto (CUDA where there is one), cpu, cuda or cuda:N")


def add_search_args(parser: argparse.ArgumentParser) -> None:
    """Flags of the search for thresholds."""
    add = Group(parser, "search for thresholds")
    add("--model-ema", cli.Switch, True, "of a training file take the moving average of the weights")
    add("--search-images --search-pictures", cli.positive_int, SEARCH_IMAGES,
        "training images that thresholds are found on, at most", metavar="N")  # fmt: skip
    add("--augment-search", cli.Switch, True,
        "crop and flip them at random, as published; off takes them as validation images")  # fmt: skip
    add("--seed", cli.count, 0, "of their draw and augmentation")


def budget_row(text: str) -> int:
    """``--p``: a row of the stored thresholds."""
    value = int(text)
    if not 1 <= value <= BUDGETS:
        raise argparse.ArgumentTypeError(f"must be from 1 to {BUDGETS}, got {text}")
    return value
