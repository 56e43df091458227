"""What a method did to the patches of one image, recorded by hooks that exist during one forward pass only.

The networks know nothing of this module and cost the same without it. All functions take one image, (1, 3, S, S), on
the network's device, and layers count from 0, as in the flags.

Letters: N tokens, P patches, K groups, h heads.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.hosts import Lean, Tokens
from common.hosts.runner import Step
from hourglass_swag.models.act_vision_transformer import ACT
from hourglass_swag.models.ats_vision_transformer import ATS
from hourglass_swag.models.evit import EViT
from hourglass_swag.models.evo_vit import EvoViT, count_processed
from hourglass_swag.models.hourglass_vit import Hourglass
from hourglass_swag.models.ops.cluster import TokenClusteringBlock
from hourglass_swag.models.smyrf_vision_transformer import SMYRF
from hourglass_swag.models.tome_vit import ToMe
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
    """Run ``model`` on one image and tell what each of its layers did to the patches.

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
    method = next(iter(model.methods), None) if isinstance(model, Lean) else None
    with torch.inference_mode():
        if isinstance(method, ToMe):
            return _expect(trace_merging(model, image), "merges no tokens: give a --tome_r above 0")
        if isinstance(method, Hourglass):
            return list[Stage](trace_clustering(model, image))
        if isinstance(method, EViT):
            return _expect(trace_dropping(model, image), "drops no tokens: give a --base_keep_rate below 1, --drop_loc")
        if isinstance(method, ATS):
            return _expect(trace_sampling(model, image), "samples nowhere: give layers (--ats_blocks_indexes)")
        if isinstance(method, EvoViT):
            return _expect(trace_evolution(model, image), "keeps all tokens: give an --evo_prune_ratio below 1")
        if isinstance(method, ACT):
            return _expect(trace_query_groups(model, image, head), "clusters nothing: give --act_group_q True")
    if isinstance(method, SMYRF):
        raise NothingToShowError(
            "SMYRF keeps every token by itself: its clusters, others in each of its hash rounds, limit who attends to "
            "whom and merge nothing"
        )
    if isinstance(model, Lean):
        raise NothingToShowError("with these flags the network clusters nothing: give a layer (-l) and a number (-n)")
    raise NothingToShowError("this is a dense network, whose tokens go through all layers unchanged")


def _expect(stages: Sequence[Stage], otherwise: str) -> list[Stage]:
    if not stages:
        raise NothingToShowError(f"with these flags the network {otherwise}")
    return list(stages)


def trace_merging(model: Any, image: Tensor) -> list[Grouping]:
    """ToMe: the groups behind every layer that merges."""
    stages: list[Grouping] = []

    def record(layer: int, operands: tuple[Any, ...], after: Tokens) -> None:
        before, left = operands[0].x.shape[1], after.x.shape[1]
        if left < before:
            labels = after.membership()[0, :, after.prefix :].argmax(0)
            stages.append(Grouping(layer, f"{before} to {left} tokens", labels.cpu()))

    info = model._tome_info
    traced, info["trace_source"] = info["trace_source"], True  # so that merging can be undone
    try:
        with _watching(model, "between", record):
            model(image)
    finally:
        info["trace_source"] = traced
    return stages


def trace_clustering(model: Any, image: Tensor) -> list[Grouping]:
    """Hourglass: the hard labels of the clustering."""
    stages: list[Grouping] = []
    (method,) = model.methods
    where = "after" if method.behind else "before"
    block = next(module for module in model.modules() if isinstance(module, TokenClusteringBlock))

    def record(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, None]) -> None:
        _, labels = module.forward(*inputs, return_labels=True)  # the network asks for none
        patches, clusters = labels.shape[1], output[0].shape[1]
        stages.append(Grouping(method.layer, f"{patches} patches to {clusters} clusters, {where} it", labels[0].cpu()))

    with _removing([block.register_forward_hook(record)]):
        model(image)
    return stages


def trace_dropping(model: Any, image: Tensor) -> list[Selection]:
    """EViT: which patches every dropping layer keeps. A fused token stands for none."""
    origin, stages = _origin(model), []
    (method,) = model.methods

    def record(layer: int, operands: tuple[Any, ...], after: Tokens) -> None:
        nonlocal origin
        tokens = operands[0]
        if after.x.shape[1] == tokens.x.shape[1]:
            return
        _, places = method.rank(layer, *operands)
        before, origin = origin, origin[torch.cat([torch.arange(tokens.prefix), places[0].cpu()])]
        fused = after.x.shape[1] - len(origin)
        origin = torch.cat([origin, origin.new_full((fused,), NO_PATCH)])
        caption = f"{len(before)} to {len(origin)} tokens" + (", 1 of them fused" if fused else "")
        stages.append(Selection(layer, caption, _states(model, before, origin)))

    with _watching(model, "between", record):
        model(image)
    return stages


def trace_sampling(model: Any, image: Tensor) -> list[Selection]:
    """ATS: which patches every sampling layer picks; padding stands for none."""
    origin, stages = _origin(model), []
    (method,) = model.methods

    def record(layer: int, operands: tuple[Any, ...], result: Any) -> None:
        nonlocal origin
        tokens, parts = operands
        places, mask, _ = method.sample(tokens, method.see(tokens, parts))
        before, origin = origin, origin[places[0].cpu()]
        if mask is not None:
            origin = origin.where(mask[0, :, 0].cpu() > 0, NO_PATCH)
        caption = f"{_present(before)} to {_present(origin)} tokens"
        stages.append(Selection(layer, caption, _states(model, before, origin)))

    with _watching(model, "attend", record):
        model(image)
    return stages


def trace_evolution(model: Any, image: Tensor) -> list[Selection]:
    """Evo-ViT: which patches go through every pruned layer. The others skip it and may come back in a later one."""
    stages: list[Selection] = []
    (method,) = model.methods

    def record(layer: int, operands: tuple[Any, ...], after: Tokens) -> None:
        order = after.carried[method.name].order[0].cpu() + after.prefix
        number = count_processed(len(order), method.keep[layer])
        everyone, first = _origin(model), torch.arange(after.prefix)
        caption = f"{len(first) + number} of {len(everyone)} tokens go through"
        states = _states(model, everyone, torch.cat([first, order[:number]]))
        stages.append(Selection(layer, caption, states))

    with _watching(model, "before", record):
        model(image)
    return stages


def trace_query_groups(model: Any, image: Tensor, head: int) -> list[Grouping]:
    """ACT: the groups of queries of one head (of keys, where only these are clustered) in every layer that has them.

    Raises:
        ValueError: if there is no such head.
    """
    if not 0 <= head < model.num_heads:
        raise ValueError(f"--head must be 0 to {model.num_heads - 1}, got {head}")
    stages: list[Grouping] = []
    steps = [module for module in model.modules() if isinstance(module, Step)]
    clustered = [(step.layer, cast(Any, step.core)) for step in steps if step.method.depends_on_data]

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


@contextmanager
def _watching(model: nn.Module, hook: str, record: Callable[[int, tuple[Any, ...], Any], None]) -> Generator[None]:
    """Tell ``record`` layer, operands and result of every step of a hook."""
    steps = [module for module in model.modules() if isinstance(module, Step) and module.hook == hook]
    with _removing(
        [step.register_forward_hook(lambda step, *seen: record(cast(Step, step).layer, *seen)) for step in steps]
    ):
        yield


@contextmanager
def _removing(handles: Sequence[Any]) -> Generator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _origin(model: Any) -> Tensor:
    """Position in the input of each token that enters the first layer, (N,)."""
    return torch.arange(model.seq_length)


def _present(origin: Tensor) -> int:
    return int((origin != NO_PATCH).sum())


def _states(model: Any, before: Tensor, after: Tensor) -> Tensor:
    """State of each patch, (P,), from the origins of the tokens before and after a layer."""
    states = torch.full((model.seq_length,), GONE)
    states[before[before != NO_PATCH]] = DROPPED
    states[after[after != NO_PATCH]] = KEPT
    return states[model.num_class_tokens :]
