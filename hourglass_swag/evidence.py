"""What is measured for the claims of ``tables/claims.toml``: one small SWAG-style ViT per seed, of Fashion-MNIST.

The network is trained once by ``train.py``; everything else happens without fine-tuning. Each method is swept over its
one setting; what it reaches at a share of the dense network's cost is read off the straight line between neighbouring
settings, which is exactly what a mixture of the two costs and reaches. Cost is all that is executed, the methods' own
work included. Features are those after the last block, restored to the full grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.loaders import build_dataset, eval_loader
from common.hosts import Effect, Facts, Method, Tokens, lean
from common.hosts.host import take_tokens
from common.hosts.resizing import Smaller
from common.ledger.evidence import Arms, Job, Run, mixture
from hourglass_swag import export, imagenet_1k_eval, train
from hourglass_swag.evaluation import swag_eval_transform
from hourglass_swag.methods import EQUAL, GRID, REDUCES, Undrop
from hourglass_swag.models import create

SIZE, LAYERS, PATCH = 32, 8, 4
RECIPE = "-m vit_desk --data-set fashion --epochs 12 --batch-size 128 --lr 2e-3 --hflip 0.5 --no-model-ema"
LIVE = "-m vit_desk --data-set fashion --epochs 2 --warmup-epochs 0 --batch-size 64 --lr 1e-3 --no-model-ema"
LIVE_ROWS = {
    "dense": "-m vit_desk",
    "Hourglass": "-m hourglass_vit_desk -l 2 -n 16",
    "ToMe": "-m tome_vit_desk --tome_r 6",
    "EViT": "-m e_vit_desk --drop_loc 1 3 5 --base_keep_rate 0.7",
}
CLUSTERED = 2
"""Layer before which tokens are clustered, pooled or dropped. Chosen on ``fashion_tune`` with another seed, as were the
layers of the others: the best of 1 to 4 for clustering and for dropping, within 0.2 points of the best for pooling."""
SHARES = (0.7, 0.5)
"""Of the dense network's cost, at which the methods are compared."""
SWEEPS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "hourglass": [("hourglass", {"layer": CLUSTERED, "clusters": (n, n)}) for n in (7, 6, 5, 4, 3)],
    "pooling": [("pooling", {"layer": CLUSTERED, "side": n}) for n in (7, 6, 5, 4, 3)],
    "dropping": [("dropping", {"layer": CLUSTERED, "patches": n * n}) for n in (7, 6, 5, 4, 3)],
    "tome": [("tome", {"r": (r, -1.0)}) for r in (2, 3, 4, 5, 6, 7)],
    "evit": [("evit", {"keep": keep, "layers": (1, 3, 5)}) for keep in (0.9, 0.8, 0.7, 0.5, 0.3)],
    "evo_vit": [("evo_vit", {"keep": keep, "layer": 2}) for keep in (0.8, 0.6, 0.5, 0.4, 0.2)],
    "ats": [("ats", {"layers": tuple(range(2, LAYERS)), "tokens": n}) for n in (49, 33, 25, 13)],
    "act": [("act", {"hashes": n}) for n in (8, 16, 24)],
    "smyrf": [("smyrf", {"hashes": 4, "cluster_size": n, "layer": 2}) for n in (32, 16, 8)],
}
SIDES = (28, 24, 20, 16, 12)
"""Pixels of the smaller images that the dense network is given, the position embedding resized."""


@dataclass(frozen=True)
class Pooling(Method):
    """Average pooling to a smaller grid in place of clustering; restored by bilinear interpolation."""

    name = "pooling"
    layer: int
    side: int

    def resolve(self, facts: Facts) -> Pooling:
        return self

    def effects(self) -> Sequence[Effect]:
        return [Effect(self.layer, "before", needs=GRID | EQUAL, breaks=REDUCES)]

    def before(self, layer: int, tokens: Tokens) -> Tokens:
        grid, prefix = tokens.grid, tokens.prefix
        assert grid is not None
        pooled = F.adaptive_avg_pool2d(tokens.x[:, prefix:].mT.unflatten(2, grid), self.side).flatten(2).mT

        def undo(x: Tensor) -> Tensor:
            small = x[:, prefix:].mT.unflatten(2, (self.side, self.side))
            return torch.cat([x[:, :prefix], F.interpolate(small, grid, mode="bilinear").flatten(2).mT], dim=1)

        x = torch.cat([tokens.x[:, :prefix], pooled], dim=1)
        return tokens.update(x=x, grid=(self.side, self.side), undone_by=undo)


@dataclass(frozen=True)
class Dropping(Method):
    """Patches kept at random, for each image anew; a dropped one is restored from the kept one most like it."""

    name = "dropping"
    layer: int
    patches: int

    def resolve(self, facts: Facts) -> Dropping:
        return self

    def effects(self) -> Sequence[Effect]:
        return [Effect(self.layer, "before", needs=EQUAL, breaks=REDUCES)]

    def before(self, layer: int, tokens: Tokens) -> Tokens:
        batch, number = tokens.x.shape[:2]
        order = torch.rand(batch, number - tokens.prefix, device=tokens.x.device).argsort(1)[:, : self.patches]
        kept = order.sort(1).values + tokens.prefix
        index = torch.cat([torch.arange(tokens.prefix, device=kept.device).expand(batch, -1), kept], dim=1)
        undo = Undrop(tokens, index, None, "nearest")
        return tokens.update(x=take_tokens(tokens.x, index), grid=None, undone_by=undo)


CONTROLS = {"pooling": Pooling, "dropping": Dropping}


def train_dense(job: Job, recipe: str = RECIPE) -> Arms:
    """The network of a seed."""
    words = f"{recipe} --seed {job.seed} --device {job.device} --output-dir {job.folder / 'dense'}"
    row = train.main(words.split())
    return {"dense": {"top1_percent": row["test_top1_percent"]}}


@torch.no_grad()
def look(network: Any, batches: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor] | None = None) -> Any:
    """Top-1 in percent and the mean cosine of the patch features with ``wanted``, or those features themselves."""
    right, seen, cosine, kept = 0, 0, 0.0, []
    for number, (images, labels) in enumerate(batches):
        tokens = network.normalized(images)
        logits = network.plan.host.finish(network, tokens)
        features = tokens[:, network.plan.host.facts.prefix :]
        right, seen = right + int((logits.argmax(1) == labels).sum()), seen + len(labels)
        if wanted is None:
            kept.append(features)
        else:
            side = int(features.shape[1] ** 0.5)
            grid = F.interpolate(features.mT.unflatten(2, (side, side)), (SIZE // PATCH,) * 2, mode="bilinear")
            cosine += float(F.cosine_similarity(grid.flatten(2).mT, wanted[number], dim=2).mean()) * len(labels)
    return 100 * right / seen, kept if wanted is None else cosine / seen


def measure_methods(job: Job, *, data_set: str = "fashion", images: int = 2000) -> Arms:
    """Every method's sweep, and what it reaches at the shares; ``name@share`` and ``name: setting`` are the arms.

    Args:
        images: of the held-out ones, in order.
    """
    torch.manual_seed(job.seed)  # of the controls that drop at random, and of hashing
    weights, device = job.folder / "dense" / "weights.pth", torch.device(job.device)
    dataset: Any = build_dataset(data_set, None, "val", swag_eval_transform(SIZE))
    batches = [
        (x.to(device), y.to(device))
        for x, y in islice(eval_loader(dataset, batch_size=min(images, 500)), -(-images // 500))
    ]
    sample = batches[0][0]
    dense: Any = create("vit_desk", image_size=SIZE, weights=weights).to(device).eval()
    plain = lean(dense)
    top1, features = look(plain, batches)
    whole = plain.gmacs()
    arms = {"dense": {"top1_percent": top1, "cosine": 1.0, "mmacs": 1e3 * whole}}
    curves: dict[str, list[dict[str, float]]] = {}

    def add(family: str, setting: str, network: Any, shown: Sequence[tuple[Tensor, Tensor]], cost: float) -> None:
        top1, cosine = look(network, shown, features)
        found = {"top1_percent": top1, "cosine": cosine, "mmacs": 1e3 * cost}
        arms[f"{family}: {setting}"] = found
        curves.setdefault(family, [arms["dense"]]).append(found)

    for side in SIDES:
        small = Smaller(dense, (side, side))
        add("resizing", f"{side} pixels", small.fast, [(small.shrink(x), y) for x, y in batches], small.fast.gmacs())
    for family, settings in SWEEPS.items():
        for name, values in settings:
            method = CONTROLS[name](**values) if name in CONTROLS else name
            network = lean(dense, method, verify=False, **({} if name in CONTROLS else values))
            words = ", ".join(f"{key} {value}" for key, value in values.items())
            add(family, words, network, batches, network.gmacs(sample))
    for family, points in curves.items():
        for share in SHARES:
            if (found := between(points, 1e3 * whole * share)) is not None:
                arms[f"{family}@{share:g}"] = found
    return arms


def between(points: Sequence[dict[str, float]], cost: float) -> dict[str, float] | None:
    """A mixture of the two neighbouring settings that costs ``cost``; None outside of the sweep."""
    ordered = sorted(points, key=lambda point: point["mmacs"])
    for below, above in pairwise(ordered):
        if below["mmacs"] <= cost <= above["mmacs"]:
            return mixture(below, above, cost)
    return None


def measure_live(job: Job, recipe: str = LIVE, *, data_set: str = "fashion") -> Arms:
    """Train shortly, evaluate without fine-tuning and export, each by its own program."""
    folder = job.folder / "live"
    train.main(f"{recipe} --seed {job.seed} --device {job.device} --output-dir {folder}".split())
    weights = ["--weights", str(folder / "weights.pth"), "-r", str(SIZE)]
    data = f"--dataset {data_set} -b 500 -j 0 --device {job.device} --seed {job.seed}".split()
    rows = {name: imagenet_1k_eval.main([*words.split(), *weights, *data]) for name, words in LIVE_ROWS.items()}
    export.main([*LIVE_ROWS["Hourglass"].split(), *weights, "--torch-export", str(folder / "hourglass.pt2")])
    return {f"live: {name}": {"top1_percent": row["top1_percent"]} for name, row in rows.items()}


RUNS = {
    "dense": Run(RECIPE, train_dense),
    "methods": Run("; ".join(map(str, (RECIPE, SWEEPS, SIDES, SHARES))), measure_methods),
    "live": Run(f"{LIVE}; {LIVE_ROWS}", measure_live),
}
