"""What methods cost and keep on one network: rows of the network itself, the methods, and smaller images."""

import copy
import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from common.data.build import open_split
from common.data.datasets import load_image
from common.data.loaders import eval_loader
from common.data.transforms import eval_transform
from common.hosts.draw import draw_tokens
from common.hosts.host import Tokens
from common.hosts.network import Lean, lean, make_lean, make_method
from common.measure.benchmark import compare, describe_device
from common.measure.flops import count_operations, gmacs
from common.run.errors import UsageError
from common.run.files import existing_file, write_atomic
from common.run.settings import DataSettings

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


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


def image_files(path: Path) -> list[Path]:
    """The images of a folder, or the one that is named.

    Raises:
        UsageError: if there is none.
    """
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if not found:
        raise UsageError(f"--images {path}: expected an image or a folder with some ({', '.join(SUFFIXES)})")
    return found


def open_network(name: str, image_size: int | None, weights: Path | None) -> nn.Module:
    """A network of timm, its position embedding resampled to the image size.

    Raises:
        UsageError: for a name or a size that timm does not know.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UsageError(f"timm has no network {name!r}" + (f"; near are {', '.join(near)}" if near else ""))
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if weights is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(existing_file(weights))}}
    torch.manual_seed(0)
    try:
        return timm.create_model(name, **options).eval()
    except (AssertionError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"{name} cannot be built with --img-size {image_size}, --weights {weights}: {error}"
        ) from error


class Smaller(nn.Module):
    """A network on images of another size than those that it is given."""

    def __init__(self, net: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.size = net, size

    def shrink(self, images: Tensor) -> Tensor:
        return F.interpolate(images, self.size, mode="bicubic", antialias=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.shrink(images))


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


def own_gmacs(net: nn.Module, fast: Any, images: Tensor | None = None) -> float:
    """Of a lean network's multiply-accumulates those that are no module's of the host."""
    plan = copy.copy(fast.plan)
    plan.acting = [{hook: [Unseen(step) for step in steps] for hook, steps in acting.items()} for acting in plan.acting]
    return fast.gmacs(images) - make_lean(net, plan).gmacs(images)


class Trade:
    """The networks of the table and the images that they see.

    Args:
        net: the dense network, on its device, in evaluation mode.
        wanted: methods, each with ``text`` and ``methods``.
        files: images.
        batch_size: images at a time.

    Raises:
        UsageError: if the network is no host, or a method cannot work on it.
    """

    def __init__(self, net: Any, wanted: Sequence[Any], files: Sequence[Path], *, batch_size: int = 8) -> None:
        self.net, self.files, self.batch_size = net, files, batch_size
        self.dense = lean(net)
        self.facts = self.dense.plan.host.facts
        self.lean: dict[str, Any] = {
            each.text: lean(net, *(make_method(name, settings) for name, settings in each.methods), verify=False)
            for each in wanted
        }
        self.config = timm.data.resolve_model_data_config(net)  # pyright: ignore[reportAttributeAccessIssue]
        self.device = next(net.parameters()).device

    def transform(self) -> Any:
        """As the network's own configuration says, at its image size."""
        names = {"mean": self.config["mean"], "std": self.config["std"], "interpolation": self.config["interpolation"]}
        return eval_transform(self.facts.image_size[0], crop_ratio=self.config["crop_pct"], **names)

    def images(self) -> Tensor:
        """All of them, (B, 3, H, W)."""
        transform = self.transform()
        return torch.stack([transform(load_image(file)) for file in self.files])

    def cost_at(self, side: int) -> tuple[float, Any]:
        """GMACs of the dense network at another image size, and the network."""
        net = copy.deepcopy(self.net)
        net.set_input_size(img_size=(side, side))
        counted = count_operations(net, torch.zeros(1, self.facts.channels, side, side, device="meta"))
        return gmacs(counted.executed), net

    def resized(self, cost: float) -> tuple[str, Smaller]:
        """The dense network at the image size whose cost is nearest."""
        assert self.facts.grid is not None
        patch = self.facts.image_size[0] // self.facts.grid[0]
        low, high = 1, self.facts.grid[0]
        while low < high:  # the largest number of patches that costs no more
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost_at(patch * middle)[0] <= cost else (low, middle - 1)
        side = (
            min((low, min(low + 1, self.facts.grid[0])), key=lambda n: abs(self.cost_at(patch * n)[0] - cost)) * patch
        )
        return f"dense at {side} pixels", Smaller(self.cost_at(side)[1], (side, side))

    @torch.no_grad()
    def features(self, network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features on the full grid, (B, C, rows, columns), and the class feature, (B, C)."""
        shrink = network.shrink if isinstance(network, Smaller) else None
        fast: Any = lean(network.net, verify=False) if isinstance(network, Smaller) else network
        host, patches, classes = fast.plan.host, [], []
        for batch in images.split(self.batch_size):
            batch = batch.to(self.device)
            x = fast.normalized(batch if shrink is None else shrink(batch))
            grid = x[:, host.facts.prefix :].mT.unflatten(2, host.facts.grid)
            patches.append(F.interpolate(grid, self.facts.grid, mode="bilinear") if shrink else grid)
            classes.append(x[:, 0] if host.facts.class_token else grid.mean((2, 3)))
        return torch.cat(patches), torch.cat(classes)

    def measure(self, *, rounds: int = 10, data: Path | None = None) -> list[Row]:
        """Every row: the dense network, then each method and, once for each size, smaller images of its cost."""
        images = self.images()
        some = images[: self.batch_size].to(self.device)  # on which the costs of some methods depend
        networks: dict[str, Any] = {"dense": self.net}
        beside: dict[str, str] = {}
        for name, fast in self.lean.items():
            resized, smaller = self.resized(fast.gmacs(some))
            networks[name], beside[name] = fast, resized
            networks.setdefault(resized, smaller)
        dense = self.features(self.dense, images)
        rows = {}
        for name, network in networks.items():
            seen = self.dense if name == "dense" else network
            found = self.features(seen, images)
            cosines = [float(F.cosine_similarity(a, b, dim=1).mean()) for a, b in zip(found, dense, strict=True)]
            fast: Any = seen if isinstance(seen, Lean) else lean(seen.net, verify=False)
            own = own_gmacs(self.net, fast, some) if name in self.lean else 0.0
            seen = some if name in self.lean else None
            rows[name] = Row(name, fast.tokens_per_layer(seen)[-1], fast.gmacs(seen), own, *cosines)
        speeds = compare(networks, some, baseline="dense", rounds=rounds)
        accuracies = {} if data is None else self.accuracies(networks, data)
        cost = rows["dense"].gmacs
        return [
            replace(
                row,
                speedup=speeds[name].speedup,
                realised=speeds[name].speedup * row.gmacs / cost,
                ms_per_image=speeds[name].speed.latency_ms / speeds[name].speed.batch_size,
                top1_percent=accuracies.get(name),
                against_resizing=row.patch_cosine - rows[beside[name]].patch_cosine if name in beside else None,
            )
            for name, row in rows.items()
        ]

    @torch.no_grad()
    def accuracies(self, networks: dict[str, Any], data: Path) -> dict[str, float]:
        """Top-1 of each network on the validation images of a folder."""
        dataset = open_split(
            DataSettings("folder", str(data), self.facts.image_size[0], self.batch_size), "val", self.transform()
        )
        right, seen = dict.fromkeys(networks, 0), 0
        for images, labels, *_ in eval_loader(dataset, batch_size=self.batch_size):
            seen += len(labels)
            for name, network in networks.items():
                right[name] += int((network(images.to(self.device)).argmax(1).cpu() == labels).sum())
        return {name: 100 * number / seen for name, number in right.items()}

    def table(self, rows: Sequence[Row]) -> str:
        """For a terminal."""
        accuracy = any(row.top1_percent is not None for row in rows)
        width = max(len(row.name) for row in rows)
        head = f"{'':{width}}  tokens    GMACs      own  speed-up  realised  patches    class  against resizing"
        lines = [head + ("   top-1" if accuracy else "")]
        for row in rows:
            against = "" if row.against_resizing is None else f"{row.against_resizing:+.4f}"
            word = "" if row.against_resizing is None else " better" if row.against_resizing > 0 else " worse "
            lines.append(
                f"{row.name:{width}}  {row.tokens:6d} {row.gmacs:8.3f} {row.own_gmacs:8.3f} {row.speedup:8.2f}x "
                f"{100 * row.realised:8.0f}% {row.patch_cosine:8.4f} {row.class_cosine:8.4f} {against + word:>17}"
                + (f" {row.top1_percent:7.2f}" if accuracy else "")
            )
        return "\n".join(lines)

    def write(self, rows: Sequence[Row], folder: Path) -> None:
        """trade.json, and for every image a PNG of the tokens that each method leaves."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {"network": self.facts.name, "image_size": self.facts.image_size, "batch_size": self.batch_size}
        about |= describe_device(self.device)
        content = {**about, "images": [file.name for file in self.files], "rows": [asdict(row) for row in rows]}
        write_atomic(folder / "trade.json", json.dumps(content, indent=1, default=str) + "\n")
        mean, std = (torch.tensor(self.config[key]).view(3, 1, 1) for key in ("mean", "std"))
        drawn = {  # a dropped patch that keeps its features is restored from no token
            name: fast
            for name, fast in self.lean.items()
            if all(getattr(method, "restore", None) != "frozen" for method in fast.methods)
        }
        for file, image in zip(self.files, self.images(), strict=True):
            labels = {name: token_of_patch(fast, image[None].to(self.device)) for name, fast in drawn.items()}
            draw_tokens(image * std + mean, labels).save(folder / f"{file.stem}.png")


def best_within(rows: Sequence[Row], *, gmacs: float | None = None, ms: float | None = None) -> str:
    """The networks within a budget that keep most: the best of all, and of each method.

    Most is the top-1 accuracy where it was measured, and the cosine of the patch features where not.
    """
    budget = f"{gmacs} GMACs" if ms is None else f"{ms} ms per image"
    inside = [row for row in rows if (row.gmacs <= gmacs if gmacs is not None else row.ms_per_image <= (ms or 0))]
    best: dict[str, Row] = {}
    for row in sorted(inside, key=_kept, reverse=True):
        kind = "dense" if row.against_resizing is None else re.sub(r":.*?(?=\+[a-z]|$)", "", row.name)
        best.setdefault(kind, row)
    if not best:
        least = min(row.gmacs for row in rows), min(row.ms_per_image for row in rows)
        return f"Nothing is within {budget}: the least is {least[0]:.3f} GMACs, {least[1]:.3f} ms per image"
    lines = [
        f"  {row.name}: {row.gmacs:.3f} GMACs, {row.ms_per_image:.2f} ms per image, "
        + (f"top-1 {row.top1_percent:.2f}" if row.top1_percent is not None else f"patches {row.patch_cosine:.4f}")
        for row in best.values()
    ]
    return "\n".join([f"Within {budget}, the best of each kind, best first:", *lines])


def _kept(row: Row) -> float:
    return row.patch_cosine if row.top1_percent is None else row.top1_percent


@torch.no_grad()
def token_of_patch(fast: Any, image: Tensor) -> Tensor:
    """Which token each patch of an image is restored from, (rows, columns)."""
    tokens = fast.run(image)
    shares = tokens.membership()[0, tokens.prefix :, tokens.prefix :]  # (tokens left, patches)
    return shares.argmax(0).unflatten(0, fast.plan.host.facts.grid).cpu()
