"""DeiT whose layers take a width ratio: ``model(images, ratio)``.

*Slicing Vision Transformer for Flexible Inference*, NeurIPS 2024, arXiv:2412.04786. Names and shapes of the weights
are those of timm's DeiT, so that their checkpoints load strictly in both directions. Every layer keeps its number of
heads at every width; the head dimension shrinks. Run as a script, this prints the cost of the small distilled model
at half width.

Legend: B batch, N tokens, D full width, d = int(r D) sliced width, H heads, C classes, r width ratio.
"""

if __name__ == "__main__":
    from common.run.cli import make_parser

    make_parser(__doc__).parse_args()  # before anything heavy is imported

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from timm.models._manipulate import named_apply
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.layers import nearest_side
from common.measure.flops import OpCounts, gmacs
from common.run.errors import UsageError
from scala.layers import Sliced, SlicedConv2d, SlicedLayerNorm, SlicedLinear, SlicedNetwork, register
from scala.slicing import PUBLISHED_RULE, Ratio, SliceRule, Width, check_ratio, sliced_size

Layer = Callable[..., nn.Module]


def _check_norm_layer(norm_layer: Layer | None) -> None:
    """Only layer normalisation can be sliced; its own eps has no effect (``layers.NORM_EPS``)."""
    base = norm_layer.func if isinstance(norm_layer, partial) else norm_layer
    if base is not None and not (isinstance(base, type) and issubclass(base, nn.LayerNorm)):
        raise ValueError(f"norm_layer must be a layer normalisation, got {norm_layer!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Sliced parts. Every forward takes the width ratio as its last argument.


class Attention(nn.Module):
    """Self-attention whose H heads have d/H channels; scaled by the full head dimension at every width.

    The fused projection is cut as one block of 3d rows, so that the queries of a narrow width lie among the rows that
    are other parts at full width; published checkpoints depend on it.

    Source: arXiv:2412.04786, Section 4.1: uniform slicing of all layers.
    """

    def __init__(
        self,
        smallest_ratio: float,
        largest_ratio: float,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise UsageError(f"the width {dim} must be a multiple of the number of heads, {num_heads}")
        rule = SliceRule(smallest_ratio, largest_ratio)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = SlicedLinear(rule, dim, 3 * dim, bias=qkv_bias, parts=3)
        self.attn_drop = attn_drop
        self.proj = SlicedLinear(rule, dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x, ratio).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, d/H)
        rate = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width), ratio))


class LayerScale(Sliced, nn.Module):
    """Multiply by a learned factor per channel.

    Args:
        official: leave the input as it is, as the official code does unless ``inplace``; gamma then gets no gradient.
    """

    def __init__(
        self,
        smallest_ratio: float,
        largest_ratio: float,
        dim: int,
        init_values: float = 1e-5,
        inplace: bool = False,
        *,
        official: bool = False,
    ) -> None:
        super().__init__()
        self.rule, self.dims = SliceRule(smallest_ratio, largest_ratio), {"gamma": {0: 1}}
        self.inplace = inplace
        self.official = official
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(B, N, d) to (B, N, d)."""
        gamma = self.sliced(ratio)["gamma"]
        if self.inplace:
            return x.mul_(gamma.detach() if self.official else gamma)
        return x if self.official else x * gamma


class Mlp(nn.Module):
    """Two linear layers with an activation between; hidden and outer channels shrink together.

    Args:
        norm_layer: kept for the state dict's sake; the official code creates this layer and never applies it.
        use_conv: must be False.
    """

    def __init__(
        self,
        smallest_ratio: float,
        largest_ratio: float,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Layer = nn.GELU,
        norm_layer: Layer | None = None,
        bias: bool = True,
        drop: float = 0.0,
        use_conv: bool = False,
    ) -> None:
        super().__init__()
        if use_conv:
            raise ValueError("use_conv=True is not supported: slicing is defined on tokens (B, N, D)")
        rule = SliceRule(smallest_ratio, largest_ratio)
        hidden = hidden_features or in_features
        self.fc1 = SlicedLinear(rule, in_features, hidden, bias=bias)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        if norm_layer is not None:
            _check_norm_layer(norm_layer)
            self.norm = SlicedLayerNorm(rule, hidden)
        self.fc2 = SlicedLinear(rule, hidden, out_features or in_features, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(B, N, d) to (B, N, d)."""
        x = self.drop1(self.act(self.fc1(x, ratio)))
        return self.drop2(self.fc2(x, ratio))


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        official_layer_scale: see :class:`LayerScale`.
    """

    def __init__(
        self,
        smallest_ratio: float,
        largest_ratio: float,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Layer = nn.GELU,
        norm_layer: Layer | None = nn.LayerNorm,
        *,
        official_layer_scale: bool = False,
    ) -> None:
        super().__init__()
        _check_norm_layer(norm_layer)
        bounds = (smallest_ratio, largest_ratio)
        rule = SliceRule(*bounds)

        def scale() -> LayerScale | None:
            return LayerScale(*bounds, dim, init_values, official=official_layer_scale) if init_values else None

        self.norm1 = SlicedLayerNorm(rule, dim)
        self.attn = Attention(*bounds, dim, num_heads, qkv_bias, attn_drop, drop)
        self.ls1 = scale()
        self.norm2 = SlicedLayerNorm(rule, dim)
        self.mlp = Mlp(*bounds, dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """Tokens (B, N, d) to (B, N, d)."""
        update = self.attn(self.norm1(x, ratio), ratio)
        x = x + self.drop_path(update if self.ls1 is None else self.ls1(update, ratio))
        update = self.mlp(self.norm2(x, ratio), ratio)
        return x + self.drop_path(update if self.ls2 is None else self.ls2(update, ratio))


def check_filled(side: int, patch_size: int) -> None:
    """Refuse a side in pixels that patches do not fill.

    Raises:
        UsageError: naming both.
    """
    if nearest_side(side, patch_size) != side:
        raise UsageError(f"--input-size (img_size) {side} is no multiple of the patch of {patch_size} pixels")


class PatchEmbed(nn.Module):
    """Images to patch tokens by a convolution whose output channels are sliced.

    Args:
        img_size: side in pixels, or (height, width).
        norm_layer: None for no normalisation.
        flatten: (B, N, d) instead of (B, d, rows, columns).
        output_fmt: must be None; the official code fails otherwise.
        strict_img_size: refuse images of another size; else the sides need only be multiples of the patch.

    Raises:
        UsageError: patches that do not fill the sides.
    """

    def __init__(
        self,
        smallest_ratio: float = 0.25,
        largest_ratio: float = 1.0,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Layer | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
    ) -> None:
        super().__init__()
        if output_fmt is not None:
            raise ValueError("output_fmt is not supported; set flatten=False for (B, d, rows, columns)")
        rule = SliceRule(smallest_ratio, largest_ratio)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        for side in self.img_size:
            check_filled(side, patch_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        self.strict_img_size = strict_img_size
        self.proj = SlicedConv2d(rule, in_chans, embed_dim, patch_size, bias=bias)
        _check_norm_layer(norm_layer)
        self.norm = SlicedLayerNorm(rule, embed_dim) if norm_layer is not None else None

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(B, 3, height, width) to (B, N, d).

        Raises:
            ValueError: images of another size than the network was built for.
        """
        size = tuple(x.shape[-2:])
        if self.strict_img_size and size != self.img_size:
            raise ValueError(f"the network takes images of {self.img_size} pixels, got {size}; build it with img_size")
        if any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"the sides of an image must be multiples of the patch, {self.patch_size}; got {size}")
        x = self.proj(x, ratio)
        if self.flatten or self.norm is not None:
            tokens = x.flatten(2).transpose(1, 2)  # (B, N, d)
            tokens = tokens if self.norm is None else self.norm(tokens, ratio)
            x = tokens if self.flatten else tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        return x


# ---------------------------------------------------------------------------------------------------------------------
# The networks


class VisionTransformer_scala(SlicedNetwork, Sliced, nn.Module):
    """Vision Transformer that runs at any width whose channels its heads can share.

    Args:
        img_size: side in pixels, or (height, width).
        smallest_ratio, largest_ratio: the slicing bound s, l; it decides which end a ratio uses, so it belongs to a
            checkpoint as much as its weights.
        num_classes: 0 for features instead of logits.
        global_pool: ``token``, ``avg`` (mean of the patch tokens), or ``""`` (all tokens).
        init_values: of LayerScale; None for none.
        no_embed_class: the class token gets no position.
        fc_norm: normalise after pooling instead of before; None: with ``avg`` only.
        weight_init: ``""`` (truncated normal), ``skip``, or timm's ``jax``, ``jax_nlhb``, ``moco``.
        norm_layer: a layer normalisation; its eps has no effect.
        official_layer_scale: LayerScale does nothing, as in the official code.
        isolated_activation: off, every width uses the leading channels, see :class:`scala.slicing.SliceRule`.

    Source: arXiv:2412.04786.
    """

    num_prefix_tokens: int

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        smallest_ratio: float = 0.25,
        largest_ratio: float = 1.0,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        embed_layer: Layer = PatchEmbed,
        norm_layer: Layer | None = None,
        act_layer: Layer | None = None,
        block_fn: Layer = Block,
        *,
        official_layer_scale: bool = False,
        isolated_activation: bool = True,
    ) -> None:
        super().__init__()
        if global_pool not in ("", "avg", "token"):
            raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool='token' needs class_token=True; without it, use 'avg'")
        if not 0 < smallest_ratio <= 1 or not 0 < largest_ratio <= 1:
            raise ValueError(f"the slicing bound must lie in (0, 1], got {smallest_ratio} and {largest_ratio}")
        self.smallest_ratio, self.largest_ratio = smallest_ratio, largest_ratio
        self.rule = self._outer_rule(SliceRule(smallest_ratio, largest_ratio))
        self.dims = {name: {2: 1} for name in ("cls_token", "dist_token", "pos_embed")}
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0 (features), got {num_classes}")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.embed_dim = self.num_features = embed_dim
        self.num_heads = num_heads
        self.num_prefix_tokens = 1 if class_token else 0
        self.no_embed_class = no_embed_class
        self.grad_checkpointing = False
        self.patch_embed: Any = embed_layer(
            smallest_ratio=smallest_ratio, largest_ratio=largest_ratio, img_size=_side(img_size),
            patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
        )  # fmt: skip
        patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        positions = patches if no_embed_class else patches + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            block_fn(
                smallest_ratio, largest_ratio, embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
                drop=drop_rate, attn_drop=attn_drop_rate, init_values=init_values, drop_path=rate,
                act_layer=act_layer or nn.GELU, norm_layer=norm_layer or nn.LayerNorm,
                official_layer_scale=official_layer_scale,
            )
            for rate in rates
        )  # fmt: skip
        after_pooling = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = None if after_pooling else SlicedLayerNorm(self.rule, embed_dim)
        self.fc_norm = SlicedLayerNorm(self.rule, embed_dim) if after_pooling else None
        self.head = self._make_head()
        if not isolated_activation:
            for module in self.modules():
                if isinstance(module, Sliced):
                    module.rule = module.rule._replace(isolated=False)
        if weight_init != "skip":
            self.init_weights(weight_init)

    def _outer_rule(self, rule: SliceRule) -> SliceRule:
        """Of tokens, positions, final normalisation and heads; ``rule`` is that of patch embedding and blocks."""
        return rule

    def _make_head(self) -> SlicedLinear | None:
        if self.num_classes < 1:
            return None
        return SlicedLinear(self.rule, self.embed_dim, self.num_classes, rows=False)

    def init_weights(self, mode: str = "") -> None:
        """timm's initialisation of a ViT."""
        if mode not in ("", "jax", "jax_nlhb", "moco"):
            raise ValueError(f"weight_init must be '', 'skip', 'jax', 'jax_nlhb' or 'moco', got {mode!r}")
        if self.pos_embed.is_meta:
            return  # to be counted: there is nothing to fill, and saying so layer by layer takes longer than counting
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        trunc_normal_(self.pos_embed, std=0.02)
        bias = -math.log(self.num_classes) if "nlhb" in mode and self.num_classes else 0.0
        named_apply(get_init_weights_vit(mode, head_bias=bias), self)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers leave undecayed."""
        return {"pos_embed", "cls_token", "dist_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def check_ratio(self, ratio: Ratio) -> Width:
        """The exact width; one that the heads cannot share is refused, naming the nearest and all valid ones."""
        return check_ratio(ratio, self.embed_dim, self.num_heads)

    def place(self, tokens: Tensor, ratio: Ratio) -> Tensor:
        """Patch tokens (B, patches, d) with positions, and the prefix tokens in front: (B, N, d)."""
        own = self.sliced(ratio)
        positions = own.pop("pos_embed")
        prefix = [token.expand(len(tokens), -1, -1) for token in own.values()]
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*prefix, tokens + positions], dim=1))
        return self.pos_drop(torch.cat([*prefix, tokens], dim=1) + positions)

    def encode(self, images: Tensor, ratio: Ratio) -> Tensor:
        """Tokens (B, N, d) after the last block, not normalised."""
        width = self.check_ratio(ratio)
        return self.run_blocks(self.place(self.patch_embed(images, width), width), width)

    def run_blocks(self, x: Tensor, ratio: Ratio) -> Tensor:
        """Tokens (B, N, d) through all blocks."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, ratio, use_reentrant=False)
            else:
                x = block(x, ratio)
        return x  # pyright: ignore[reportReturnType]

    def forward_features(self, images: Tensor, ratio: Ratio) -> Any:
        """Normalised tokens (B, N, d); with ``fc_norm`` they are normalised after pooling instead."""
        x = self.encode(images, ratio)
        return x if self.norm is None else self.norm(x, ratio)

    def forward_head(self, x: Any, ratio: Ratio, pre_logits: bool = False) -> Any:
        """Pooled logits (B, C), or features (B, d) with ``pre_logits`` or without classes."""
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "token":
            x = x[:, 0]
        if self.fc_norm is not None:
            x = self.fc_norm(x, ratio)
        return x if pre_logits or self.head is None else self.head(x, ratio)

    def forward(self, images: Tensor, ratio: Ratio) -> Any:
        """Logits (B, C) of images (B, 3, height, width) at a width ratio.

        Raises:
            ValueError: a ratio the heads cannot share, or images of another size.
        """
        width = self.check_ratio(ratio)
        return self.forward_head(self.forward_features(images, width), width)

    @property
    def _tokens(self) -> int:
        return self.patch_embed.num_patches + self.num_prefix_tokens

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.patch_embed.proj.in_channels, *self.patch_embed.img_size

    def slice_arguments(self, width: Width) -> tuple[dict[str, Any], dict[str, Any]]:
        block: Any = self.blocks[0]
        own = width.channels(self.embed_dim)
        hidden = width.channels(block.mlp.fc1.out_features)
        if int(own * (hidden / own)) != hidden:
            raise ValueError(f"no mlp_ratio gives {hidden} hidden channels at width {own}")
        height, breadth = self.patch_embed.img_size
        shared: dict[str, Any] = {
            "img_size": height if height == breadth else [height, breadth],
            "patch_size": self.patch_embed.patch_size[0],
            "in_chans": self.patch_embed.proj.in_channels,
            "num_classes": self.num_classes,
            "embed_dim": own,
            "depth": len(self.blocks),
            "num_heads": self.num_heads,
            "mlp_ratio": hidden / own,
            "qkv_bias": block.attn.qkv.bias is not None,
            "init_values": None if block.ls1 is None or block.ls1.official else 1.0,
            "global_pool": self.global_pool,
            "class_token": self.num_prefix_tokens > 0,
            "no_embed_class": self.no_embed_class,
            "fc_norm": self.fc_norm is not None,
        }
        return shared, {"smallest_ratio": 1.0, "largest_ratio": 1.0}


class DistilledVisionTransformer_scala(VisionTransformer_scala):
    """DeiT with a distillation token and a head for it; two logits in training, their mean in evaluation.

    Args:
        official_anchors: decide the end of tokens, positions, final normalisation and heads by the bound 0.25 to 1
            whatever ``smallest_ratio`` and ``largest_ratio`` are, as the official code does. Equal for that bound.
        pair_outputs: return both heads' logits, or their mean; None: both in training mode only.

    The other arguments are those of :class:`VisionTransformer_scala`, without ``global_pool``, ``class_token``,
    ``no_embed_class`` and ``fc_norm``, which have no meaning here.
    """

    def __init__(
        self, *args: Any, official_anchors: bool = False, pair_outputs: bool | None = None, **kwargs: Any
    ) -> None:
        for name, only in {"global_pool": "token", "class_token": True, "no_embed_class": False}.items():
            if kwargs.get(name, only) != only:
                raise ValueError(f"a distilled network has its two tokens only: {name} must be {only!r}")
        if kwargs.get("fc_norm"):
            raise ValueError("a distilled network normalises before its heads: fc_norm must not be set")
        self._official_anchors = official_anchors  # read while the layers are built
        mode = kwargs.pop("weight_init", "")
        super().__init__(*args, **kwargs, weight_init="skip")
        self.pair_outputs = pair_outputs
        self.num_prefix_tokens = 2
        self.pos_embed = nn.Parameter(torch.zeros(1, self._tokens, self.embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.head_dist = self._make_head()
        if mode != "skip":
            self.init_weights(mode)

    def _outer_rule(self, rule: SliceRule) -> SliceRule:
        return PUBLISHED_RULE if self._official_anchors else rule

    def init_weights(self, mode: str = "") -> None:
        super().init_weights(mode)
        trunc_normal_(self.dist_token, std=0.02)

    def forward_features(self, images: Tensor, ratio: Ratio) -> tuple[Tensor, Tensor]:
        """Normalised class and distillation token, each (B, d)."""
        x = self.encode(images, ratio)[:, :2]
        assert self.norm is not None
        x = self.norm(x, ratio)
        return x[:, 0], x[:, 1]

    def slice_arguments(self, width: Width) -> tuple[dict[str, Any], dict[str, Any]]:
        shared, alone = super().slice_arguments(width)
        for name in ("global_pool", "class_token", "no_embed_class", "fc_norm"):
            del shared[name]  # decided by the class
        return shared, alone

    def count_ops(self, ratio: Ratio) -> OpCounts:
        """As published, where the last normalisation runs on all tokens; here it runs on the two that are read."""
        return super().count_ops(ratio) + OpCounts(layer_norm=(self._tokens - 2) * sliced_size(self.embed_dim, ratio))

    def forward_head(self, x: tuple[Tensor, Tensor], ratio: Ratio, pre_logits: bool = False) -> Any:
        """Both logits (B, C), or their mean; see ``pair_outputs``. Features in place of logits without classes.

        Source: arXiv:2412.04786, Section 4.3, Eq. 4: p_cls^r, p_dis^r = F^r(v, theta^r).
        """
        cls, dist = x
        if not pre_logits and self.head is not None and self.head_dist is not None:
            cls, dist = self.head(cls, ratio), self.head_dist(dist, ratio)
        pair = self.training if self.pair_outputs is None else self.pair_outputs
        return (cls, dist) if pair else (cls + dist) / 2


def _side(img_size: Any) -> int | tuple[int, int]:
    return img_size if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))


# ---------------------------------------------------------------------------------------------------------------------
# The registry


@dataclass(frozen=True)
class Size:
    """Shape of a registered network: 12 blocks of ``width`` channels, patches of ``patch`` pixels."""

    width: int
    heads: int
    distilled: bool
    img_size: int = 224
    patch: int = 16


MODELS: dict[str, Size] = {
    "deit_so_tiny_patch16_224_scala": Size(96, 3, distilled=False),
    "deit_tiny_patch16_224_scala": Size(192, 3, distilled=False),
    "deit_small_patch16_224_scala": Size(384, 6, distilled=False),
    "deit_base_patch16_224_scala": Size(768, 12, distilled=False),
    "deit_tiny_distilled_patch16_224_scala": Size(192, 3, distilled=True),
    "deit_small_distilled_patch16_224_scala": Size(384, 6, distilled=True),
    "deit_base_distilled_patch16_224_scala": Size(768, 12, distilled=True),
    "deit_base_patch16_384_scala": Size(768, 12, distilled=False, img_size=384),
    "deit_base_distilled_patch16_384_scala": Size(768, 12, distilled=True, img_size=384),
}
"""The published names, also those of timm's registry; any argument of the network overrides its size."""

DINOV2_MODELS: dict[str, Size] = {
    "deit_small_patch14_224_scala": Size(384, 6, distilled=False, patch=14),
    "deit_base_patch14_224_scala": Size(768, 12, distilled=False, patch=14),
}
"""On DINOv2's grid of 16 x 16 patches (design)."""


def create(name: str, **kwargs: Any) -> VisionTransformer_scala:
    """A network of ``MODELS`` with random weights.

    Args:
        kwargs: of :class:`VisionTransformer_scala` or its distilled form, in place of the registered size.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODELS and name not in DINOV2_MODELS:
        raise UsageError(f"no sliceable network {name!r}; the models are {', '.join(MODELS)}")
    size = (MODELS | DINOV2_MODELS)[name]
    network = DistilledVisionTransformer_scala if size.distilled else VisionTransformer_scala
    shape: dict[str, Any] = {
        "img_size": size.img_size, "patch_size": size.patch, "embed_dim": size.width, "num_heads": size.heads,
    }  # fmt: skip
    return network(**shape | kwargs)


FACTORIES: dict[str, Callable[..., nn.Module]] = {
    name: register(name, partial(create, name)) for name in (*MODELS, *DINOV2_MODELS)
}
"""Name -> function with timm's signature for model factories."""


if __name__ == "__main__":
    with torch.device("meta"):
        network = create("deit_small_distilled_patch16_224_scala")
    print("FLOPs: ", gmacs(network.count_ops(0.5), "fvcore"))
