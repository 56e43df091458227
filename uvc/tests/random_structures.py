"""Small networks whose masks and gates switch off a random part, for the tests of removal."""

from typing import Any

import torch

from common.tests.reference import fill_
from uvc.models import create
from uvc.models.gates import GatedTransformer, register_masks
from uvc.pruning import blocks_of, update_masks_


def random_numbers(model: GatedTransformer, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """s and r within the bounds that training keeps: at least one head, neuron and dimension of a head stays."""
    depth, heads = len(model.blocks), model.num_heads
    bounds = torch.tensor([heads - 1, model.hidden_dim - 1], dtype=torch.float64)
    s = bounds * torch.rand(depth, 2, generator=generator, dtype=torch.float64)
    r = (model.head_dim - 1) * torch.rand(depth, heads, generator=generator, dtype=torch.float64)
    return s, r.where(torch.rand(depth, heads, generator=generator) < 0.7, torch.zeros(()).double())


@torch.no_grad()
def random_network(
    seed: int, name: str = "deit_desk", *, patch: str = "off", **options: Any
) -> tuple[GatedTransformer, torch.Tensor, torch.Tensor]:
    """A filled float64 network in evaluation mode with masks, gates and patch gates at random; also its s and r."""
    generator = torch.Generator().manual_seed(seed)
    model = create(name, **options).double().eval()
    if patch != "off":
        model.add_patch_gates()
    fill_(model, seed)
    register_masks(model)
    s, r = random_numbers(model, generator)
    update_masks_(model, s, r)
    depth = len(model.blocks)
    model.block_skip_gating.copy_(torch.randn(depth, 2, generator=generator) + torch.tensor([-0.7, 0.7]))
    model.block_skip_gating[0] = torch.tensor([-1.0, 1.0])
    if model.patch_gating is not None:
        model.patch_gating.copy_(torch.randn(model.patch_gating.shape, generator=generator))
        model.gates.patch = patch  # pyright: ignore[reportAttributeAccessIssue]
    return model, s, r


@torch.no_grad()
def make_stale_(model: GatedTransformer, seed: int) -> None:
    """Mask a quarter of fc1's rows besides, whatever fc2 keeps."""
    generator = torch.Generator().manual_seed(seed)
    for block in blocks_of(model):
        rows = torch.rand(model.hidden_dim, generator=generator) < 0.25
        block.mlp.fc1.get_buffer("mask")[rows] = 0
