"""Any plain Vision Transformer of timm as the stage of a cascade: at another token grid, with both reuses.

The network stays one of timm's, with its modules under their names: LayerScale, registers, query and key norms, gates,
pooled heads work as they do there. What feature reuse adds are inputs of the second norm and of the MLP of each block.

Paper: arXiv:2105.15075, Section 3.2; it builds cascades of T2T-ViT and DeiT alone, so this is ours. Letters: D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import PatchEmbed  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.hosts.host import NotAHost
from common.hosts.opening import known_timm, timm_state
from common.hosts.timm_vit import TimmBlock, TimmViT
from common.layers import init_linear
from common.run.checkpoint import keep_own_heads, load_strict
from common.run.errors import UsageError
from common.run.wrapping import within
from common.sizes import TIMM
from dvt.models import patch_of
from dvt.models.backbone import Stage
from dvt.models.reuse import FEATURE_CHANNELS, FEATURE_HIDDEN, Grid
from dvt.models.transformer_block import Reusing, attend, feature_network

FIRST_LAYERS = ("fc1", "fc1_g", "fc1_x")
"""Layers of timm's MLPs that take the tokens."""


class TimmReusing(Reusing, TimmBlock):
    """View of a block of timm that can reuse."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.name = name

    def __call__(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return within(self.module, self.forward, *args, **options)

    @property
    def make_features(self) -> nn.Module | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.module, "feature_resuse_mlp", None)

    def attention_update(self, x: Tensor, reused: Tensor | None, *, hand_on: bool) -> tuple[Tensor, Tensor | None]:
        parts = self.qkv(x, None)
        heads, relation = attend(
            parts.q, parts.k, parts.v, reused, scale=parts.scale, drop=parts.dropout, hand_on=hand_on
        )
        return self.project(heads, parts), relation

    def mlp_update(self, x: Tensor) -> Tensor:
        return self.mlp(x)

    def add_features(self, channels: int, hidden: int) -> None:
        """Give the block an f_l, and its norm and MLP the channels that this makes as further inputs.

        Raises:
            NotAHost: naming the norm or the MLP that cannot have them.
        """
        norm, mlp = self.module.norm2, self.module.mlp
        layers = [name for name in FIRST_LAYERS if isinstance(getattr(mlp, name, None), nn.Linear)]
        if not layers:
            raise NotAHost(f"{self.name}.mlp ({type(mlp).__name__}) has no linear layer that takes the tokens")
        if not isinstance(norm, nn.Module) or not hasattr(norm, "normalized_shape"):
            raise NotAHost(f"{self.name}.norm2 ({type(norm).__name__}) cannot be made wider")
        width = getattr(mlp, layers[0]).in_features
        self.module.feature_resuse_mlp = feature_network(_norm_like(norm, width), width, hidden, channels)
        self.module.norm2 = _norm_like(norm, width + channels)
        with torch.no_grad():
            for name, value in self.module.norm2.named_parameters():
                value[:width] = getattr(norm, name)
            for name in layers:
                narrow = getattr(mlp, name)
                wide = nn.Linear(width + channels, narrow.out_features, bias=narrow.bias is not None)
                init_linear(wide)
                wide.weight[:, :width] = narrow.weight
                if narrow.bias is not None:
                    wide.bias.copy_(narrow.bias)
                setattr(mlp, name, wide)
        self.module.feature_resuse_mlp.apply(init_linear)


def _norm_like(norm: Any, width: int) -> nn.Module:
    """A fresh norm of this kind, of another width."""
    return type(norm)(width, eps=norm.eps)


class ReusingViT(TimmViT):
    """timm's ``VisionTransformer`` as a host whose blocks can reuse."""

    view = TimmReusing

    def __init__(self, net: nn.Module, *, features: bool) -> None:
        super().__init__(net)
        for block in cast(Sequence[TimmReusing], self.blocks):
            block.prefix = self.facts.prefix
            if features:
                block.add_features(FEATURE_CHANNELS, FEATURE_HIDDEN)


class TimmStage(Stage):
    """Mixin of a network of timm: its pass runs through blocks that can reuse."""

    host: ReusingViT

    @property
    def layers(self) -> Sequence[TimmReusing]:
        return self.host.blocks  # pyright: ignore[reportReturnType] - views of ReusingViT

    def tokens(self, images: Tensor) -> Tensor:
        return self.host.embed(self, images).x

    def answer(self, x: Tensor) -> Tensor:
        return self.host.finish(self, self.host.normalize(self, x))

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self).__bases__[1],), self.__dict__


def _empty(kind: type) -> Any:
    """A stage without content, for copying and unpickling."""
    made: Any = type(f"Stage{kind.__name__}", (TimmStage, kind), {"__module__": __name__})
    return made.__new__(made)


def make_timm_stage(
    name: str,
    grid: int,
    *,
    img_size: int | tuple[int, int] = 224,
    weights: Mapping[str, Tensor] | None = None,
    source: str = "the weights",
    source_grid: Grid | None = None,
    feature_reuse: bool = False,
    relation_reuse: bool = False,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    num_classes: int = 1000,
) -> TimmStage:
    """A network of timm at a token grid; with weights, relations are at first not reused, and features hardly.

    Args:
        name: of ``timm.create_model``.
        grid: tokens along a side.
        img_size: side of the images in pixels; they are padded where the patches would not fill them.
        weights: of the network at any grid, which patches and positions are resampled from; a head for other classes
            starts afresh, which is said.
        source: the file that they are from, for messages.
        source_grid, feature_reuse, relation_reuse: see :class:`~dvt.models.backbone.Backbone`.

    Raises:
        UsageError: naming the network or its module that cannot be a stage, and why.
        CheckpointError: listing weights that do not fit.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if sides[0] != sides[1]:
        raise UsageError(f"{TIMM}{name}: images must be square, got {sides}")
    patch, padding = patch_of(sides[0], grid)
    _check_kind(name, feature_reuse=feature_reuse)
    net: Any = timm.create_model(
        name, img_size=sides[0] + 2 * padding, patch_size=patch, num_classes=num_classes, dynamic_img_size=False,
        drop_rate=drop_rate, pos_drop_rate=drop_rate, proj_drop_rate=drop_rate, drop_path_rate=drop_path_rate,
    )  # fmt: skip
    if weights is not None:
        state = keep_own_heads(net, timm_state(name, net, dict(weights)), source=source)
        load_strict(net, state, source=source)
    net.patch_embed.proj.padding, net.patch_embed.img_size = (padding, padding), sides
    host = ReusingViT(net, features=feature_reuse)
    stage = _empty(type(net))
    stage.__dict__.update(vars(net))
    stage.host = host
    host.net = stage
    stage.grid, stage.img_size, stage.prefix = (grid, grid), sides, host.facts.prefix
    stage.depth, stage.num_heads = host.facts.depth, host.facts.heads
    stage.add_reuse(
        source_grid, feature_reuse=feature_reuse, relation_reuse=relation_reuse, feature_channels=FEATURE_CHANNELS
    )
    if weights is not None and relation_reuse:
        nn.init.zeros_(stage.relation_reuse_conv[2].weight)
        nn.init.zeros_(stage.relation_reuse_conv[2].bias)
    return stage


def _check_kind(name: str, *, feature_reuse: bool) -> None:
    """Refuse what is no plain Vision Transformer of timm.

    Raises:
        UsageError: naming the network, or its module, and the reason.
    """
    reason = None
    with torch.device("meta"):
        net: Any = timm.create_model(known_timm(name))
        if not isinstance(net, VisionTransformer):
            reason = f"its class is {type(net).__name__}, and only timm's VisionTransformer can be one"
        elif hasattr(net, "head_dist"):
            reason = "head_dist: a network with two heads has no one answer"
        elif type(net.patch_embed) is not PatchEmbed or not isinstance(net.patch_embed.proj, nn.Conv2d):
            reason = f"patch_embed ({type(net.patch_embed).__name__}) is not one convolution, which grids are made by"
        else:
            try:
                ReusingViT(net, features=feature_reuse)
            except NotAHost as error:
                reason = str(error)
    if reason:
        raise UsageError(f"{TIMM}{name} cannot be a stage of a cascade: {reason}")
