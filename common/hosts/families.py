"""Which Vision Transformers are hosts: every name of timm's tried, and the page that the documentation shows.

    python -m common.hosts.families            # writes docs/hosts.md; a minute or two, nothing is downloaded

Networks are built on the meta device, so that only their structure is asked; ``lean`` itself also compares numbers.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.run.files import ROOT, write_atomic
from common.run.flags import make_parser

MODULES = (
    *("vision_transformer", "deit", "eva", "vision_transformer_hybrid", "vitamin", "beit", "cait", "xcit", "naflexvit"),
    *("vision_transformer_relpos", "vision_transformer_sam", "hiera", "swin_transformer", "mvitv2", "volo", "crossvit"),
)
"""timm's modules of networks that people call Vision Transformers."""
SIZES = re.compile(
    r"_(x?pwee|d?p?wee|d?little|atto|nano|x?x?tiny|x?x?small|betwixt|medium\w*|base\w*|large\w*|huge|giant\w*|gigantic|"
    r"enormous|plus|so\d+m\w*|so\w?\d\w*|[smltb]\d*|\d+b|\d+m|\d+)(?=_|$)"
)
PAGE = ROOT / "docs" / "hosts.md"
MEASURED = PAGE.parent / "measured"


PAIRS = (
    (
        "Scala: a slice as a network of its own (`leanvit.slice_width`, `scala/export.py`)",
        "yes",
        "it is timm's, of that width",
    ),
    ("Scala: the sliced network itself", "no", "its `forward` takes a width: export the width first"),
    (
        "UVC: a network of timm's without some heads, neurons, blocks (`leanvit.prune`, `uvc/compress.py`)",
        "yes",
        "it is timm's; blocks may differ in heads and neurons",
    ),
    (
        "UVC: the same removed from the published backbones (`uvc.compact_files.to_timm`)",
        "yes",
        "so is this",
    ),
    (
        "UVC: removed patches, soft patch gates, T2T-ViT, `CompactViT` itself",
        "no",
        "timm's class has no place for them",
    ),
    (
        "DVT: networks that share nothing, one behind the other (`leanvit.cascade`)",
        "yes",
        "each may have its own, or be a slice or a pruned network: build them first, then the cascade",
    ),
    ("DVT: a cascade with reuse, or one of its stages", "no", "a stage reuses the grid before it, patch by patch"),
    ("SiT: LV-ViT, slimmed or not", "no", "its blocks are its own, and slimming changes tokens already"),
    (
        "SiT: a student of timm's network (`sit/main.py --model timm:NAME`, `leanvit.load`)",
        "ToMe, EViT behind the first slimming, ATS behind the last, ACT, SMYRF",
        "slimming is a method with weights: `leanvit.lean(fast.restore(), *fast.methods, leanvit.ToMe(r=[...]))`; it "
        "needs the grid, and ends it and the number of tokens, which Hourglass and Evo-ViT need",
    ),
    ("a network with token methods", "no", "give all methods in one call of `lean`, which checks them together"),
)
FASHION = (
    ("Scala r = 0.5, then ToMe, r = 2", "2.02", "79.60", "1.72", "77.15"),
    ("Scala r = 0.5, then EViT, keep 0.7 in the second block", "2.02", "79.60", "1.82", "75.25"),
    ("Scala r = 0.5, then Hourglass, 9 clusters before the second block", "2.02", "79.60", "1.65", "73.55"),
    ("Scala r = 0.25, then r = 1, as a cascade", "7.52", "81.00", "2.2, 3.1, 4.1", "77.20, 78.65, 80.10"),
    ("Scala r = 0.5, then r = 1, as a cascade", "7.52", "81.00", "3.0, 4.0, 5.1", "80.15, 80.50, 81.00"),
    ("UVC to half of the cost, then ToMe, r = 2", "2.64", "82.75", "1.98", "78.25"),
    ("SiT to 8, 4 and 2 patches, then ToMe, r = [0, 0, 0, 2, 1, 0]", "3.18", "81.40", "3.10", "81.45"),
    ("ToMe, r = 1, before the network itself, as a cascade", "4.6", "82.0", "6.1", "82.0"),
)
"""Pair -> MMACs and top-1 of the first (of a cascade the last network) alone, then of both; the papers' READMEs have
the networks and the commands."""
SEARCH = (
    ("1", "5 x 5", "0.154", "0.7853", "0.8665 (+0.0812)", "0.8762"),
    ("1", "7 x 7", "0.282", "0.8981", "0.9403 (+0.0422)", "0.9416"),
    ("1", "10 x 10", "0.590", "0.9711", "0.9473 (-0.0238)", "0.9494"),
    ("2", "7 x 7", "0.415", "0.9450", "0.9568 (+0.0118)", "0.9594"),
    ("2", "10 x 10", "0.685", "0.9784", "0.9635 (-0.0149)", "0.9639"),
    ("3", "7 x 7", "0.547", "0.9673", "0.9697 (+0.0024)", "0.9717"),
    ("3", "8 x 8", "0.612", "0.9730", "0.9736 (+0.0006)", "0.9752"),
    ("4", "7 x 7", "0.679", "0.9782", "0.9747 (-0.0035)", "0.9765"),
    ("5", "7 x 7", "0.812", "0.9837", "0.9794 (-0.0043)", "0.9809"),
)
"""Places of Hourglass in one small network, and mean cosines of its restored features there."""


def module_of(name: str) -> str:
    """timm's module that a name is registered in."""
    from timm.models._registry import _model_to_module  # pyright: ignore[reportPrivateUsage] - no other way

    return _model_to_module[name]


def names() -> list[str]:
    """All names of these modules."""
    import timm

    return [name for name in timm.list_models() if module_of(name) in MODULES]


def family(name: str) -> str:
    """A name without the words for size: ``vit_patch14_reg4_dinov2`` of ``vit_small_patch14_reg4_dinov2``."""
    while (shorter := SIZES.sub("", name, count=1)) != name:
        name = shorter
    return name


def one_of_each(all_names: Iterable[str]) -> list[str]:
    """A name of every family."""
    return list({family(name): name for name in all_names}.values())


def verdict(name: str) -> tuple[bool, str]:
    """Whether a network is a host, and the adapter or the reason."""
    import timm
    import torch

    from common.hosts import NotAHost, Plan
    from common.hosts.network import find_host

    with torch.device("meta"):
        net = timm.create_model(name)
    try:
        host = find_host(net)
        Plan(host, (), opened=True)
    except NotAHost as error:
        reason = str(error)
        if "is not a host; known are" in reason:
            reason = f"no adapter for {type(net).__name__}"
        return False, re.sub(r"blocks\.\d+", "blocks.*", reason)
    return True, type(host).__name__


def table(verdicts: Mapping[str, tuple[bool, str]]) -> str:
    """Markdown: module, verdict, reason or adapter, number of names, and examples."""
    groups: dict[tuple[str, bool, str], list[str]] = defaultdict(list)
    for name, (good, why) in verdicts.items():
        groups[module_of(name), good, why].append(name)
    lines = ["| timm module | host | adapter, or why not | names | such as |", "| :-- | :-- | :-- | --: | :-- |"]
    order = sorted(groups, key=lambda key: (MODULES.index(key[0]), not key[1], key[2]))
    for module, good, why in order:
        found = groups[module, good, why]
        such = ", ".join(f"`{name}`" for name in one_of_each(found)[:2])
        lines.append(f"| `{module}` | {'yes' if good else 'no'} | {why} | {len(found)} | {such} |")
    return "\n".join(lines)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table whose cells are Markdown themselves; the first ``left`` columns flush left."""
    marks = [":--" if index < left else "--:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, marks, *rows))


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Title and content of the ``trade.json`` files that were kept, named by network."""
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        yield f"{file.stem} at {content['image_size'][0]}, {content['batch_size']}", content


def measured(folder: Path = MEASURED) -> str:
    """A table of what the rows cost and how fast they were."""
    rows = [
        (title, row["name"], f"{row['gmacs']:.2f}", f"{row['speedup']:.2f}", f"{100 * row['realised']:.0f} %")
        for title, content in records(folder)
        for row in content["rows"]
    ]
    return markdown(("network, batch", "", "GMACs", "speed-up", "of the promised"), rows, left=2)


def looked_into(folder: Path = MEASURED) -> str:
    """Tables of what ``--explain`` and ``--compile`` found."""
    tables: list[str] = []
    for title, content in records(folder):
        if parts := content.get("explained_ms"):
            rows = [(name, *(f"{value:.1f}" for value in found.values())) for name, found in parts.items()]
            tables.append(markdown((f"{title}: ms", *parts["dense"]), rows))
        if compiled := content.get("compiled"):
            rows = [
                (name, found, "", "")
                if isinstance(found, str)
                else (name, f"{found['speedup']:.2f}", str(found["graph_breaks"]), str(found["recompilations"]))
                for name, found in compiled.items()
            ]
            tables.append(markdown((f"{title}: compiled", "over eager", "graph breaks", "recompilations"), rows))
    return "\n\n".join(tables)


def page(verdicts: Mapping[str, tuple[bool, str]]) -> str:
    """The whole page."""
    import timm

    from common.hosts.huggingface import FAMILIES, TESTED

    trunks = ", ".join(f"`{name}`" for name in FAMILIES)
    hosts = sum(good for good, _ in verdicts.values())
    rows = markdown(("first", "then a token method", "why"), PAIRS, left=3)
    pairs = markdown(("on `fashion`", "MMACs alone", "top-1 (%)", "MMACs of both", "top-1 (%)"), FASHION, left=1)
    return f"""# Which networks can have token methods

`leanvit.explain(net)` answers for a network at hand. Of the {len(verdicts)} names of Vision Transformers in timm
{timm.__version__}, {hosts} are hosts; the others are refused by the name of the module that no adapter knows. Hosts are
also `torchvision.models.vit_*`, and the SWAG networks of `hourglass_swag`.

Of transformers {TESTED} (extra `[huggingface]`) these are hosts:
{trunks},
alone or once inside of a network with any head that takes `pixel_values`, such as `ViTForImageClassification`. Output
classes, `return_dict`, `labels`, `interpolate_pos_encoding` and `bool_masked_pos` work as before.
`output_hidden_states`, `output_attentions` and `attention_mask` are refused: between the blocks there are fewer tokens.
A network that takes text as well gets a lean part: `net.vision_model = leanvit.lean(net.vision_model, "tome")`.

{table(verdicts)}

## What a method costs and keeps

```bash
python -m common.hosts vit_small_patch14_reg4_dinov2 --img-size 448 --weights FILE --images DIR --output DIR \\
    --methods tome:r=16 "hourglass:layer=6,clusters=(16,16)" "hourglass:layer=3+evit:layers=(6,9)"
```

prints one row for the dense network, for each method, and for the dense network on smaller images of about the method's
cost (position embedding resampled, features enlarged again): tokens that are left, GMACs and of them the method's own,
paired speed-up and how much of the promised one it is, cosines of the restored patch features and of the class feature
with the dense network's, and whether the method beats resizing. `--data` adds top-1; `--output` takes `trade.json` and
a PNG of the tokens of every image. With `--budget-gmacs 20` or `--budget-ms 5`, and alternatives such as
`"tome:r=4|8|12|16"`, it names the settings of each kind that keep most within the budget.

Measured on a CPU, one thread (the other core was busy), float32, in turns with the dense network, medians; costs and
speeds do not depend on the weights, which are random:

{measured()}

Where the time goes (`--explain`): milliseconds of a pass over the batch in matrix products, attention, what moves and
what changes single numbers, and in the method's own steps; *promised* is the dense network's time times the method's
share of its operations. What a compiler makes of it (`--compile`), in turns with the same network eager: little on a
CPU, and ATS, which reads how many tokens are left, breaks into pieces and gets slower. Speeds, parts and compiled
networks were measured in three runs of the same machine, the last beside other work:

{looked_into()}

### Hourglass against smaller images

What Hourglass keeps must beat what the dense network keeps on smaller images of its cost. On five trained networks of
64 patches it does, at 0.7 and 0.5 of the cost, in accuracy and in features: the claims of
[hourglass_swag](../hourglass_swag/README.md). A search on one more, timm's `test_vit` of 14 x 14 patches (digits of
scikit-learn at 112 pixels, 1,437 to train on, 85.8 % of 360 right), tried five layers by six grids by eighteen
temperatures and neighbours on 60 images; cosines of the restored features less those of resizing at equal cost:

{markdown(("before block", "clusters", "cost", "resizing", "Hourglass as `lean` sets it", "best of eighteen"), SEARCH)}

As `lean` sets it, it wins at 9 of the 30 places: where resizing loses most, early and with few clusters, and where the
grid of clusters divides that of the patches (7 x 7). Other grids lose up to 0.024 there, and behind the middle of the
network nothing is gained. The rules of `temperature="auto"` are within 0.012 of the best of eighteen everywhere. ToMe
beats resizing by 0.005 to 0.016 (r = 4 to 16, costs of 0.95 to 0.74). On an earlier state of the same network (23.6 %
right) Hourglass won at 27 of the 30. One network, one seed: where it wins depends on the network, and
`python -m common.hosts` says it of yours.

## Slice or prune first

{rows}

What pairs cost (plain MACs) and keep on the 2,000 test images of Fashion-MNIST that ship inside: the first alone (of a
cascade: its last network alone), then both, at several budgets where images leave early; token methods are not trained.
One seed, tiny networks of 16 patches, of the guides in the READMEs of
[scala](../scala/README.md#fine-tune-your-own-vit), [uvc](../uvc/README.md), [sit](../sit/README.md) and
[dvt](../dvt/README.md), where the commands are:

{pairs}

Slices in a cascade are worth it: r = 0.5 before r = 1 keeps all of 81.00 at two thirds of the cost, and 80.15 at 3.0,
where r = 0.75 alone has 79.90 at 4.33. ToMe, EViT and Hourglass take a few points at such sizes whatever comes first,
and slimming leaves nothing to merge.

Two methods at once: `lean` refuses a plan in which one breaks what another needs, and names both: the grid that
Hourglass clusters on, plain attention (weights without a bias for merged tokens) that ATS, ACT, SMYRF, Evo-ViT and EViT
without a class token look at, the number of tokens that Evo-ViT keeps scores for, and equal lengths of all images,
which ATS ends.

## Files, compilers and hooks

Copies, pickles, `state_dict`, half precision, autocast, gradients and `torch.compile` work as they do for the network
itself; ATS with `drop=True` reads a number from the images, where a compiled network breaks into two. So does
`torch.export`, but for ATS with `drop=True` (`drop=False` keeps the length); ACT wants `torch.no_grad()` around it.
ACT and SMYRF draw random projections in every pass, which ONNX cannot: `common.hosts.export` writes SMYRF with those of
one draw, and refuses ACT. What cannot be exported says so.

Blocks in which a method acts are opened: their attention and their order are the runner's, so that a forward hook on
the block or its attention would be silent. `lean` refuses a network with such hooks, and a hook that is put there later
is an error in the next pass. Hooks on norms, projections and MLPs, on blocks in which nothing acts, and on the lean
network itself are called as ever.

Rendered by `python -m common.hosts.families`.
"""


def main(argv: Sequence[str] | None = None, path: Path = PAGE) -> int:
    """Try every name and write the page."""
    parser = make_parser(__doc__)
    parser.parse_args(argv)
    found = {name: verdict(name) for name in names()}
    write_atomic(path, page(found))
    print(f"{sum(good for good, _ in found.values())} of {len(found)} names are hosts; written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
