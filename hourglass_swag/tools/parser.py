"""Command-line flags shared by the accuracy and the cost tool, and what of them reaches a network."""

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from common.run.flags import make_parser
from hourglass_swag.models import names

DEFAULT_MODEL = "vit_b16_in1k"
FORMS = ("auto", "native", "fused", "torch_scatter")  # of ToMe's merging, see tome/ops.py

RESOLUTIONS = {"h14": 518, "l16": 512, "b16": 384, "regnety": 384, "desk": 32}
"""Part of a name -> side in pixels at which the published classifier was trained."""


def trained_resolution(name: str) -> int:
    """Side in pixels of the images that a classifier of the registry was trained on."""
    return next(side for part, side in RESOLUTIONS.items() if part in name)


_TRUE = frozenset({"true", "t", "yes", "y", "on", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "off", "0", ""})


def boolean(word: str) -> bool:
    """Read True or False (the published flags took every word but the empty one as True)."""
    if word.lower() in _TRUE:
        return True
    if word.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {word!r}")


def not_negative(word: str) -> int:
    """Read a count."""
    if (number := int(word)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {word}")
    return number


LAYER_LISTS = ("--drop_loc", "--ats_blocks_indexes", "--layers")  # flags that take any number of words


def positionals_first(words: Sequence[str]) -> list[str]:
    """Move what follows a list of layers (a data set, images) to the front: argparse would take it for a layer."""
    front: list[str] = []
    rest: list[str] = []
    flag = ""
    for i, word in enumerate(words):
        if word == "--":
            return [*front, *rest, *words[i:]]
        if word.startswith("-") and not _is_number(word):
            flag = word
        elif flag in LAYER_LISTS and not _is_number(word):
            flag = "positional"
        (front if flag == "positional" else rest).append(word)
    return front + rest


def _is_number(word: str) -> bool:
    return word.lstrip("-").isdecimal()


def model_choices() -> list[str]:
    """Names that ``-m`` offers: those with a classification head."""
    return names(classifiers=True)


def add_weight_args(group: Any) -> None:
    """Flags that say with which weights; ``group`` is a parser or a group of one."""
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint of the published or of torchvision's layout; without it the published file is taken from "
        "torch.hub's cache or downloaded into it",
    )
    group.add_argument("--no-pretrained", action="store_true", help="random weights, for trying things out")


def add_any_network_args(group: Any, default: str | None = None) -> None:
    """Flags that say which network, by default at the resolution of its training, with which weights."""
    choices = model_choices()
    group.add_argument(
        "-m", "--model", default=default, required=default is None, choices=choices, metavar="NAME",
        help=f"one of {', '.join(choices)}",
    )  # fmt: skip
    group.add_argument("-r", "--resolution", type=int, help="side of the input in pixels (default: as trained)")
    add_weight_args(group)


def parse_any_network(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """A command line with ``add_any_network_args``; the resolution filled in."""
    args = parser.parse_args(positionals_first(sys.argv[1:] if argv is None else argv))
    if args.resolution is None:
        args.resolution = trained_resolution(args.model)
    return args


def add_network_args(parser: argparse.ArgumentParser) -> None:
    """Flags that say which network, at which resolution, with which weights."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        choices=model_choices(),
        metavar="NAME",
        help="a name of hubconf.py: " + ", ".join(model_choices()),
    )
    group.add_argument("-r", "--resolution", type=int, default=224, help="side of the input in pixels")
    add_weight_args(group)


def add_cost_network_args(parser: argparse.ArgumentParser) -> None:
    """Flags that say which network is measured, at which resolution and, for once, with which weights."""
    group = parser.add_argument_group("network")
    choices = names()
    group.add_argument(
        "-m", "--model", default=DEFAULT_MODEL, choices=choices, metavar="NAME", help=f"one of {', '.join(choices)}"
    )
    group.add_argument("-r", "--resolution", type=int, default=224, help="side of the input in pixels")


def parse_network(words: str | Sequence[str]) -> argparse.Namespace:
    """Network, resolution and method flags from the words of a command line.

    Raises:
        ValueError: if they are not valid.
    """
    parser = argparse.ArgumentParser(prog="", add_help=False, allow_abbrev=False, exit_on_error=False)
    add_cost_network_args(parser)
    add_model_args(parser)
    try:
        args, unknown = parser.parse_known_args(shlex.split(words) if isinstance(words, str) else list(words))
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"{words!r} does not describe a network: {error}") from error
    if unknown:
        raise ValueError(f"{words!r} does not describe a network: unknown words {unknown}")
    return args


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Flags of the methods, under their published names and with their published defaults."""
    group = parser.add_argument_group("Hourglass (hourglass_vit_*)")
    group.add_argument(
        "-l",
        "--clustering_location",
        type=int,
        default=-1,
        help="index of the layer before which tokens are clustered; -1: nowhere",
    )
    group.add_argument(
        "-n", "--num_cluster", type=int, default=1000, help="number of clusters, a square; the default is none"
    )
    group.add_argument("--cluster_iters", type=int, default=5, help="iterations of the clustering")
    group.add_argument(
        "--cluster_temperture", type=float, default=1.0, help="factor of the squared distances in the soft assignment"
    )
    group.add_argument(
        "--cluster_window_size", type=int, default=5, help="odd side, in clusters, of the window a token may join"
    )
    group = parser.add_argument_group("ToMe (tome_vit_*)")
    group.add_argument(
        "--tome_r", type=int, default=0, help="tokens merged in every layer, at least 0; a layer merges at most half"
    )
    group.add_argument(
        "--scatter",
        choices=FORMS,
        default="auto",
        help="beyond the published flags: how tokens are matched and averaged; auto: by kernels on an NVIDIA GPU, "
        "else in plain PyTorch",
    )
    group = parser.add_argument_group("EViT (e_vit_*)")
    group.add_argument(
        "--base_keep_rate", type=float, default=0.7, help="fraction of the patches kept at each location"
    )
    group.add_argument(
        "--drop_loc",
        type=int,
        nargs="+",
        default=[3, 6, 9],
        help="indices of the layers that drop patches; the default suits 12 layers, the published rows use 6 12 18 "
        "(L/16) and 8 16 24 (H/14)",
    )
    group.add_argument("--fuse_token", action="store_true", help="fuse the dropped patches into one more token")
    group.add_argument(
        "--evit_score",
        choices=("mean", "cls"),
        default="mean",
        help="beyond the published flags: rank patches by the attention of all tokens, as the published rows do, or of "
        "the class token, as EViT's paper does",
    )
    group = parser.add_argument_group("ACT (act_*)")
    group.add_argument("--act_plug_in_index", type=int, default=0, help="first layer with clustered attention")
    group.add_argument(
        "--act_plug_out_index", type=int, default=-1, help="first layer after that without it; -1: never"
    )
    group.add_argument("--act_group_q", type=boolean, default=True, metavar="BOOL", help="cluster the queries")
    group.add_argument("--act_group_k", type=boolean, default=False, metavar="BOOL", help="cluster keys and values")
    group.add_argument("--act_q_hashes", type=int, default=32, help="hash rounds for the queries")
    group.add_argument("--act_k_hashes", type=int, default=32, help="hash rounds for the keys, where clustered")
    group = parser.add_argument_group("SMYRF (smyrf_*)")
    group.add_argument("--smyrf_plug_in_index", type=int, default=0, help="first layer with SMYRF attention")
    group.add_argument(
        "--smyrf_plug_out_index", type=int, default=-1, help="first layer after that without it; -1: never"
    )
    group.add_argument("--smyrf_n_hashes", type=int, default=32, help="hash rounds")
    group.add_argument("--smyrf_q_cluster_size", type=int, default=64, help="queries per cluster")
    group.add_argument("--smyrf_k_cluster_size", type=int, default=64, help="keys per cluster")
    group.add_argument(
        "--smyrf_padded",
        action="store_true",
        help="beyond the published flags: keep heads and images apart instead of letting clusters straddle them, so "
        "that a result does not depend on the batch; the published numbers are without it",
    )
    group = parser.add_argument_group("ATS (ats_*)")
    group.add_argument("--ats_blocks_indexes", type=int, nargs="*", default=[], help="indices of the sampling layers")
    group.add_argument(
        "--ats_num_tokens",
        type=int,
        default=197,
        help="upper bound of the tokens sampled; it cannot bind, so at least as many as enter (1025 on L/16 at 512)",
    )
    group.add_argument("--ats_drop_tokens", action="store_true", help="shorten the sequence instead of masking")
    group.add_argument(
        "--ats_residual",
        choices=("normalized", "input"),
        default="normalized",
        help="beyond the published flags: what attention is added to, a layer's normalised input, as in the published "
        "rows, or its input, as in ATS's paper",
    )
    group = parser.add_argument_group("Evo-ViT (evo_*)")
    group.add_argument(
        "--evo_prune_ratio", type=float, default=0.5, help="fraction of the patches KEPT from the pruning layer on"
    )
    group.add_argument("--evo_prune_location", type=int, default=4, help="index of the first pruned layer")
    group.add_argument(
        "--evo_tradeoff",
        type=float,
        default=0.5,
        help="beyond the published flags: weight of a layer's own class attention in the running one",
    )


def add_evaluation_args(parser: argparse.ArgumentParser) -> None:
    """Published flags of the accuracy tool besides the network's: data, output, processes."""
    parser.add_argument(
        "data",
        metavar="DIR",
        nargs="?",
        help="root of the data set: DIR/val/<class>/ or DIR/img_val/<class>/ for ImageNet",
    )
    group = parser.add_argument_group("data and output")
    group.add_argument("-j", "--workers", type=not_negative, default=4, help="processes that load images, per rank")
    group.add_argument(
        "-b", "--batch-size", type=int, default=200, help="images per batch, of all processes of a machine together"
    )
    group.add_argument("-p", "--print-freq", type=int, default=10, help="batches between two progress lines")
    group = parser.add_argument_group(
        "processes", "the job is read from torchrun's, torch.distributed.launch's or Slurm's variables where they exist"
    )
    group.add_argument("--world-size", type=int, default=-1, help="number of machines (of processes, without the next)")
    group.add_argument("--rank", type=int, default=-1, help="number of this machine (of this process), from 0")
    group.add_argument(
        "--dist-url", default="tcp://224.66.41.62:23456", help="where the first machine listens; env:// reads variables"
    )
    group.add_argument("--dist-backend", default="nccl", help="nccl, or gloo; on the CPU it is always gloo")
    group.add_argument("--gpu", type=int, default=None, help="number of the only GPU to use (default: all there are)")
    group.add_argument(
        "--multiprocessing-distributed",
        action="store_true",
        help="start one process per GPU of this machine; with --world-size machines, of which this is --rank",
    )
    group.add_argument("--local-rank", "--local_rank", type=int, default=None, help=argparse.SUPPRESS)


def get_default_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Parser of ``imagenet_1k_eval.py`` with all published flags."""
    parser = make_parser(description, formatter_class=HelpFormatter)
    add_evaluation_args(parser)
    add_network_args(parser)
    add_model_args(parser)
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every help text; the description keeps its lines."""


# Part of a model name -> {keyword of the factory: flag}. The first part that occurs decides: tome_vit contains e_vit.
_MODEL_FLAGS: dict[str, dict[str, str]] = {
    "hourglass_vit": {
        key: key
        for key in (
            "clustering_location",
            "num_cluster",
            "cluster_iters",
            "cluster_temperture",
            "cluster_window_size",
        )
    },
    "tome": {"tome_r": "tome_r"},
    "e_vit": {key: key for key in ("base_keep_rate", "drop_loc", "fuse_token")},
    "act": {
        key: key
        for key in (
            "act_plug_in_index",
            "act_plug_out_index",
            "act_group_q",
            "act_group_k",
            "act_q_hashes",
            "act_k_hashes",
        )
    },
    "smyrf": {
        key: key
        for key in (
            "smyrf_plug_in_index",
            "smyrf_plug_out_index",
            "smyrf_n_hashes",
            "smyrf_q_cluster_size",
            "smyrf_k_cluster_size",
        )
    },
    "ats": {"ats_blocks": "ats_blocks_indexes", "num_tokens": "ats_num_tokens", "drop_tokens": "ats_drop_tokens"},
    "evo": {"prune_ratio": "evo_prune_ratio", "prune_location": "evo_prune_location"},
}

# Flags beyond the published ones, likewise; a factory gets such a keyword only if it is not the default.
_MORE_FLAGS: dict[str, dict[str, tuple[str, Any]]] = {
    "tome": {"scatter": ("scatter", "auto")},
    "e_vit": {"score": ("evit_score", "mean")},
    "ats": {"residual": ("ats_residual", "normalized")},
    "smyrf": {"smyrf_padded": ("smyrf_padded", False)},
    "evo": {"tradeoff": ("evo_tradeoff", 0.5)},
}


# Part of a model name -> flag, the published default with which the method does nothing, and what does not happen then.
_IDLE: dict[str, tuple[str, Any, str]] = {
    "hourglass_vit": ("clustering_location", -1, "nothing is clustered"),
    "tome": ("tome_r", 0, "nothing is merged"),
    "ats": ("ats_blocks_indexes", [], "nothing is sampled"),
}


def check_method_flags(args: argparse.Namespace) -> None:
    """Refuse flags of another method than that of ``args.model``; the published scripts ignored them.

    Warns if the method's own flags leave it idle, as some published defaults do.

    Raises:
        ValueError: naming every such flag, and its value.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_model_args(parser)
    part = next((part for part in _MODEL_FLAGS if part in args.model), None)
    own = {*_MODEL_FLAGS.get(part or "", {}).values(), *(flag for flag, _ in _MORE_FLAGS.get(part or "", {}).values())}
    foreign = [
        f"{action.option_strings[-1]} {getattr(args, action.dest)}"
        for action in parser._actions
        if action.dest not in own and getattr(args, action.dest, action.default) != action.default
    ]
    if foreign:
        takes = f"takes {', '.join(f'--{flag}' for flag in sorted(own))}" if own else "takes no method's flags"
        raise ValueError(f"{', '.join(foreign)}: a flag of another method; {args.model} {takes}")
    if part in _IDLE:
        flag, idle, consequence = _IDLE[part]
        if getattr(args, flag) == idle:
            warnings.warn(f"{args.model} without --{flag}: {consequence}, this is the dense network", stacklevel=2)


def get_model_args(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that the flags give the factory of ``args.model``, besides ``image_size``."""
    for part, flags in _MODEL_FLAGS.items():
        if part in args.model:
            more = {key: (getattr(args, flag), default) for key, (flag, default) in _MORE_FLAGS.get(part, {}).items()}
            return {keyword: getattr(args, flag) for keyword, flag in flags.items()} | {
                keyword: value for keyword, (value, default) in more.items() if value != default
            }
    return {}
