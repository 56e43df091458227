"""What token methods cost and keep on a network of yours, beside the network itself and beside smaller images.

    python -m common.hosts MODEL --images DIR --output DIR
    python -m common.hosts vit_small_patch14_dinov2 --img-size 448 --weights FILE --images DIR --output DIR \\
        --methods tome:r=16 "hourglass:layer=6,clusters=(16,16)" "hourglass:layer=3+evit:layers=(6,9)"
    python -m common.hosts serve MODEL       # the same by hand: a page with sliders, see its --help

MODEL is a name of timm, torchvision:vit_b_16, hf:FOLDER (or a name in the cache of transformers), swag:vit_l16_in1k,
or file.py:function, which returns a network. Nothing is downloaded: without --weights they are those that the library
has on this machine, or random.

A method is a name and its settings; a plus sign joins several in one network, and a bar lists values that are tried,
"tome:r=4|8|12". A FILE.safetensors of leanvit.save or sit/export.py is one, too, with the weights that it holds, say a
slimmed student beside its teacher. Without --methods all are tried. Every method stands beside the dense network at a
smaller image size of about the same cost: what does not beat that is not worth having. Cosines are of the features
restored to the full grid, and of the class feature, with those of the dense network. --output takes index.html, which
holds everything.
A budget, or a cosine to keep, names the settings that are best within it, and the lines of Python that build them.
"""

import argparse
import ast
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.run.errors import UsageError
from common.run.files import check_output, problem_with
from common.run.flags import count, fraction, make_parser, positive_float, positive_int
from common.run.program import run

WRITTEN = {"output": True, "save": False, "onnx": False, "torch_export": False}
"""Flags that name what is written -> whether it is a folder; files take the one network that is chosen."""


@dataclass(frozen=True)
class Wanted:
    """Methods of one network: what was typed, and each name with its settings."""

    text: str
    methods: Sequence[tuple[str, Mapping[str, Any]]] = ()
    file: Path | None = None
    """of ``leanvit.save``, in place of methods"""


MOST = 1000
"""Combinations of alternatives in one word."""


def methods(text: str) -> list[Wanted]:
    """``name:key=value,key=value``, several joined by ``+``; values as Python writes them, words without quotes.

    Values with a bar between them are alternatives, of which all combinations are meant. A file stands alone.
    """
    if text.endswith(".safetensors"):
        return [Wanted(text, file=Path(text))]
    choices = [piece.split("|") for piece in re.split(r"([,+](?![^(\[]*[)\]]))", text)]
    choices = [[choice[0], *(f"{choice[0].partition('=')[0]}={value}" for value in choice[1:])] for choice in choices]
    if (count := math.prod(map(len, choices))) > MOST:
        raise argparse.ArgumentTypeError(f"{text!r} means {count} combinations; expected {MOST} at most")
    return [_one("".join(pieces)) for pieces in itertools.product(*choices)]


def _one(text: str) -> Wanted:
    found = []
    for part in re.split(r"\+(?=[a-z_]+(?:[:+]|$))", text):
        name, _, rest = part.partition(":")
        settings: dict[str, Any] = {}
        for setting in filter(None, re.split(r",(?![^(\[]*[)\]])", rest)):
            key, equals, value = setting.partition("=")
            if not equals or not key.strip():
                raise argparse.ArgumentTypeError(f"expected name:key=value,..., got {setting!r} in {text!r}")
            if key.strip() in settings:
                raise argparse.ArgumentTypeError(f"{key.strip()} is given twice in {text!r}; values to try: {key}=1|2")
            try:
                word = value.strip()
                settings[key.strip()] = ast.literal_eval(word.capitalize() if word in ("true", "false") else word)
            except (MemoryError, RecursionError, SyntaxError, ValueError):
                settings[key.strip()] = value.strip()
        found.append((name, settings))
    return Wanted(text, found)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog="python -m common.hosts")
    parser.add_argument("name", metavar="MODEL", help="the network; see above")
    parser.add_argument(
        "--methods", nargs="+", type=methods, metavar="METHOD",
        help="name:key=value,... of each, or FILE.safetensors (default: all, each with a few settings)",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, required=True, help="an image, or a folder of them")
    parser.add_argument(
        "--skip-broken", "--skip-bad-images", action="store_true",
        help="leave out images that cannot be decoded, and count them",
    )  # fmt: skip
    parser.add_argument("--img-size", type=positive_int, help="pixels of a side (default: the network's own)")
    parser.add_argument("--weights", type=Path, help="checkpoint (safetensors, pth), which must fit")
    parser.add_argument(
        "--data", type=Path,
        help="class folders, or train/ and val/ with such: top-1, or k-NN and linear probe where no head fits",
    )  # fmt: skip
    parser.add_argument("--seed", type=count, default=0, help="of the split of --data without train/ (default: 0)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images at a time (default: 8)")
    parser.add_argument("--rounds", type=positive_int, default=10, help="timed passes of each network (default: 10)")
    parser.add_argument(
        "--timing-seconds", type=positive_float, default=30.0, metavar="S",
        help="time all of them no longer than this; fewer passes must do then (default: 30)",
    )  # fmt: skip
    parser.add_argument(
        "--explain", action="store_true",
        help="show where the time of a pass goes: products, attention, the method's own, and what else",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true",
        help="time each network through torch.compile, too, in turns with itself; half a minute or more each. On a CPU "
        "little is gained, 0 to 7 %% for a ViT-B/16, and ATS is slower",
    )  # fmt: skip
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--budget-gmacs", type=positive_float, help="name the best network that costs no more")
    wish.add_argument("--budget-ms", type=positive_float, help="the same for milliseconds per image of a batch")
    wish.add_argument("--keep-cosine", type=fraction, help="name the fastest whose patch features are as close")
    parser.add_argument(
        "--see-layers", nargs="+", type=positive_int, metavar="N",
        help="show tokens after so many blocks (default: a third, two thirds, all)",
    )  # fmt: skip
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the chosen network, for leanvit.load(FILE)")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="the same as ONNX, for any number of images")
    parser.add_argument("--torch-export", type=Path, metavar="FILE", help="the same for torch.export.load")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--output", type=Path, help="folder for index.html, trade.json, figures, a PNG of every image")
    args = parser.parse_args(argv)
    args.wish = {"gmacs": args.budget_gmacs, "ms": args.budget_ms, "cosine": args.keep_cosine}
    args.chooses = any(value is not None for value in args.wish.values()) or sum(map(len, args.methods or ())) == 1
    for flag, folder in WRITTEN.items():
        path = getattr(args, flag)
        if path and (problem := problem_with(path, folder=folder)):
            parser.error(f"--{flag.replace('_', '-')}: {problem}")
        if path and not folder and not args.chooses:
            parser.error(
                f"--{flag.replace('_', '-')} writes one network: give one in --methods, or --budget-gmacs, --budget-ms "
                "or --keep-cosine that chooses it"
            )
    saved = args.save and args.save.with_name(args.save.name.removesuffix(".safetensors") + ".safetensors")
    try:
        inputs = [args.weights, *(each.file for each in itertools.chain.from_iterable(args.methods or ()))]
        check_output(saved, args.onnx, args.torch_export, inputs=inputs)
    except UsageError as error:
        parser.error(str(error))
    return args


def write_network(trade: Any, row: Any, flag: str, path: Path) -> None:
    """Write the network of a row as a flag says; raises what the writer says."""
    from common.hosts import export, files
    from common.hosts.resizing import Smaller

    network = trade.networks[row.name]
    small = isinstance(network, Smaller)
    fast = network.fast if small else network
    name = row.name + (f", which takes images of {network.size[0]} x {network.size[1]} pixels," if small else "")
    if flag == "save":
        path = files.save(fast, path)
        print(f"{name} is in {path}: leanvit.load({str(path)!r})")
    else:
        difference = (export.export_onnx if flag == "onnx" else export.export_torch)(fast, path)
        print(f"{name} is in {path}: read back, its output differs by {difference:.1e} of the largest value at most")


def look_inside(args: argparse.Namespace, trade: Any, rows: Sequence[Any]) -> Iterator[str]:
    """Tables of ``--explain`` and ``--compile``, of every row but smaller images; they go into the record, too."""
    if not (args.explain or args.compile):
        return
    from dataclasses import asdict

    from common.hosts import parts

    networks = {"dense": trade.net, **trade.lean}
    images = next(trade.batches())
    if args.explain:
        found = parts.explain(networks, {row.name: row.gmacs for row in rows}, images)
        trade.more["explained_ms"] = found
        title = f"milliseconds of a batch of {len(images)}"
        yield parts.table(dict.fromkeys((*parts.COLUMNS, "all", "promised"), ".1f"), found, title)
    if args.compile:
        made = parts.compile_all(networks, images, rounds=args.rounds, limit_s=args.timing_seconds)
        told = {name: each if isinstance(each, str) else asdict(each) for name, each in made.items()}
        trade.more["compiled"] = told
        columns = {"speedup": ".2f", "graph_breaks": "d", "recompilations": "d", "seconds": ".0f"}
        yield parts.table(columns, told, "compiled, over the same eager")


def main(argv: Sequence[str] | None = None) -> Any:
    """Measure, print the table, write the files."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["serve"]:
        from common.hosts.serve import serve

        return serve(words[1:])
    args = parse_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports its own start and end
    from common.hosts.opening import open_model
    from common.hosts.page import write_all
    from common.hosts.trade import (
        Trade,
        Wish,
        best_within,
        check_files,
        choose,
        default_sweep,
        image_files,
        python_lines,
    )
    from common.run.launch import choose_device

    device = choose_device(args.device)
    found = image_files(args.images)
    if args.output and any(file.resolve().parent == args.output.resolve() for file in found):
        raise UsageError(f"--output {args.output} holds the images, and a PNG of each would replace it: name another")
    images = check_files(found, skip_broken=args.skip_broken)
    model = open_model(args.name, image_size=args.img_size, weights=args.weights)
    model.net.to(device)
    wanted = args.methods or [methods(text) for text in default_sweep(model.facts)]
    trade = Trade(model, list(itertools.chain.from_iterable(wanted)), images, batch_size=args.batch_size)
    layers = trade.see_layers(args.see_layers)
    print(trade.heading(), flush=True)
    rows = trade.measure(
        rounds=args.rounds, limit_s=args.timing_seconds, data=args.data, seed=args.seed, skip_broken=args.skip_broken
    )
    print(trade.table(rows))
    for told in look_inside(args, trade, rows):
        print(f"\n{told}", flush=True)
    best, said, code = None, "", ""
    if any(value is not None for value in args.wish.values()):
        said = best_within(rows, **args.wish)
        best = next(iter(choose(rows, Wish(**args.wish))), None)
    elif args.chooses:
        best = next(row for row in rows if row.name in trade.lean)
    if best is not None:
        code = python_lines(trade, best)
        print("\n\n".join(filter(None, (said, code))), end="\n\n")
    if args.output:
        write_all(trade, rows, args.output, layers=layers, chosen=said, code=code)
        print(f"everything is in {args.output / 'index.html'}")
    if said and best is None:
        raise UsageError(f"{said}; no network was chosen")
    for flag, folder in WRITTEN.items():
        if not folder and (path := getattr(args, flag)):
            write_network(trade, best, flag, path)
    return rows


if __name__ == "__main__":
    run(main)
