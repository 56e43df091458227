"""What every network of this repository promises: no image of a batch touches another."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def check_images_apart(network: Callable[[Tensor], Any], images: Tensor, *, atol: float = 1e-5) -> None:
    """Spoil a pixel of one image, then all of them, in any place of a batch of three: the other outputs stay.

    Random numbers of the network are the same in every call.
    """

    def run(batch: Tensor) -> list[Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(network(batch)) if isinstance(leaf, Tensor) and len(leaf) == 3]

    assert len(images) == 3
    expected = run(images)
    assert expected
    assert all(leaf.isfinite().all() for leaf in expected)
    for place in range(3):
        others = [index for index in range(3) if index != place]
        for value in BAD.values():
            for spoilt in (images[0, 0].numel() // 2, slice(None)):
                batch = images.clone()
                batch[place, 0].view(-1)[spoilt] = value
                for found, leaf in zip(run(batch), expected, strict=True):
                    torch.testing.assert_close(found[others], leaf[others], rtol=0, atol=atol)
