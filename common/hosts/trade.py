"""What methods cost and keep on one network: rows of the network itself, the methods, and smaller images."""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]
from tqdm import tqdm

from common.data.images import SUFFIXES, BadImageError, is_image, load_image
from common.hosts.accuracy import KNN, PROBE, TOP1, measure_accuracy
from common.hosts.draw import Principal, Strip, mosaic, spread
from common.hosts.files import load
from common.hosts.host import Facts, Tokens
from common.hosts.network import METHODS, lean, make_lean, make_method
from common.hosts.opening import Model
from common.hosts.resizing import Smaller
from common.hosts.runner import Method, PlanError
from common.measure.benchmark import compare, describe_device, device_name
from common.run.errors import UsageError

FEW = 3
"""Timed passes of which a median says little, fewer than these."""


@dataclass(frozen=True)
class Row:
    """One network of the table."""

    name: str
    tokens: int
    """that leave the last block"""
    gmacs: float
    own_gmacs: float
    """of them the methods' own, restoring included"""
    patch_cosine: float
    class_cosine: float
    """mean over images (and patches) of the cosine with the dense network's"""
    speedup: float = 1.0
    """over the dense network, paired"""
    realised: float = 1.0
    """of the speed-up that the multiply-accumulates promise"""
    ms_per_image: float = 0.0
    top1_percent: float | None = None
    against_resizing: float | None = None
    """patch cosine less that of the dense network on smaller images at about the same cost"""
    knn_percent: float | None = None
    probe_percent: float | None = None
    """accuracy of the features, where there is no head for the classes; see ``common.hosts.accuracy``"""

    @property
    def kind(self) -> str:
        """Names of the methods, without their settings; "dense" for all without any."""
        return "dense" if re.match("dense($| at )", self.name) else re.sub(r":.*?(?=\+[a-z]|$)", "", self.name)

    @property
    def measure(self) -> str:
        """Field by which rows are chosen: accuracy where it was measured, the patches' cosine where not."""
        return next((key for key in (TOP1, PROBE, KNN) if getattr(self, key) is not None), "patch_cosine")

    @property
    def kept(self) -> float:
        """Value of ``measure``."""
        return getattr(self, self.measure)


@dataclass(frozen=True)
class Images:
    """The images of a table, in files that can be decoded.

    Args:
        files: in order.
        skipped: broken ones that were left out.
    """

    files: Sequence[Path]
    skipped: Sequence[str] = ()


def image_files(path: Path) -> list[Path]:
    """The images of a folder, or the one that is named.

    Raises:
        UsageError: if there is none.
    """
    if not path.is_dir():
        found = [path] if path.exists() else []
    else:
        found = sorted(file for file in path.glob("*") if is_image(file.name) and not file.is_dir())
    if not found:
        raise UsageError(f"--images {path}: expected an image or a folder with some ({', '.join(SUFFIXES)})")
    return found


def check_files(files: Sequence[Path], *, skip_broken: bool = False) -> Images:
    """Decode every file once.

    Raises:
        BadImageError: naming one that is broken, unless these are skipped.
        UsageError: if none is left.
    """
    good, skipped = [], []
    for file in files:
        try:
            load_image(file)
        except BadImageError as error:
            if not skip_broken:
                raise
            skipped.append(str(error).partition(";")[0])
        else:
            good.append(file)
    if not good:
        raise UsageError(f"--images: none of the {len(files)} files can be decoded; the first: {skipped[0]}")
    return Images(good, skipped)


class Unseen:
    """A step of a method whose operations a counter does not see, nor those with which it restores the grid."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step

    def __call__(self, tokens: Tokens, *parts: Any) -> Any:
        with _disable_current_modes():
            result = self.step(tokens, *parts)
        if isinstance(result, Tokens):
            return _hide(result, tokens)
        heads, after, parts_after = result
        return heads, _hide(after, tokens), parts_after


def _hide(after: Tokens, before: Tokens) -> Tokens:
    """The same tokens; what the step put on their way back runs unseen."""
    if after.undo is None or before.undo is None:
        return after
    known = len(before.undo)
    return replace(after, undo=(*after.undo[:known], *map(_unseen, after.undo[known:])))


def _unseen(step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def undo(x: Tensor) -> Tensor:
        with _disable_current_modes():
            return step(x)

    return undo


def own_gmacs(fast: Any, images: Tensor | None = None, *, total: float | None = None) -> float:
    """Of a lean network's multiply-accumulates, ``total`` if known, those that are no module's of the host."""
    plan = copy.copy(fast.plan)
    plan.acting = [{hook: [Unseen(step) for step in steps] for hook, steps in acting.items()} for acting in plan.acting]
    return (fast.gmacs(images) if total is None else total) - make_lean(plan.host.net, plan).gmacs(images)


def default_sweep(facts: Facts) -> list[str]:
    """Every method with a few settings around its defaults, from mild to strong."""
    assert facts.grid is not None
    pairs, last = facts.tokens / (2 * facts.depth), facts.depth - 1
    early, middle = (min(max(1, facts.depth // part), last) for part in (4, 2))

    def clusters(share: float) -> tuple[int, ...]:
        return tuple(max(1, round(side * math.sqrt(share))) for side in facts.grid or ())

    def sequence(values: tuple[int, ...]) -> str:
        return str(values).replace(" ", "")

    settings = {
        "tome": [f":r={max(1, round(pairs * share))}" for share in (0.5, 1.0, 1.5)],
        "hourglass": [
            f":layer={layer},clusters={sequence(clusters(share))}"
            for layer, share in ((middle, 0.5), (early, 0.5), (middle, 0.25))
        ],
        "evit": [f":keep={share}" for share in (0.8, 0.7, 0.5)],
        "evo_vit": [f":keep={share}" for share in (0.7, 0.5, 0.3)],
        "ats": [f":tokens={facts.prefix + round(facts.patches * share)}" for share in (0.75, 0.5)],
    }
    return [name + words for name in METHODS for words in dict.fromkeys(settings.get(name, [""]))]


class Trade:
    """The networks of the table and the images that they see.

    Args:
        model: the dense network, on its device, and what it wants of images.
        wanted: methods, each with ``text`` and either ``methods`` or a ``file`` of ``leanvit.save``.
        images: what they are tried on.
        batch_size: images at a time.

    Raises:
        UsageError: if the network is no host, a method or a setting is unknown, no method can work on it, or a file's
            network is for other images than this one.
        CheckpointError: naming a file that cannot be opened.
    """

    def __init__(self, model: Model, wanted: Sequence[Any], images: Images, *, batch_size: int = 8) -> None:
        self.model, self.net, self.images, self.batch_size = model, model.net, images, batch_size
        self.dense = lean(self.net)
        self.facts = self.dense.plan.host.facts
        self.device = next(self.net.parameters()).device
        self.methods: dict[str, tuple[Method, ...]] = {}
        self.lean: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        """methods that do not work on this network: why not"""
        self.accuracy = ""
        """what was done for accuracies"""
        self.rounds = 0
        """timed passes of each network that the limit left time for"""
        self.smaller: dict[int, tuple[float, Smaller]] = {}
        """rows of patches -> GMACs, and the dense network on such images"""
        self.networks: dict[str, Any] = {}
        """what runs, by the names of the rows"""
        self.beside: dict[str, str] = {}
        """method -> the row of smaller images at its cost"""
        self.more: dict[str, Any] = {}
        """what else was measured, for the record"""
        self.files: dict[str, Path] = {}
        """row -> file that it was opened from"""
        for each in wanted:
            if each.file is not None:
                self.files[each.text], self.lean[each.text] = each.file, self._open(each.file)
                continue
            methods = tuple(make_method(name, settings) for name, settings in each.methods)
            self.methods[each.text] = methods
            try:
                self.lean[each.text] = lean(self.net, *methods, verify=False)
            except PlanError as error:
                self.refused[each.text] = str(error)
        if not self.lean:
            raise PlanError("; ".join(dict.fromkeys(self.refused.values())))

    # ------------------------------------------------------------------------------------------------------- networks

    def _open(self, file: Path) -> Any:
        """A network with other weights, for the same images and patches as the dense one."""
        fast = load(file, device=self.device, verify=False)
        for name in ("image_size", "grid", "prefix", "class_token", "width"):
            ours, theirs = getattr(self.facts, name), getattr(fast.plan.host.facts, name)
            if ours != theirs:
                raise UsageError(
                    f"{file} cannot stand beside {self.model.spec}: its {name.replace('_', ' ')} is {theirs}, expected "
                    f"{ours}; see --img-size"
                )
        return fast.to(self.model.dtype)

    def at_rows(self, rows: int) -> tuple[float, Smaller]:
        """The dense network on images with so many rows of patches, and its GMACs."""
        if rows not in self.smaller:
            (height, width), grid = self.facts.image_size, self.facts.grid
            assert grid is not None
            columns = max(1, round(grid[1] * rows / grid[0]))
            small = Smaller(self.net, (rows * (height // grid[0]), columns * (width // grid[1])))
            self.smaller[rows] = small.fast.gmacs(), small
        return self.smaller[rows]

    def resized(self, cost: float) -> tuple[str, Any]:
        """The dense network at the image size whose cost is nearest, its own perhaps."""
        assert self.facts.grid is not None
        low, high = 1, self.facts.grid[0]
        while low < high:  # the largest number of patches that costs no more
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at_rows(middle)[0] <= cost else (low, middle - 1)
        rows = min((low, min(low + 1, self.facts.grid[0])), key=lambda n: abs(self.at_rows(n)[0] - cost))
        if rows == self.facts.grid[0]:
            return "dense", self.dense
        height, width = (small := self.at_rows(rows)[1]).size
        return f"dense at {f'{height} x {width}' if height != width else height} pixels", small

    def batches(self) -> Iterator[Tensor]:
        """The images in order, (B, 3, H, W) on the device."""
        for start in range(0, len(self.images.files), self.batch_size):
            yield self.model.read(self.images.files[start : start + self.batch_size]).to(self.device)

    @torch.no_grad()
    def features(self, network: Any, images: Tensor, *, seen: list[Tokens] | None = None) -> tuple[Tensor, Tensor]:
        """Patch features on the full grid, (B, C, rows, columns), and the class feature, (B, C).

        Args:
            network: dense, lean, or dense on smaller images.
            images: (B, 3, H, W).
            seen: as in ``Plan.run``.
        """
        small = isinstance(network, Smaller)
        fast = network.fast if small else network
        x = fast.normalized(network.shrink(images) if small else images, seen=seen)
        grid = x[:, self.facts.prefix :].mT.unflatten(2, fast.plan.host.facts.grid)
        patches = F.interpolate(grid, self.facts.grid, mode="bilinear") if small else grid
        return patches, x[:, 0] if self.facts.class_token else grid.mean((2, 3))

    # ---------------------------------------------------------------------------------------------------------- rows

    def measure(
        self,
        *,
        rounds: int = 10,
        limit_s: float | None = None,
        data: Path | None = None,
        seed: int = 0,
        skip_broken: bool = False,
    ) -> list[Row]:
        """Every row: the dense network, then each method and, once for each size, smaller images of its cost.

        Args:
            rounds: timed passes of each network.
            limit_s: seconds of timing at most, after which fewer rounds must do.
            data: class folders to measure accuracy on.
            seed: of their split.
            skip_broken: leave out images of ``data`` that cannot be decoded.
        """
        some = next(self.batches())  # on which the costs of some methods depend
        rows = self._costs(some)
        cosines = self._cosines()
        programs = {**self.networks, "dense": self.net}
        label = "timing" if limit_s is None else f"timing (ends after the round of second {limit_s:.0f})"
        speeds = compare(
            programs, some, baseline="dense", rounds=rounds, warmup=min(rounds, 2), limit_s=limit_s, progress=label,
        )  # fmt: skip
        self.rounds = speeds["dense"].speed.rounds
        accuracies: Mapping[str, Mapping[str, float]] = {}
        if data is not None:
            accuracies, self.accuracy = measure_accuracy(
                programs, lambda name, images: self.features(self.networks[name], images)[1], data,
                self.model.preprocessing.transform(), dense="dense", batch_size=self.batch_size,
                device=self.device, seed=seed, skip_broken=skip_broken,
            )  # fmt: skip
        found = {}
        for name, row in rows.items():
            speed = speeds[name]
            found[name] = replace(
                row,
                patch_cosine=cosines[name][0],
                class_cosine=cosines[name][1],
                speedup=speed.speedup,
                realised=speed.speedup * row.gmacs / rows["dense"].gmacs,
                ms_per_image=speed.speed.latency_ms / speed.speed.batch_size,
                **accuracies.get(name, {}),
            )
        against = {name: row.patch_cosine - found[self.beside[name]].patch_cosine for name, row in found.items()
                   if name in self.beside}  # fmt: skip
        return [replace(row, against_resizing=against.get(name)) for name, row in found.items()]

    def _costs(self, some: Tensor) -> dict[str, Row]:
        """Find the networks that run, each beside its smaller images; their rows without what is measured."""
        networks = self.networks = {"dense": self.dense}
        rows = {"dense": Row("dense", self.facts.tokens, self.dense.gmacs(), 0.0, 1.0, 1.0)}
        for name, fast in tqdm(self.lean.items(), desc="costs", unit="network", delay=1, leave=False, disable=None):
            try:
                probe = some if fast.depends_on_data else None
                tokens, cost = fast.tokens_per_layer(probe)[-1], fast.gmacs(probe)
                row = Row(name, tokens, cost, own_gmacs(fast, probe, total=cost), 0.0, 0.0)
            except UsageError as error:  # what a method finds out where it runs
                self.refused[name] = str(error)
                continue
            networks[name], rows[name] = fast, row
            try:
                beside, small = self.resized(row.gmacs)
            except UsageError as error:
                self.refused["dense at smaller images"] = str(error)
                continue
            self.beside[name] = beside
            if beside not in rows:
                networks[beside] = small
                rows[beside] = Row(beside, small.facts.tokens, small.fast.gmacs(), 0.0, 0.0, 0.0)
        self.lean = {name: fast for name, fast in self.lean.items() if name in networks}
        if not self.lean:
            raise UsageError("; ".join(dict.fromkeys(self.refused.values())))
        return rows

    def _cosines(self) -> dict[str, list[float]]:
        """Of patches and of the class feature, means over the images."""
        sums = {name: [0.0, 0.0] for name in self.networks}
        number = len(self.images.files)
        steps = math.ceil(number / self.batch_size) * len(self.networks)
        with tqdm(total=steps, desc="features", unit="pass", delay=1, leave=False, disable=None) as bar:
            for images in self.batches():
                dense = self.features(self.dense, images)
                for name, network in self.networks.items():
                    for index, (a, b) in enumerate(zip(self.features(network, images), dense, strict=True)):
                        sums[name][index] += float(F.cosine_similarity(a, b, dim=1).mean()) * len(images) / number
                    bar.update()
        return sums

    def heading(self) -> str:
        """What is measured, for a terminal."""
        facts, files = self.facts, self.images.files
        lines = [
            f"network  {facts.name}: {facts.depth} blocks, {facts.tokens} tokens of width {facts.width}",
            f"weights  {'' if self.model.trained else 'WARNING: '}{self.model.weights}",
            f"images   {len(files)} as {self.model.preprocessing}",
            f"device   {device_name(self.device)}, batch {min(self.batch_size, len(files))}",
        ]
        if self.images.skipped:
            lines.append(f"left out {len(self.images.skipped)} broken: {'; '.join(self.images.skipped)}")
        return "\n".join(lines)

    @property
    def timed(self) -> str:
        """What a time of the table is, and when it is not worth much."""
        said = f"medians of {self.rounds} passes" if self.rounds > 1 else "of one pass"
        few = "; too few to go by: raise --rounds and --timing-seconds" if self.rounds < FEW else ""
        return f"{said} of each network{few}"

    def table(self, rows: Sequence[Row]) -> str:
        """For a terminal."""
        measured = [key for key in (TOP1, KNN, PROBE) if getattr(rows[0], key) is not None]
        width = max(len(name) for name in (*(row.name for row in rows), *self.refused))
        head = (
            f"{'':{width}}  tokens    GMACs      own  ms/image  speed-up  realised  patches    class  against resizing"
        )
        lines = [head + "".join(f"{WORDS[key]:>9}" for key in measured)]
        for row in rows:
            against = "" if row.against_resizing is None else f"{row.against_resizing:+.4f}"
            gain = row.against_resizing or 0.0
            word = " better" if gain > 0 else " worse " if gain < 0 else ""
            lines.append(
                f"{row.name:{width}}  {row.tokens:6d} {row.gmacs:8.3f} {row.own_gmacs:8.3f} {row.ms_per_image:9.2f} "
                f"{row.speedup:8.2f}x {100 * row.realised:8.0f}% {row.patch_cosine:8.4f} {row.class_cosine:8.4f} "
                f"{against + word:>17}" + "".join(f" {getattr(row, key):8.2f}" for key in measured)
            )
        lines += [f"{name:{width}}  not possible: {why}" for name, why in self.refused.items()]
        if self.accuracy:
            lines.append(f"accuracy: {self.accuracy}")
        if self.rounds:
            lines.append(f"times: {self.timed}")
        return "\n".join(lines)

    def record(self, rows: Sequence[Row], **more: Any) -> str:
        """All of it as JSON; ``more`` is put beside it."""
        about = {
            "network": self.facts.name,
            "model": self.model.spec,
            "weights": self.model.weights,
            "trained": self.model.trained,
            "images_as": str(self.model.preprocessing),
            "image_size": self.facts.image_size,
            "batch_size": min(self.batch_size, len(self.images.files)),
            **describe_device(self.device),
        }
        content = {
            **about,
            "images": [file.name for file in self.images.files],
            "broken_images": list(self.images.skipped),
            "accuracy": self.accuracy,
            "timed_passes": self.rounds,
            "rows": [asdict(row) for row in rows],
            "not_possible": self.refused,
            **self.more,
            **more,
        }
        return json.dumps(content, indent=1, default=str) + "\n"

    # ------------------------------------------------------------------------------------------------- what they see

    @torch.no_grad()
    def strips(self, file: Path, layers: Sequence[int]) -> list[Strip]:
        """What each network makes of an image: its tokens after some numbers of blocks, and its features in colours.

        Args:
            file: the image.
            layers: numbers of blocks, 1 to the depth.
        """
        images = self.model.read([file]).to(self.device)
        height, width = images.shape[2:]
        image = self.model.preprocessing.pixels(images[0]).cpu()
        dense = self.features(self.dense, images)[0][0].cpu()
        principal = Principal(dense)

        def colours(network: Any, seen: list[Tokens] | None = None) -> tuple[str, Tensor]:
            features = self.features(network, images, seen=seen)[0][0].cpu()
            return "features", spread(principal.colours(features), height, width)

        strips = [Strip("dense", [colours(self.dense), ("input", image)])]
        for name, fast in self.lean.items():
            seen: list[Tokens] = []
            panels = [colours(fast, seen)]
            panels += [
                (f"{number} tokens after block {layer}", mosaic(image, labels))
                for layer, number, labels in _patches_of(seen, self.facts.grid, layers)
            ]
            strips.append(Strip(name, panels))
        for name in dict.fromkeys(self.beside.values()):
            if isinstance(small := self.networks[name], Smaller):
                shrunk = self.model.preprocessing.pixels(small.shrink(images)[0]).cpu()
                strips.append(Strip(name, [colours(small), ("input", spread(shrunk, height, width))]))
        return strips

    def see_layers(self, wanted: Sequence[int] | None) -> list[int]:
        """Numbers of blocks after which tokens are shown; a third, two thirds and all of them by default.

        Raises:
            UsageError: if there are fewer blocks.
        """
        depth = self.facts.depth
        layers = sorted(set(wanted or (max(1, depth // 3), max(1, 2 * depth // 3), depth)))
        if layers[-1] > depth or layers[0] < 1:
            raise UsageError(f"--see-layers: {self.facts.name} has {depth} blocks, so 1 to {depth}; got {layers}")
        return layers


WORDS = {TOP1: "top-1", KNN: "k-NN", PROBE: "probe", "patch_cosine": "cosine of patches"}
"""Fields of a row that say what is kept, as people call them."""


@dataclass(frozen=True)
class Wish:
    """What the best row must satisfy: at most so much, or at least so close.

    Args:
        gmacs, ms: of an image, on the device and at the batch that were measured.
        cosine: of the patches' features with the dense network's.
    """

    gmacs: float | None = None
    ms: float | None = None
    cosine: float | None = None

    def __str__(self) -> str:
        if self.cosine is not None:
            return f"a cosine of at least {self.cosine}"
        return f"{self.gmacs} GMACs" if self.ms is None else f"{self.ms} ms per image"

    def allows(self, row: Row) -> bool:
        if self.cosine is not None:
            return row.patch_cosine >= self.cosine
        return row.gmacs <= self.gmacs if self.gmacs is not None else row.ms_per_image <= (self.ms or 0)

    def worth(self, row: Row) -> float:
        """More is better: what is kept within a budget; speed, where a cosine is asked for."""
        return row.kept if self.cosine is None else -row.ms_per_image


def choose(rows: Sequence[Row], wish: Wish) -> list[Row]:
    """The best row of each kind that satisfies a wish, best first; empty if none does."""
    best: dict[str, Row] = {}
    for row in sorted(filter(wish.allows, rows), key=wish.worth, reverse=True):
        best.setdefault(row.kind, row)
    return list(best.values())


def best_within(
    rows: Sequence[Row], *, gmacs: float | None = None, ms: float | None = None, cosine: float | None = None
) -> str:
    """The networks that satisfy a wish: the best of all, and of each method.

    Within a budget that is the one that keeps most: accuracy where it was measured, the cosine of the patch features
    where not. For a cosine it is the fastest.
    """
    wish = Wish(gmacs, ms, cosine)
    if not (best := choose(rows, wish)):
        least = min(row.gmacs for row in rows), min(row.ms_per_image for row in rows)
        return f"Nothing is within {wish}: the least is {least[0]:.3f} GMACs, {least[1]:.3f} ms per image"
    lines = [
        f"  {row.name}: {row.gmacs:.3f} GMACs, {row.ms_per_image:.2f} ms per image, "
        + (
            f"patches {row.patch_cosine:.4f}"
            if row.measure == "patch_cosine"
            else f"{WORDS[row.measure]} {row.kept:.2f}"
        )
        for row in best
    ]
    return "\n".join([f"Within {wish}, the best of each kind, best first:", *lines])


def front(rows: Sequence[Row], cost: str, measure: str) -> list[Row]:
    """The rows of which none other costs less and keeps more, cheapest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (getattr(row, cost), -getattr(row, measure))):
        if not best or getattr(row, measure) > getattr(best[-1], measure):
            best.append(row)
    return best


def python_lines(trade: Trade, row: Row) -> str:
    """The lines that build the network of a row and run it on an image file."""
    model, network = trade.model, trade.networks[row.name]
    options = "".join(f", {key}={value!r}" for key, value in model.options.items())
    lines = ["import leanvit", "from common.hosts.opening import open_model"]
    if isinstance(network, Smaller):
        lines[0] = "from common.hosts.resizing import Smaller"
        made = f"Smaller(model.net, {network.size})"
    elif row.name in trade.files:
        made = f"leanvit.load({str(trade.files[row.name])!r})"
    else:
        methods = "".join(f", {_constructor(method)}" for method in trade.methods.get(row.name, ()))
        made = f"leanvit.lean(model.net{methods})"
    return "\n".join([
        *lines, f"model = open_model({model.spec!r}{options})", f"fast = {made}",
        'images = model.read(["photo.jpg"])', "output, features = fast(images), fast.features(images)",
    ])  # fmt: skip


def _constructor(method: Any) -> str:
    """``leanvit.ToMe(r=16)``, of a method that is not resolved: the settings that are not the defaults."""
    said = [
        f"{setting.name}={value!r}"
        for setting in fields(method)
        if (value := getattr(method, setting.name)) != setting.default
    ]
    return f"leanvit.{type(method).__name__}({', '.join(said)})"


@torch.no_grad()
def tokens_of_patches(fast: Any, images: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Of an image (1, 3, H, W) after some numbers of blocks: how many tokens, and the one that each patch is part of.

    A patch may be part of none, of which nothing is yielded: where it keeps the features it had, or waits beside.

    Yields:
        Number of blocks, number of tokens, (rows, columns).
    """
    seen: list[Tokens] = []
    host = fast.plan.host
    fast.plan.run(host.embed(fast, images), seen=seen)
    yield from _patches_of(seen, host.facts.grid, layers)


def _patches_of(
    seen: Sequence[Tokens], grid: tuple[int, int] | None, layers: Sequence[int]
) -> Iterator[tuple[int, int, Tensor]]:
    """``tokens_of_patches`` of a pass that was seen."""
    assert grid is not None
    for layer in layers:
        tokens = seen[layer]
        shares = tokens.membership()[0, tokens.prefix :, tokens.prefix :]  # (tokens left, patches)
        if shares.shape[1] == grid[0] * grid[1] and bool((shares.sum(0) > 0).all()):
            yield layer, tokens.x.shape[1], shares.argmax(0).unflatten(0, grid).cpu()
