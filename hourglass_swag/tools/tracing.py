"""What a method did to the patches of one picture, recorded by hooks that exist during one forward pass only.

The networks know nothing of this module and cost the same without it. All functions take one picture, (1, 3, S, S), on
the network's device, and layers count from 0, as in the flags.

Letters: N tokens, P patches, K groups, h heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hourglass_swag.models.act_vision_transformer import ActVisionTransformer
from hourglass_swag.models.ats_vision_transformer import ATSBlock, ATSVisionTransformer
from hourglass_swag.models.evit import EViT, TokenSelection
from hourglass_swag.models.evo_vit import EvoEncoderBlock, EvoViT, count_processed
from hourglass_swag.models.hourglass_vit import HourglassViT
from hourglass_swag.models.ops.tome.tome.patch.common import ToMeModel
from hourglass_swag.models.smyrf_vision_transformer import SmyrfVisionTransformer
from hourglass_swag.models.vision_transformer import VisionTransformer

KEPT, DROPPED, GONE = 0, 1, 2
"""States of a patch in a ``Selection``: goes on, is dropped in this layer, was dropped in an earlier one."""

NO_PATCH = -1  # where a token comes from that is no patch: fused or padding


class NothingToShowError(ValueError):
    """The network leaves its tokens alone; the message says why, and which flags would change it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"nothing to show: {reason}")


@dataclass(frozen=True)
class Grouping:
    """Patches that share a token.

    Attributes:
        layer: index of the layer.
        caption: token counts in words.
        labels: group of each patch, (P,) int64, from 0.
    """

    layer: int
    caption: str
    labels: Tensor


@dataclass(frozen=True)
class Selection:
    """Patches that go on and those that do not.

    Attributes:
        layer: index of the layer.
        caption: token counts in words.
        states: ``KEPT``, ``DROPPED`` or ``GONE`` for each patch, (P,) int64.
    """

    layer: int
    caption: str
    states: Tensor


Stage = Grouping | Selection


def trace(model: nn.Module, image: Tensor, *, head: int = 0) -> list[Stage]:
    """Run ``model`` on one picture and tell what each of its layers did to the patches.

    Args:
        model: a network of the registry, in evaluation mode.
        image: (1, 3, S, S).
        head: the attention head whose groups are told, for ACT.

    Returns:
        One stage for each layer that merges, clusters or drops, in order; at least one.

    Raises:
        NothingToShowError: for a network, or flags, with which no layer does.
        ValueError: if there is no such head.
    """
    if not isinstance(model, VisionTransformer):
        raise NothingToShowError(f"{type(model).__name__} is a convolutional network, without tokens to merge or drop")
    with torch.inference_mode():
        if isinstance(model, ToMeModel):
            return _expect(trace_merging(model, image), "merges no tokens: give a --tome_r above 0")
        if isinstance(model, HourglassViT):
            return _expect(trace_clustering(model, image), "clusters nothing: give a layer (-l) and a number (-n)")
        if isinstance(model, EViT):
            return _expect(trace_dropping(model, image), "drops no tokens: give a --base_keep_rate below 1, --drop_loc")
        if isinstance(model, ATSVisionTransformer):
            return _expect(trace_sampling(model, image), "samples nowhere: give layers (--ats_blocks_indexes)")
        if isinstance(model, EvoViT):
            return _expect(trace_evolution(model, image), "keeps all tokens: give an --evo_prune_ratio below 1")
        if isinstance(model, ActVisionTransformer):
            return _expect(trace_query_groups(model, image, head), "clusters nothing: give --act_group_q True")
    if isinstance(model, SmyrfVisionTransformer):
        raise NothingToShowError(
            "SMYRF keeps every token by itself: its clusters, others in each of its hash rounds, limit who attends to "
            "whom and merge nothing"
        )
    raise NothingToShowError("this is a dense network, whose tokens go through all layers unchanged")


def _expect(stages: Sequence[Stage], otherwise: str) -> list[Stage]:
    if not stages:
        raise NothingToShowError(f"with these flags the network {otherwise}")
    return list(stages)


def trace_merging(model: VisionTransformer, image: Tensor) -> list[Grouping]:
    """ToMe: the groups behind every layer that merges, from the source tracing of the package ``tome``."""
    info = cast(Any, model)._tome_info
    stages: list[Grouping] = []

    def record(layer: int, inputs: tuple[Any, ...], output: Tensor) -> None:
        before, after = inputs[0].shape[1], output.shape[1]
        if after < before:
            labels = info["source"][0, :, model.num_class_tokens :].argmax(0)
            stages.append(Grouping(layer, f"{before} to {after} tokens", labels.cpu()))

    traced, info["trace_source"] = info["trace_source"], True
    try:
        _run(model, image, [layer.register_forward_hook(_at(i, record)) for i, layer in _layers(model)])
    finally:
        info["trace_source"] = traced
    return stages


def trace_clustering(model: HourglassViT, image: Tensor) -> list[Grouping]:
    """Hourglass: the hard labels of the clustering."""
    stages: list[Grouping] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, None]) -> None:
        _, labels = module.forward(inputs[0], return_labels=True)  # the network asks for none
        patches, clusters = labels.shape[1], output[0].shape[1]
        caption = f"{patches} patches to {clusters} clusters, {'after' if model.cluster_after_output else 'before'} it"
        stages.append(Grouping(model.clustering_location, caption, labels[0].cpu()))

    _run(model, image, [model.token_clustering_layer.register_forward_hook(record)])
    return stages


def trace_dropping(model: EViT, image: Tensor) -> list[Selection]:
    """EViT: which patches every dropping layer keeps. A fused token stands for none."""
    origin, stages = _origin(model), []

    def record(layer: int, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        nonlocal origin
        x, kept = output
        before, origin = origin, origin[kept[0].cpu()]
        fused = x.shape[1] - len(origin)
        origin = torch.cat([origin, origin.new_full((fused,), NO_PATCH)])
        caption = f"{len(before)} to {len(origin)} tokens" + (", 1 of them fused" if fused else "")
        stages.append(Selection(layer, caption, _states(model, before, origin)))

    modules = [(i, cast(Any, layer).selection) for i, layer in _layers(model)]
    assert all(isinstance(module, TokenSelection) for _, module in modules)
    _run(model, image, [module.register_forward_hook(_at(i, record)) for i, module in modules])
    return stages


def trace_sampling(model: ATSVisionTransformer, image: Tensor) -> list[Selection]:
    """ATS: which patches every sampling layer picks; padding stands for none."""
    origin, stages = _origin(model), []

    def watch(layer: int, block: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
        sample = block.sample

        def recording(*operands: Any) -> tuple[Tensor, Tensor | None]:
            nonlocal origin
            positions, policy = sample(*operands)
            before, origin = origin, origin[positions[0].cpu()]
            if policy is not None:
                origin = origin.where(policy[0, :, 0].cpu() > 0, NO_PATCH)
            caption = f"{_present(before)} to {_present(origin)} tokens"
            stages.append(Selection(layer, caption, _states(model, before, origin)))
            return positions, policy

        return recording

    blocks = [(i, block) for i, block in _layers(model) if isinstance(block, ATSBlock)]
    for layer, block in blocks:
        block.sample = watch(layer, block)
    try:
        model(image)
    finally:
        for _, block in blocks:
            del block.sample  # the method of the class again
    return stages


def trace_evolution(model: EvoViT, image: Tensor) -> list[Selection]:
    """Evo-ViT: which patches go through every pruned layer. The others skip it and may come back in a later one."""
    origin, stages = _origin(model), []

    def record(layer: int, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        nonlocal origin
        order = inputs[1].sort(dim=1, descending=True).indices[0].cpu() + 1  # as the layer itself sorts
        origin = origin[torch.cat([order.new_zeros(1), order])]
        number = 1 + count_processed(len(order), cast(Any, model.encoder.layers[layer]).prune_ratio)
        caption = f"{number} of {len(origin)} tokens go through"
        stages.append(Selection(layer, caption, _states(model, origin, origin[:number])))

    layers = [(i, cast(EvoEncoderBlock, layer)) for i, layer in _layers(model)]
    _run(model, image, [b.register_forward_hook(_at(i, record)) for i, b in layers if b.prune_ratio != 1])
    return stages


def trace_query_groups(model: ActVisionTransformer, image: Tensor, head: int) -> list[Grouping]:
    """ACT: the groups of queries of one head (of keys, where only these are clustered) in every layer that has them.

    Raises:
        ValueError: if there is no such head.
    """
    if not 0 <= head < model.num_heads:
        raise ValueError(f"--head must be 0 to {model.num_heads - 1}, got {head}")
    stages: list[Grouping] = []
    attentions = [(i, getattr(cast(Any, layer).self_attention, "attention", None)) for i, layer in _layers(model)]
    clustered = [(i, module) for i, module in attentions if module is not None and (module.group_Q or module.group_K)]

    def watch(layer: int, module: Any) -> Callable[[Tensor, int], Tensor]:
        hash_codes, side = module.hash, "queries" if module.group_Q else "keys"

        def recording(vectors: Tensor, n_hashes: int) -> Tensor:
            codes = hash_codes(vectors, n_hashes)
            if not stages or stages[-1].layer != layer:  # queries come first
                labels = codes.flatten(0, -2)[head].unique(return_inverse=True)[1].cpu()
                caption = f"head {head}: {len(labels)} {side} in {int(labels.max()) + 1} groups"
                stages.append(Grouping(layer, caption, labels[model.num_class_tokens :]))
            return codes

        return recording

    for layer, module in clustered:
        module.hash = watch(layer, module)
    try:
        model(image)
    finally:
        for _, module in clustered:
            del module.hash  # the method of the class again
    return stages


def _layers(model: VisionTransformer) -> Iterator[tuple[int, nn.Module]]:
    return enumerate(model.encoder.layers)


def _at(layer: int, record: Callable[[int, tuple[Any, ...], Any], None]) -> Callable[..., None]:
    """A forward hook that knows its layer."""
    return lambda _, inputs, output: record(layer, inputs, output)


def _run(model: nn.Module, image: Tensor, handles: Sequence[RemovableHandle]) -> None:
    """One pass with hooks, which are gone afterwards."""
    with _removing(handles):
        model(image)


@contextmanager
def _removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _origin(model: VisionTransformer) -> Tensor:
    """Position in the input of each token that enters the first layer, (N,)."""
    return torch.arange(model.seq_length)


def _present(origin: Tensor) -> int:
    return int((origin != NO_PATCH).sum())


def _states(model: VisionTransformer, before: Tensor, after: Tensor) -> Tensor:
    """State of each patch, (P,), from the origins of the tokens before and after a layer."""
    states = torch.full((model.seq_length,), GONE)
    states[before[before != NO_PATCH]] = DROPPED
    states[after[after != NO_PATCH]] = KEPT
    return states[model.num_class_tokens :]
