"""The paper's tables at desk size: a small SWAG-style ViT on real handwritten digits, dense and with seven methods.

The network is trained once by ``train.py``; every row is then evaluated without fine-tuning by ``imagenet_1k_eval.py``,
both through their ordinary flags, on the 360 held-out images of the 1,797 that ship inside scikit-learn. Speeds are
measured in turns, so that the ratios of one run are comparable.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common.ledger.desk import held_out_digits, quiet, speed_cells, train_once
from common.ledger.tables import DeskTable
from common.measure.benchmark import compare, device_name
from common.measure.flops import gmacs
from hourglass_swag import imagenet_1k_eval, train
from hourglass_swag.evaluation import swag_eval_transform
from hourglass_swag.tools.costs import build_network, count, parse_network

RESOLUTION = 32
DENSE = "-m vit_desk"
ROWS = {
    "dense": {"dense": DENSE},
    "Hourglass": {
        f"before layer {layer}, {side}x{side}": f"-m hourglass_vit_desk -l {layer} -n {side * side}"
        for layer, side in ((4, 6), (2, 6), (2, 5), (4, 4), (3, 4), (2, 4))
    },
    "EViT": {
        f"keep {rate}": f"-m e_vit_desk --base_keep_rate {rate} --drop_loc 2 4 6" for rate in ("0.8", "0.7", "0.5")
    },
    "ToMe": {f"r = {r}": f"-m tome_vit_desk --tome_r {r}" for r in (2, 4, 7)},
    "ATS": {
        f"from layer {first}": "-m ats_vit_desk --ats_num_tokens 65 --ats_drop_tokens --ats_blocks_indexes "
        + " ".join(map(str, range(first, 8)))
        for first in (6, 5, 4)
    },
    "ACT": {f"{rounds} hash rounds": f"-m act_vit_desk --act_q_hashes {rounds}" for rounds in (16, 24, 32)},
    "SMYRF": {
        f"from layer 4, clusters of {size}": "-m smyrf_vit_desk --smyrf_plug_in_index 4 --smyrf_n_hashes 4 "
        f"--smyrf_q_cluster_size {size} --smyrf_k_cluster_size {size}"
        for size in (32, 16, 8)
    },
    "Evo-ViT": {
        f"keep {rate} from layer {layer}": f"-m evo_vit_desk --evo_prune_location {layer} --evo_prune_ratio {rate}"
        for layer, rate in ((6, "0.5"), (4, "0.5"), (2, "0.5"))
    },
}
"""Method -> setting -> arguments, as the published rows have them, for 8 layers and 8 x 8 tokens."""
BATCH = {"cpu": 64, "cuda": 1024}
WARMUP, ROUNDS = 3, 25
COLUMNS = ("method", "setting", "top1_percent", "mmacs", "throughput_ips", "speedup", "flops_ratio", "realised")


def run(folder: Path, *, device: torch.device | str, force: bool, progress: bool) -> DeskTable:
    """Train once, evaluate and time every row.

    Args:
        folder: where the trained network is kept.
        device: cpu or cuda.
        force: train again although nothing changed.
        progress: print what the scripts print, and progress bars.
    """
    device = torch.device(device)
    weights = folder / "weights.pth"
    flags = ["-m", "vit_desk", "--data-set", "digits", "--output-dir", str(folder), "--device", str(device)]
    train_once(
        ["hourglass_swag", "vit_desk", str(device)],
        lambda: train.main(flags)["test_top1_percent"],
        weights,
        force=force,
        progress=progress,
        at_least=97,
    )
    rows = [(method, name, f"{words} -r {RESOLUTION}") for method, rows in ROWS.items() for name, words in rows.items()]
    if progress:
        print(f"evaluating {len(rows)} settings on the held-out digits", file=sys.stderr)
    top1 = [
        evaluate(words, weights, device, progress=progress)
        for *_, words in tqdm(rows, desc="accuracy", delay=2, leave=False, disable=not progress)
    ]
    models = {words: build_network(parse_network(words), weights=str(weights)).to(device) for *_, words in rows}
    images = held_out_digits(swag_eval_transform(RESOLUTION), BATCH[device.type]).to(device)
    cost = {words: gmacs(count(model, images).published, "swag") / len(images) for words, model in models.items()}
    dense = rows[0][2]
    speeds = compare(
        models, images, baseline=dense, warmup=WARMUP, rounds=ROUNDS, progress="speed" if progress else None
    )
    lines = [
        {
            "method": method,
            "setting": setting,
            "top1_percent": round(accuracy, 2),
            "mmacs": round(1e3 * cost[words], 2),
            **speed_cells(speeds[words], cost[dense] / cost[words]),
        }
        for (method, setting, words), accuracy in zip(rows, top1, strict=True)
    ]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return DeskTable(
        title="Seven methods without fine-tuning, at desk size (1,797 handwritten digits)",
        columns=COLUMNS,
        rows=lines,
        notes=(
            "vit_desk: 8 layers, width 64, 8x8 tokens of 32x32 images; trained once on 1,437 digits and evaluated on "
            "the 360 others. One image is 0.28 points.",
            f"Throughput on {device_name(device)}{threads}, float32, batch {BATCH[device.type]}, median of {ROUNDS} "
            "rounds in turns, on held-out digits. speedup: paired, over dense; flops_ratio: what the counted cost "
            "promises; realised: the first over the second. mmacs by the convention 'swag', in millions per image; of "
            "ATS and ACT it depends on the digits and is that of the batch timed.",
        ),
        plot={"x": "mmacs", "y": "top1_percent", "label": "setting", "series": "method"},
    )


def evaluate(words: str, weights: Path, device: torch.device, *, progress: bool) -> float:
    """Top-1 accuracy in percent of one network on the held-out digits."""
    flags = ["--dataset", "digits", "--weights", str(weights), "-j", "0", "-b", "180", "--device", str(device)]
    with quiet(not progress), contextlib.redirect_stdout(io.StringIO()):
        return imagenet_1k_eval.main([*words.split(), *flags])["top1_percent"]
