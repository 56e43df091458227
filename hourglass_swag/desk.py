"""The paper's table at desk size: a small SWAG-style ViT on real handwritten digits, dense and with Hourglass.

The network is trained once by ``train.py``; every row is then evaluated without fine-tuning by ``imagenet_1k_eval.py``,
both through their ordinary flags, on the 360 held-out pictures of the 1,797 that ship inside scikit-learn. Speeds are
measured in turns, so that the ratios of one run are comparable.
"""

import contextlib
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from common.benchmark import compare, device_name, random_images
from common.cache import cached, source_files
from common.flops import gmacs
from common.tables import DeskTable
from hourglass_swag import imagenet_1k_eval, train
from hourglass_swag.tools.costs import build_network, parse_network

RESOLUTION = 32
DENSE = f"-m vit_desk -r {RESOLUTION}"
SETTINGS = ((4, 6), (2, 6), (4, 5), (2, 5), (6, 4), (4, 4), (3, 4), (2, 4))
"""(layer before which the 8 x 8 tokens are clustered, side of the grid of clusters), of 8 layers"""
BATCH = {"cpu": 64, "cuda": 1024}
WARMUP, ROUNDS = 3, 25
COLUMNS = ("setting", "top1_percent", "mmacs", "throughput_ips", "speedup", "flops_ratio", "realised")


def run(folder: Path, *, device: torch.device | str, force: bool, progress: bool) -> DeskTable:
    """Train once, evaluate and time every row.

    Args:
        folder: where the trained network is kept.
        device: cpu or cuda.
        force: train again although nothing changed.
        progress: print what the scripts print, and progress bars.
    """
    device = torch.device(device)
    weights = train_once(folder, device, force=force, progress=progress)
    arguments = {"dense": DENSE} | {
        f"before layer {layer}, {side}x{side}": f"-m hourglass_vit_desk -r {RESOLUTION} -l {layer} -n {side * side}"
        for layer, side in SETTINGS
    }
    top1 = {
        name: evaluate(words, weights, device, progress=progress) for name, words in progress_over(arguments, progress)
    }
    models = {}
    with torch.device(device):
        for name, words in arguments.items():
            models[name] = build_network(parse_network(words), weights=str(weights)).to(device)
    cost = {name: gmacs(model.count_ops(), "swag") for name, model in models.items()}
    images = random_images(BATCH[device.type], RESOLUTION, device)
    speeds = compare(
        models, images, baseline="dense", warmup=WARMUP, rounds=ROUNDS, progress="speed" if progress else None
    )
    rows = [
        {
            "setting": name,
            "top1_percent": round(top1[name], 2),
            "mmacs": round(1e3 * cost[name], 2),
            "throughput_ips": round(speeds[name].speed.throughput_ips),
            "speedup": round(speeds[name].speedup, 2),
            "flops_ratio": round(cost["dense"] / cost[name], 2),
            "realised": round(speeds[name].speedup * cost[name] / cost["dense"], 2),
        }
        for name in arguments
    ]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return DeskTable(
        title="Hourglass without fine-tuning, at desk size (1,797 handwritten digits)",
        columns=COLUMNS,
        rows=rows,
        notes=(
            "vit_desk: 8 layers, width 64, 8x8 tokens of 32x32 pictures; trained once on 1,437 digits and evaluated on "
            "the 360 others. One picture is 0.28 points.",
            f"Throughput on {device_name(device)}{threads}, float32, batch {BATCH[device.type]}, median of {ROUNDS} "
            "rounds in turns. speedup: paired, over dense; flops_ratio: what the counted cost promises; realised: the "
            "first over the second. mmacs by the convention 'swag', in millions.",
        ),
        plot={"x": "mmacs", "y": "top1_percent", "label": "setting"},
    )


def train_once(folder: Path, device: torch.device, *, force: bool, progress: bool) -> Path:
    """Weights of the trained desk network, trained anew only if the code, the versions or the file changed.

    Raises:
        RuntimeError: if the network does not reach 97 % on the held-out digits.
    """
    weights = folder / "weights.pth"

    def compute() -> dict[str, object]:
        words = ["-m", "vit_desk", "--data-set", "digits", "--output-dir", str(folder), "--device", str(device)]
        with quiet(not progress):
            row = train.main(words)
        return {"sha256": _sha256(weights), "top1_percent": row["test_top1_percent"]}

    def kept(again: bool) -> dict[str, object]:
        job = ["training", "hourglass_swag", "vit_desk", str(device)]
        return cached(job, compute, files=source_files("hourglass_swag"), force=again)

    known = kept(force)
    if not weights.is_file() or _sha256(weights) != known["sha256"]:
        known = kept(True)
    if float(str(known["top1_percent"])) < 97:
        raise RuntimeError(f"the desk network reached {known['top1_percent']} % on the held-out digits, expected 97 %")
    return weights


def evaluate(words: str, weights: Path, device: torch.device, *, progress: bool) -> float:
    """Top-1 accuracy in percent of one network on the held-out digits."""
    flags = ["--dataset", "digits", "--weights", str(weights), "-j", "0", "-b", "180", "--device", str(device)]
    with quiet(not progress), contextlib.redirect_stdout(io.StringIO()):
        return imagenet_1k_eval.main([*words.split(), *flags])["top1_percent"]


def progress_over(arguments: dict[str, str], progress: bool) -> Sequence[tuple[str, str]]:
    """The rows to evaluate, announced on stderr."""
    if progress:
        print(f"evaluating {len(arguments)} settings on the held-out digits", file=sys.stderr)
    return list(arguments.items())


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Without the lines on stderr, where they are not wanted."""
    if not wanted:
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
