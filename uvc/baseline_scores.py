"""Scores and masks of the pruning baselines that UVC is compared with: magnitude, Taylor, SynFlow, heads and neurons.

Rules of the release's baseline folder. An unstructured method scores every weight of the convolutions and linear layers
(biases, normalisation, tokens and positions stay) and removes the lowest scores under one threshold for all layers, or
one for each. The structured one keeps the best heads of each block and the best neurons.

L blocks, H heads, d channels of a head, D width, M hidden neurons, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uvc.models.gates import GatedTransformer
from uvc.pruning import blocks_of

Scope = Literal["global", "local"]


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> convolution or linear layer that takes part in every forward pass, in the order of the state dict."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.endswith("gumbel")
    }


def magnitude_scores(model: nn.Module) -> dict[str, Tensor]:
    """|w| of every prunable weight, by layer."""
    return {name: layer.get_parameter("weight").detach().abs() for name, layer in prunable(model).items()}


def taylor_scores(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """|g w| with g the sum over batches of the gradient of the mean cross-entropy.

    Args:
        model: in the mode that the forward passes shall have; the release takes training mode. Its gradients are reset.
        batches: images (B, 3, height, width) and labels (B,), on the model's device.
    """
    model.zero_grad(set_to_none=True)
    for images, labels in batches:
        F.cross_entropy(logits_of(model, images), labels).backward()
    weights = {name: layer.get_parameter("weight") for name, layer in prunable(model).items()}
    scores = {name: (gradient(weight) * weight).detach().abs() for name, weight in weights.items()}
    model.zero_grad(set_to_none=True)
    return scores


def synflow_scores(model: GatedTransformer) -> dict[str, Tensor]:
    """|g w| where all weights, biases, tokens and positions are replaced by their absolute values.

    g is the gradient of the sum of the logits of an image of ones; no data are needed. The model is left as it is.
    """
    absolute = {
        name: value.detach() if name.endswith("gating") else value.detach().abs().requires_grad_()
        for name, value in model.named_parameters()
    }
    like = next(model.parameters())
    ones = torch.ones(1, 3, *model.image_size, dtype=like.dtype, device=like.device)

    def passed(images: Tensor) -> Any:
        return torch.func.functional_call(model, absolute, images)

    logits_of(passed, ones).sum().backward()
    weights = {name: absolute[f"{name}.weight"] for name in prunable(model)}
    return {name: (gradient(weight) * weight).detach().abs() for name, weight in weights.items()}


def logits_of(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Class logits in either mode; the mean of two heads, so that each of them is scored."""
    output = model(images)
    return (output[0] + output[1]) / 2 if isinstance(output, tuple) else output


def gradient(weight: Tensor) -> Tensor:
    """Of a leaf, zeros where nothing reached it."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def masks_of(scores: Mapping[str, Tensor], density: float, *, scope: Scope = "global") -> dict[str, Tensor]:
    """Ones where a score is above the threshold under which int((1 - density) n) scores lie; ties go, too.

    Args:
        scores: by layer.
        density: share to keep, 0 to 1.
        scope: ``global``, one threshold for all layers, or ``local``, one for each.

    Raises:
        ValueError: an impossible density or scope.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"the density is the share of weights kept, 0 to 1, got {density}")
    if scope not in ("global", "local"):
        raise ValueError(f"the scope is global or local, got {scope!r}")
    together = torch.cat([values.flatten() for values in scores.values()]) if scope == "global" else None
    return {
        name: values > _threshold(values.flatten() if together is None else together, density)
        for name, values in scores.items()
    }


def _threshold(values: Tensor, density: float) -> Tensor:
    """The int((1 - density) n)-th smallest value; below all where nothing is to go."""
    count = int((1 - density) * values.numel())
    if count < 1:
        return values.new_tensor(float("-inf"))
    return values.kthvalue(count).values


@torch.no_grad()
def set_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Copy masks by layer into the model's ``mask`` buffers."""
    for name, mask in masks.items():
        model.get_buffer(f"{name}.mask").copy_(mask)


def density_of(model: nn.Module) -> float:
    """Share of the prunable weights that the masks keep. Waits for the device."""
    masks = [module.get_buffer("mask") for module in prunable(model).values()]
    return sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def gmp_sparsity(step: int, *, start: int, interval: int, times: int, final: float) -> float:
    """Share of weights that gradual magnitude pruning has removed after an event at ``step``.

    final (1 - (1 - (t - t0) / (n delta))^3); it stays at ``final`` after the n-th event.

    Source: Gradual magnitude pruning, arXiv:1710.01878, Eq. 1: s_f (1 - (1 - (t - t0) / (n dt))^3), from sparsity 0.
    """
    done = min((step - start) / (times * interval), 1.0)
    return final * (1 - (1 - done) ** 3)


# Structured


def structured_scores(model: GatedTransformer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Importance of heads (L, H) and neurons (L, M) from the gradients of one batch, and its loss.

    Heads: mean over the batch of |sum over tokens and channels of gradient times value| of the attention's output
    before its projection. Neurons: L1 norm of the gradient of fc1's row plus that of fc2's column.
    """
    model.zero_grad(set_to_none=True)
    blocks, outputs = blocks_of(model), []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        outputs.append(args[0])

    handles = [block.attn.proj.register_forward_pre_hook(keep) for block in blocks]
    try:
        loss = F.cross_entropy(logits_of(model, images), labels)
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != len(blocks):
        raise ValueError("every block must run to be scored: set the gates so that none is skipped")
    products = torch.stack([gradient(output) * output.detach() for output in outputs])  # (L, B, T, D)
    heads = products.unflatten(-1, (model.num_heads, model.head_dim)).sum(dim=(2, 4)).abs().mean(1)
    neurons = torch.stack(
        [gradient(b.mlp.fc1.weight).abs().sum(1) + gradient(b.mlp.fc2.weight).abs().sum(0) for b in blocks]
    )
    model.zero_grad(set_to_none=True)
    return heads, neurons, loss.detach()


def best(scores: Tensor, density: float) -> Tensor:
    """True for the int(density n) highest scores of the last dimension, (..., n)."""
    count = int(density * scores.shape[-1])
    chosen = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


@torch.no_grad()
def set_structured_masks_(model: GatedTransformer, heads: Tensor, neurons: Tensor) -> None:
    """Mask the rows of q, k and v of heads that go, and the rows of fc1 and columns of fc2 of neurons that go.

    As in the release ``attn.proj`` keeps its columns: such a head gives the constant of its value bias. Physical
    removal folds that away.

    Args:
        heads, neurons: what stays, booleans (L, H) and (L, M).
    """
    for block, head, neuron in zip(blocks_of(model), heads, neurons, strict=True):
        rows = head.repeat_interleave(model.head_dim).repeat(3)  # (3 D,)
        block.attn.qkv.get_buffer("mask").copy_(rows[:, None].expand_as(block.attn.qkv.weight))
        block.mlp.fc1.get_buffer("mask").copy_(neuron[:, None].expand_as(block.mlp.fc1.weight))
        block.mlp.fc2.get_buffer("mask").copy_(neuron[None].expand_as(block.mlp.fc2.weight))
