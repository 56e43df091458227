"""What the ledger asks of this paper: costs and parameters of a published row, and accuracy."""

import re
import shlex
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.ledger.speeds import speeds_for_ledger
from common.ledger.tables import Measured, NeedsCompute, Row
from common.ledger.weights import find_weights
from common.measure.flops import count_operations, count_parameters
from uvc.cost_model import CostModel
from uvc.models import create
from uvc.models.compact import CompactViT
from uvc.models.gates import GatedTransformer
from uvc.removal import config_of
from uvc.structure import BlockStructure, Structure

PAPER_GMACS = 4.6
"""DeiT-Small's cost as the paper's README rounds it: its GMACs are the remaining share times this."""


UNKNOWN = "the structure that a training run finds, which no published file tells"


def model_of(row: Row) -> tuple[str, GatedTransformer]:
    """Name and network of a row, on the meta device: nothing is computed.

    Raises:
        ValueError: the row's arguments name no network.
    """
    words = shlex.split(row.arguments)
    if "--model_type" in words:
        name = words[words.index("--model_type") + 1]
    elif row.checkpoint is not None:
        name = row.checkpoint.name
    else:
        raise ValueError(f"{row.key}: its arguments have no --model_type and it has no checkpoint")
    with torch.device("meta"):
        return name, create(name)


def plain_macs(model: GatedTransformer) -> int:
    """Multiply-accumulates that the dense network executes for one image, its head included."""
    model.fix_blocks([True] * len(model.blocks))
    return count_operations(model, torch.empty(1, 3, *model.image_size, device="meta")).executed.macs


def build(row: Row) -> tuple[nn.Module, int]:
    """The compact network of a row and its resolution: all blocks, or as many as the published log says, unpruned.

    Raises:
        NeedsCompute: the row is of a trained compressed network, whose structure no published file tells.
    """
    name, model = model_of(row)
    if row.table not in ("models", "log_blocks"):
        raise NeedsCompute("", UNKNOWN)
    heads, number = model.num_heads, int(row.variables.get("blocks", len(model.blocks)))
    dims = (tuple(range(model.head_dim)),) * heads
    block = BlockStructure(True, tuple(range(heads)), dims, tuple(range(model.hidden_dim)))
    sizes = model.embed_dim, heads, model.hidden_dim, model.num_patches, model.num_prefix_tokens
    network = CompactViT(config_of(model, Structure(*sizes, blocks=(block,) * number), name=name))
    return network, model.image_size[0]


speeds = partial(speeds_for_ledger, build=build)
"""Speed of rows against the dense network, in turns; random weights."""


def costs(row: Row) -> dict[str, Measured]:
    """Parameters and cost by the paper's rules, counted from shapes.

    Raises:
        NeedsCompute: the row is of a trained compressed network, whose structure no published file tells.
    """
    name, model = model_of(row)
    cost = CostModel(model, device=torch.device("cpu"), dtype=torch.float64)
    full = float(cost.full)
    source = f"CostModel of {name}, one image"
    found = {
        "params_m": Measured(count_parameters(model) / 1e6, "all parameters", f"parameters of {name} with gates"),
        "double_mmacs": Measured(2 * full / 1e6, "uvc, two per multiply-accumulate", source),
    }
    if blocks := row.variables.get("blocks"):
        depth, heads = len(model.blocks), model.num_heads
        run = torch.zeros(depth, dtype=torch.float64)
        run[: int(blocks)] = 1
        nothing = torch.zeros(depth, 2, dtype=torch.float64), torch.zeros(depth, heads, dtype=torch.float64)
        share = float(cost.ratio(*nothing, torch.ones(depth, heads), run))
        found["remaining_percent"] = Measured(
            100 * share, "uvc, share of the dense model", f"{source}, {blocks} blocks"
        )
        return found
    if row.setting == "dense" or row.table == "models":
        found["remaining_percent"] = Measured(100.0, "uvc, share of the dense model", "the dense network itself")
        found["gmacs"] = Measured(full / 1e9, "uvc", source)
        if not name.startswith("t2t"):  # whose embedding the paper counts by rules of its own
            found["macs_g"] = Measured(plain_macs(model) / 1e9, "macs", "operations of the plain network as executed")
        return found
    if "gmacs" in row.published and "remaining_percent" in row.published:
        share = float(row.published["remaining_percent"]) / 100
        found["gmacs"] = Measured(
            share * PAPER_GMACS, "uvc",
            f"the published share times {PAPER_GMACS} GMACs, as the paper has it; times the counted {full / 1e9:.4f} "
            f"GMACs it is {share * full / 1e9:.4f}",
        )  # fmt: skip
        return found
    raise NeedsCompute("", UNKNOWN)


def accuracy(
    row: Row, *, data: Path, weights: Path | None, device: torch.device | str, progress: bool
) -> dict[str, Measured]:
    """Top-1 of a dense row on ImageNet, through stage 2's own evaluation.

    Raises:
        NeedsWeights: the checkpoint is not there.
        NeedsCompute: a compressed row, whose weights are not published.
    """
    from uvc import post_train

    if row.setting != "dense" or row.checkpoint is None:
        raise NeedsCompute("", "the weights of compressed networks are not published: run both stages")
    name, _ = model_of(row)
    file = find_weights([re.sub(r".*/", "", row.checkpoint.url)], weights)
    words = ["--eval", "--model_type", name, "--checkpoint_dir", str(file), "--data_dir", str(data)]
    result = post_train.main([*words, "--device", str(device), "--output_dir", ""])
    convention = f"{result.get('images', 'all')} images, {file.name}, float32"
    return {"top1_percent": Measured(result["top1_percent"], convention, f"post_train.py --eval of {name}")}
