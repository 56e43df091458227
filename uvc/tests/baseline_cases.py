"""Runners of the vectors of the pruning baselines."""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.tests import reference
from common.tests.reference import Case, Checks, NotCovered
from uvc import baseline_scores as scoring
from uvc.models.deit import GatedDeiT
from uvc.models.gates import GatedTransformer, apply_masks_, register_masks
from uvc.pruning import blocks_of
from uvc.tests.model_cases import NUMBER, images_of, replay, set_gates
from uvc.tests.optimizer_cases import compare
from uvc.tests.token_selection import EachLayerSelectingDeiT, TokenSelectingDeiT

_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "mlp_ratio", "qkv_bias")


def build(case: Case, make: Any = GatedDeiT) -> GatedTransformer:
    """The network of a case with masks of ones, every block running."""
    options = {key: value for key, value in case.build.items() if key in _SIZES}
    if isinstance(options.get("img_size"), list):
        options["img_size"] = tuple(options["img_size"])
    if found := re.search(rf"eps=({NUMBER})", str(case.build.get("norm_layer", ""))):
        options["norm_eps"] = float(found[1])
    model = reference.build(make, case.seed, **options)
    assert isinstance(model, GatedTransformer)
    set_gates(model, None)
    return register_masks(model)  # pyright: ignore[reportReturnType]


def run_scores(case: Case, checks: Checks) -> None:
    """Magnitude, SynFlow or Taylor: scores, masks of a density, logits of the masked network."""
    model = build(case).train()
    if case.name.startswith("bp_magnitude"):
        scores = scoring.magnitude_scores(model)
    elif case.name.startswith("bp_synflow"):
        scores = scoring.synflow_scores(model)
    else:
        scores = scoring.taylor_scores(model, taylor_batches(case, model.num_classes))
    masks = scoring.masks_of(scores, float(case.raw["density"]), scope="local" if "local" in case.name else "global")
    if "order" in case.raw:
        checks.equal("order", [f"{name}.weight_mask" for name in masks], case.raw["order"])
    scoring.set_masks_(model, masks)
    apply_masks_(model)
    values: dict[str, Any] = {
        "kept": np.array([int(mask.sum()) for mask in masks.values()]),
        "score_sums": torch.stack([values.sum() for values in scores.values()]),
    }
    values |= {f"bits:{name}.weight_mask": np.packbits(mask.numpy().ravel()) for name, mask in masks.items()}
    if "logits" in case.outputs:
        with torch.no_grad():
            values["logits"] = model.eval()(images_of(case))
    compare(case, checks, values)


def taylor_batches(case: Case, classes: int) -> list[tuple[Tensor, Tensor]]:
    """The batches that the text describes: images of seed + i, labels i, i + 1 and so on modulo the classes."""
    what = str(case.raw.get("what", ""))
    found, images = re.search(r"summed over (\d+) batches", what), re.search(r"fill\.image\((\d+),", what)
    number, count, size = int(found[1]) if found else 3, int(images[1]) if images else 2, case.build["img_size"]
    return [
        (reference.image(count, size, case.seed + i), torch.tensor([(i + j) % classes for j in range(count)]))
        for i in range(number)
    ]


def run_structured(case: Case, checks: Checks) -> None:
    """Scores of heads and neurons from one batch, their masks, logits of the masked network."""
    model = build(case).train()
    found = re.search(r"labels \(([\d, ]+)\)", str(case.raw.get("what", "")))
    labels = torch.tensor([int(text) for text in found[1].split(",")] if found else [1, 3])
    heads, neurons, loss = scoring.structured_scores(model, images_of(case), labels)
    kept = scoring.best(heads, case.raw["atten_density"]), scoring.best(neurons, case.raw["mlp_density"])
    scoring.set_structured_masks_(model, *kept)
    blocks = blocks_of(model)
    rows = {
        "qkv_rows": torch.stack([block.attn.qkv.get_buffer("mask")[:, 0] for block in blocks]),
        "fc1_rows": torch.stack([block.mlp.fc1.get_buffer("mask")[:, 0] for block in blocks]),
    }
    apply_masks_(model)
    with torch.no_grad():
        logits = model.eval()(images_of(case))
    compare(case, checks, {"loss": loss, "head_scores": heads, "neuron_scores": neurons, "logits": logits, **rows})


def run_gmp_schedule(case: Case, checks: Checks) -> None:
    """Sparsity at each event."""
    made = case.build
    found = re.search(rf"final sparsity ({NUMBER})", str(case.raw.get("what", "")))
    if not found:
        raise NotCovered("a text that does not state the final sparsity")
    start, interval, times = made["t_start"], made["delta_t"], made["pruning_times"]
    compare(case, checks, {"sparsity": np.array([
        scoring.gmp_sparsity(start + k * interval, start=start, interval=interval, times=times, final=float(found[1]))
        for k in range(1, times + 1)
    ])})  # fmt: skip


def run_token_selection(case: Case, checks: Checks) -> None:
    """A network that selects tokens before its blocks, or in every attention too, with and without doing so."""
    each_layer = "_data" in str(case.build.get("factory"))
    model = build(case, EachLayerSelectingDeiT if each_layer else TokenSelectingDeiT)
    with torch.no_grad(), replay(int(case.raw["noise_seed"])):
        images = images_of(case)
        values = {"logits": model(images), "logits_selected": model(images, case.raw["tau"], case.raw["number"])}
    compare(case, checks, values)
