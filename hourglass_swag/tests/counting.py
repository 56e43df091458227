"""What tests ask of costs beyond the one counter: tokens of every layer, and ACT with numbers of clusters given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.measure.flops import Counted, OpCounts, count_operations
from hourglass_swag.models.ops.ACT.ada_clustering_attention import AdaClusteringAttention


def blank(model: Any, batch: int = 1) -> Tensor:
    """Images of the model's size without content."""
    dtype = next(model.parameters()).dtype
    return torch.empty(batch, 3, model.image_size, model.image_size, device="meta", dtype=dtype)


def published_ops(model: nn.Module) -> OpCounts:
    """What the paper's tool counts for one image, where that does not depend on it."""
    return count_operations(model, blank(model)).published


def tokens_per_layer(model: Any, images: Tensor | None = None) -> list[int]:
    """Tokens that enter each layer and, last, those that reach the final norm, which sees them batch first."""
    entering: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, dim=dim: entering.append(args[0].shape[dim]))
        for dim, modules in enumerate((model.encoder.layers, [model.encoder.ln]))
        for module in modules
    ]
    count_operations(model, blank(model) if images is None else images)
    for handle in handles:
        handle.remove()
    return entering


def count_with_clusters(model: Any, clusters: Sequence[int]) -> Counted:
    """Costs of ACT for numbers of clusters, in the order of ``model.clusters()``; the model is changed."""
    given = iter(clusters)
    for attention in (module for module in model.modules() if isinstance(module, AdaClusteringAttention)):
        sides = [(name, next(given)) for name in ("Q", "K") if getattr(attention, f"group_{name}")]

        def forward(q: Tensor, *_: Any, attention: Any = attention, sides: Any = sides) -> Tensor:
            for name, number in sides:
                setattr(attention, f"{name}_clusters", number)
            return torch.empty_like(q)

        attention.forward = forward
    assert not list(given)
    return count_operations(model, blank(model))
