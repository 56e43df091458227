"""The differentiable cost against the multiply-accumulates that the physically compressed network really has."""

import pytest
import torch

from common.measure.flops import CONVENTIONS, count_operations
from uvc.cost_model import CostModel
from uvc.models.compact import CompactConfig, round_up
from uvc.pruning import group_scores, update_masks_
from uvc.removal import compress
from uvc.tests.random_structures import random_network

NETWORKS = {
    "desk": {"img_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 4},
    "wide": {"img_size": 24, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "distilled": True},
    "t2t": {"name": "t2t_vit_7", "img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "token_dim": 8},
}


TERMS = ("qkv", "scores", "values", "proj", "fc1", "fc2")


def block_macs(config: CompactConfig) -> list[dict[str, int]]:
    """The six products of each block in closed form, padding left out."""
    tokens, width = config.tokens, config.embed_dim
    rows = []
    for shape in config.blocks:
        keys, values = shape.heads * config.head_dim, shape.value_width
        neurons = shape.neurons * width * tokens
        rows.append({
            "qkv": (2 * keys + values) * width * tokens, "scores": keys * tokens**2, "values": values * tokens**2,
            "proj": values * width * tokens, "fc1": neurons, "fc2": neurons,
        })  # fmt: skip
    return rows


def padding_macs(config: CompactConfig) -> int:
    """What padding to multiples, and spreading values to d channels per head, adds, in closed form."""
    tokens, extra = config.tokens, 0
    for shape in config.blocks:
        padding = shape.held_values(config.head_dim) - shape.value_width
        padding += round_up(shape.neurons, shape.multiple) - shape.neurons
        spread = shape.heads * config.head_dim - shape.value_width
        extra += 2 * padding * config.embed_dim * tokens + spread * tokens**2
    return extra


@pytest.mark.parametrize("patch", ["off", "remove"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_term_of_the_cost_is_what_runs(kind, seed, patch):
    """Random s, r, gates and patches: R's terms are the compact network's, block by block, product by product.

    One term is charged more than there is, by the paper's rule: queries, keys and values count by whole heads, d K for
    the V value dimensions that are left. The difference is (d K - V) D T, exactly.
    """
    model, s, r = random_network(10 * seed + 1, **NETWORKS[kind], patch=patch)
    cost = CostModel(model)
    run = torch.tensor(model.runs(), dtype=torch.float64)
    gates = model.patch_gating if patch == "remove" else None
    scores = group_scores(model).heads
    embed, charged = cost.remaining(s, r, scores, run, gates)
    compressed = compress(model)
    network, config = compressed.network, compressed.network.config
    real = dict(zip(compressed.structure.running, block_macs(config), strict=True))
    total = 0
    for index, row in enumerate(charged.tolist()):
        if index not in real:
            assert row == [0] * 6
            continue
        shape, macs = config.blocks[compressed.structure.running.index(index)], dict(real[index])
        macs["qkv"] += (shape.heads * config.head_dim - shape.value_width) * config.embed_dim * config.tokens
        assert row == pytest.approx([macs[term] for term in TERMS], rel=1e-12)
        total += sum(real[index].values())
    counted = network.count()
    counts = counted.published
    if kind != "t2t":  # its counter has terms of its own for the embedding
        assert CONVENTIONS["uvc"].total(counts) - total == pytest.approx(embed.item(), rel=1e-12)
    size = config.image_size
    executed = count_operations(network, torch.zeros(1, 3, *size, dtype=torch.float64)).executed.macs
    assert executed == counts.macs + padding_macs(config)
    assert counted.executed.macs - counts.macs == padding_macs(config)
    ratio = cost.ratio(s, r, scores, run, gates).item()
    assert ratio == pytest.approx(cost.of_structure(compressed.structure), rel=1e-12)


@torch.no_grad()
def test_a_head_that_loses_every_dimension_is_charged_for_its_queries_and_keys() -> None:
    """Beyond the bounds of training: r says all d of a head that s keeps. Really nothing of the head is left."""
    model, s, r = random_network(3, **NETWORKS["desk"])
    s[:, 0], r[:, 1] = 0, model.head_dim
    update_masks_(model, s, r)
    cost, compressed = CostModel(model), compress(model)
    run = torch.tensor(model.runs(), dtype=torch.float64)
    charged = cost.ratio(s, r, group_scores(model).heads, run).item()
    lost = len(compressed.structure.running) * (3 * 8 * 32 * 17 + 8 * 17**2)  # its part of qkv and q k^T
    assert all(1 not in block.heads for block in compressed.structure.blocks)
    assert (charged - cost.of_structure(compressed.structure)) * float(cost.full) == pytest.approx(lost, rel=1e-9)
