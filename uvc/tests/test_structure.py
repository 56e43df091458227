"""The description of what survives."""

import json
from dataclasses import asdict

import pytest
import torch

from uvc.models import create
from uvc.models.gates import register_masks
from uvc.structure import Structure


@pytest.fixture
def model():
    model = register_masks(create("deit_desk", depth=2))
    with torch.no_grad():
        model.blocks[0].attn.proj.mask[:, :16] = 0  # the whole first head
        model.blocks[0].attn.proj.mask[:, 17] = 0  # dimension 1 of the second
        model.blocks[1].mlp.fc2.mask[:, 5] = 0
        model.blocks[1].mlp.fc1.mask[5] = 0
        model.blocks[1].mlp.fc1.mask[7] = 0  # a stale zero
        model.block_skip_gating[1] = torch.tensor([0.25, 0.25])  # not strictly larger: skipped
    return model


def test_what_survives(model):
    structure = Structure.from_model(model)
    first, second = structure.blocks
    assert structure.running == (0,)
    assert first.heads == (1, 2, 3)
    assert first.dims[0] == (0, *range(2, 16))
    assert first.num_values == 47
    assert first.value_channels(16)[:3] == (16, 18, 19)
    assert first.neurons == tuple(range(256))
    assert second.heads == (0, 1, 2, 3)
    assert 5 not in second.neurons
    assert 5 not in second.constant_neurons
    assert second.constant_neurons == (7,)
    assert len(second.neurons) == 254
    assert structure.patches is None


def test_removed_patches_and_json(model):
    model.add_patch_gates()
    with torch.no_grad():
        model.patch_gating[0, :60] = -1
    structure = Structure.from_model(model, remove_patches=True)
    assert structure.patches == (60, 61, 62, 63)
    assert Structure.from_dict(json.loads(json.dumps(asdict(structure)))) == structure
    assert Structure.from_model(model).patches is None


def test_networks_without_masks_and_what_is_no_structure(model):
    structure = Structure.from_model(create("deit_desk", depth=2))
    assert structure.running == (0, 1)
    assert all(len(block.neurons) == 256 and block.num_values == 64 for block in structure.blocks)
    with pytest.raises(ValueError, match="no patch_gating"):
        Structure.from_model(model, remove_patches=True)
    with pytest.raises(ValueError, match="no structure of a compressed network"):
        Structure.from_dict({"blocks": [{"runs": True}]})
