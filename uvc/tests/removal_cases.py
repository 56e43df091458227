"""Runner of the vectors of physical removal."""

import torch
from torch import Tensor

from common.tests.reference import Case, Checks
from uvc.models.gates import GatedTransformer, register_masks
from uvc.pruning import blocks_of, update_masks_
from uvc.removal import compress
from uvc.tests.model_cases import build_model, images_of
from uvc.tests.optimizer_cases import compare, stated_numbers


@torch.no_grad()
def set_masks(model: GatedTransformer, s: Tensor, r: Tensor, *, stale: bool) -> None:
    """Masks of s and r; ``stale`` leaves zeros in fc1 from a time when the columns stood the other way round."""
    register_masks(model)
    if stale:
        for turn in range(2):
            for block in blocks_of(model):
                block.mlp.fc2.weight.copy_(block.mlp.fc2.weight.flip(1))
            if turn == 0:
                update_masks_(model, s, r)
    update_masks_(model, s, r, keep_stale=True)


def run_compress(case: Case, checks: Checks) -> None:
    """Masks, sizes of what is left, and logits of the reduced network."""
    model = build_model(case)
    set_masks(model, *stated_numbers(case, model), stale=bool(case.raw.get("stale")))
    blocks = blocks_of(model)
    proj = torch.stack([block.attn.proj.get_buffer("mask")[0] for block in blocks])
    fc1 = torch.stack([block.mlp.fc1.get_buffer("mask")[:, 0] for block in blocks])
    fc2 = torch.stack([block.mlp.fc2.get_buffer("mask")[0] for block in blocks])
    compressed = compress(model)
    sizes = [
        [len(kept.heads), kept.num_values, len(kept.neurons) + len(kept.constant_neurons)]
        for kept in compressed.structure.blocks
    ]
    dims = torch.cat([torch.tensor(sizes), fc1.sum(1, keepdim=True)], dim=1)
    with torch.no_grad():
        logits = compressed.network(images_of(case))
    compare(case, checks, {"logits": logits, "dims": dims, "proj_mask": proj, "fc1_mask": fc1, "fc2_mask": fc2})
