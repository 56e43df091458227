"""What tests ask of networks: published classes by name, what every step saw, tokens and costs."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from common.hosts.runner import Step
from common.measure.flops import Counted, OpCounts, count_operations
from common.tests.reference import build, fill_
from hourglass_swag.host import publish
from hourglass_swag.models.evit import EViT
from hourglass_swag.models.hourglass_vit import Hourglass
from hourglass_swag.models.ops.ACT.ada_clustering_attention import AdaClusteringAttention
from hourglass_swag.models.vision_transformer import VisionTransformer, make_vit

Seen = tuple[Step, tuple[Any, ...], Any]
"""A step of a method, its operands, and its result."""

TIMM = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
ARGUMENTS = inspect.signature(VisionTransformer).parameters


def make(module: str, size: str | None = None, **options: Any) -> Any:
    """The network of a published class: that of a method, and of a size where it is not spelt out.

    EViT's list of keep rates, one for each layer, and a clustering behind the layer are those of the published classes.
    """
    own = {key: options.pop(key) for key in list(options) if key in ARGUMENTS}
    dense = make_vit(size, **own) if size else VisionTransformer(**own)
    if "keep_rate" in options:
        rates = {layer: rate for layer, rate in enumerate(options["keep_rate"]) if rate < 1}
        method = EViT(tuple(rates.values()), tuple(rates), fuse=options.get("fuse_token", False), score="mean")
        return publish(dense, method)
    if module == "hourglass_vit":
        options.setdefault("cluster_after_output", True)
    return import_module(f"hourglass_swag.models.{module}").published(dense, **options)


def timm(**options: Any) -> Any:
    """A small network of timm, filled, in float64."""
    return build(TimmViT, 1, **TIMM | options)


def rotating() -> Any:
    """One that rotates its queries and keys, with registers."""
    return fill_(Eva(**TIMM, use_rot_pos_emb=True, num_reg_tokens=2).double(), 1).eval()


def images(batch: int = 2, size: int = 32) -> Tensor:
    """Noise, always the same, (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    """What a network says to images, its random projections drawn from a seed."""
    torch.manual_seed(seed)
    with torch.inference_mode():
        return model(x)


def networks(name: str, module: str, short: str | None = None) -> dict[str, Callable[..., Any]]:
    """Published class -> what builds its network: the class whose shape is spelt out, and those of the sizes."""
    sizes = {f"{short or name}{size.upper()}": partial(make, module, size) for size in ("b16", "l16", "h14")}
    return {name: partial(make, module), **sizes}


@contextmanager
def steps(model: nn.Module) -> Iterator[list[Seen]]:
    """What every step of the model's methods got and gave while active."""
    seen: list[Seen] = []
    handles = [
        step.register_forward_hook(lambda step, operands, result: seen.append((step, operands, result)))  # pyright: ignore[reportArgumentType]
        for step in model.modules()
        if isinstance(step, Step)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def blank(model: Any, batch: int = 1) -> Tensor:
    """Images of the model's size without content."""
    dtype = next(model.parameters()).dtype
    return torch.empty(batch, 3, model.image_size, model.image_size, device="meta", dtype=dtype)


def published_ops(model: nn.Module) -> OpCounts:
    """What the paper's tool counts for one image, where that does not depend on it."""
    return count_operations(model, blank(model)).published


def tokens_per_layer(model: Any, images: Tensor | None = None) -> list[int]:
    """Tokens that enter each layer and, last, those that leave the last one, before a clustering behind it."""
    found = model.tokens_per_layer(images)
    behind = [step for step in model.plan.steps if step.hook == "after" and isinstance(step.method, Hourglass)]
    if behind and behind[0].layer == model.num_layers - 1:
        found[-1] = found[-2]
    return found


def count_with_clusters(model: Any, clusters: Sequence[int]) -> Counted:
    """Costs of ACT for numbers of clusters, in the order of ``model.clusters()``; the model is changed."""
    given = iter(clusters)
    for attention in (module for module in model.modules() if isinstance(module, AdaClusteringAttention)):
        sides = [(name, next(given)) for name in ("Q", "K") if getattr(attention, f"group_{name}")]

        def forward(q: Tensor, *_: Any, attention: Any = attention, sides: Any = sides, **__: Any) -> Tensor:
            for name, number in sides:
                setattr(attention, f"{name}_clusters", number)
            return torch.empty_like(q)

        attention.forward = forward
    assert not list(given)
    return count_operations(model, blank(model))
