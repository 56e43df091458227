"""LV-ViT with and without token slimming: the students (SiT) and, with ``distillation_type=None``, their teachers.

Paper: Self-slimmed Vision Transformer, arXiv:2111.12624; the backbone is LV-ViT (arXiv:2104.10858) with this paper's
own stem. Written from the papers' equations; drop path, initialisation and the registry are timm's.

Letters: B batch, N patch tokens, E extra tokens (class, distillation), C width, h heads of width d, K classes, L blocks
"""

from __future__ import annotations

import copy
import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import attention
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from timm.models._registry import register_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from common.layers import init_linear, nearest_side
from common.measure.flops import OpCounts, count_operations
from common.run.errors import CheckpointError
from sit.models.slimming import layer_tokens, reverse_modules, slimming_blocks, slimming_modules, stage_tokens
from sit.sizes import COMMON, SIZES, TYPES

Tokens = list[Tensor]
Pixels = int | Sequence[int]
"""Side of a square image, or its height and width."""
Outputs = Tensor | tuple[Tensor, Tokens] | tuple[Tensor, Tensor, Tokens]

# ---------------------------------------------------------------------------------------------------------------------
# Stems


class _ConvStem(nn.Module):
    """3x3 convolutions with batch norm, a GELU between them and none after the last; total stride 16, or 8 of ``3c``.

    Args:
        img_size: pixels; they only say how many patches there are.
        patch_size: must be the stride of the convolutions.
        embed_dim: width C; the channels are fractions of it.
    """

    channels: tuple[int, ...] = ()
    """C over the channels of each convolution"""
    strides: tuple[int, ...] = ()

    def __init__(self, img_size: Pixels = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        if patch_size != math.prod(self.strides):
            raise ValueError(
                f"{type(self).__name__} has a stride of {math.prod(self.strides)} pixels, so patch_size {patch_size} "
                "cannot be had; use p_emb='naive' for other patches"
            )
        self.grid = patch_grid(img_size, patch_size)
        self.num_patches = math.prod(self.grid)
        width = in_chans
        for index, (fraction, stride) in enumerate(zip(self.channels, self.strides, strict=True), start=1):
            out = embed_dim // fraction
            self.add_module(f"conv{index}", nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(out))
            width = out

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, C, height / 16, width / 16)."""
        x = images
        for index in range(1, len(self.strides) + 1):
            x = self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(x))
            if index < len(self.strides):
                x = F.gelu(x)
        return x

    @torch.no_grad()
    def fuse(self) -> _ConvStem:
        """A copy for inference whose batch norms are folded into its convolutions, exactly: computed in float64.

        LeViT's speed tool calls a module's method of this name; stems without it would lose their normalisation there.
        """
        folded = copy.deepcopy(self).eval()
        for index in range(1, len(self.strides) + 1):
            conv, norm = (folded.get_submodule(f"{kind}{index}") for kind in ("conv", "bn"))
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):  # not folded before
                dtype = conv.weight.dtype
                setattr(folded, f"conv{index}", fuse_conv_bn_eval(conv.double(), norm.double()).to(dtype))
                setattr(folded, f"bn{index}", nn.Identity())
        return folded


class PatchEmbed3CG(_ConvStem):
    """Three convolutions, each of stride 2, for patches of 8 pixels of small images; ours."""

    channels, strides = (4, 2, 1), (2, 2, 2)


class PatchEmbed4CG(_ConvStem):
    """Four convolutions, each of stride 2."""

    channels, strides = (8, 4, 2, 1), (2, 2, 2, 2)


class PatchEmbed6CG(_ConvStem):
    """Six convolutions, of which the second and third keep the resolution."""

    channels, strides = (8, 8, 8, 4, 2, 1), (2, 1, 1, 2, 2, 2)


class PatchEmbedNaive(nn.Module):
    """One convolution over patches that do not overlap, with a bias."""

    def __init__(self, img_size: Pixels = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.grid = patch_grid(img_size, patch_size)
        self.num_patches = math.prod(self.grid)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, C, height / patch_size, width / patch_size)."""
        height, width = (side * step for side, step in zip(self.grid, self.proj.stride, strict=True))
        if images.shape[2:] != (height, width):
            found = "x".join(map(str, images.shape[2:]))
            raise ValueError(f"images of {found} in a network for {height}x{width} pixels")
        return self.proj(images)


STEMS: Mapping[str, type[_ConvStem] | type[PatchEmbedNaive]] = {
    "3c": PatchEmbed3CG, "4c": PatchEmbed4CG, "6c": PatchEmbed6CG, "naive": PatchEmbedNaive, "4cg": PatchEmbedNaive,
}  # fmt: skip
"""``p_emb`` -> stem. ``4cg``, the published default, names four convolutions and gives the single one, as published:
the published code compares with ``4c`` and ``6c`` and takes the single convolution for anything else."""


def choose(argument: str, value: object, valid: Sequence[str]) -> str:
    """``value`` if it is one of the valid names.

    Raises:
        ValueError: naming the valid ones and the nearest.
    """
    if value in valid:
        return str(value)
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument} must be one of {', '.join(valid)}, got {value!r}{hint}")


def patch_grid(img_size: Pixels, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: if the patches do not fill the image.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or not all(isinstance(number, int) for number in (*sides, patch_size)):
        raise ValueError(f"img_size and patch_size must be whole numbers of pixels, got {img_size!r}, {patch_size!r}")
    for side in sides:
        if (nearest := nearest_side(side, patch_size)) != side:
            raise ValueError(
                f"patches of {patch_size} pixels do not fill {side} pixels; give a multiple, such as {nearest}"
            )
    return sides[0] // patch_size, sides[1] // patch_size


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class Attention(attention.Attention):
    """timm's multi-head self-attention, (B, N, C) to (B, N, C), with the published arguments.

    Args:
        dim: width C.
        qk_scale: factor of q k^T before the softmax; None for d ** -0.5.
        head_dim: d; None for C / h.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        head_dim: int | None = None,
    ) -> None:
        if head_dim is None and dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads; give head_dim or other heads")
        super().__init__(dim, num_heads, head_dim, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        if qk_scale:
            self.scale = qk_scale
            self.fused_attn = False  # pyright: ignore[reportGeneralTypeIssues] - the fused form has its own scale


class Block(nn.Module):
    """Pre-norm transformer block whose branches are divided by ``skip_lam``, after drop path."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        skip_lam: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, head_dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        self.skip_lam = skip_lam

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C).

        Source: LV-ViT, arXiv:2104.10858, residual branches: x + branch(LN(x)) / lambda, for attention and for the MLP.
        """
        share = 1 / self.skip_lam  # added and scaled in one kernel
        x = torch.add(x, self.drop_path(self.attn(self.norm1(x))), alpha=share)
        return torch.add(x, self.drop_path(self.mlp(self.norm2(x))), alpha=share)


def get_dpr(drop_path_rate: float | Sequence[float], depth: int, drop_path_decay: str = "linear") -> list[float]:
    """Drop-path rate of every block.

    Args:
        drop_path_rate: the largest rate; for a decay of any other name, the list of rates.
        drop_path_decay: ``linear`` from 0, ``fix`` for the same rate everywhere, or any other name.

    Raises:
        ValueError: if a list does not have ``depth`` rates.
    """
    if drop_path_decay == "linear":
        return torch.linspace(0, float(drop_path_rate), depth, device="cpu").tolist()  # pyright: ignore
    if drop_path_decay == "fix":
        return [float(drop_path_rate)] * depth  # pyright: ignore[reportArgumentType]
    rates = list(drop_path_rate)  # pyright: ignore[reportArgumentType]
    if len(rates) != depth:
        raise ValueError(f"drop_path_decay {drop_path_decay!r} needs {depth} rates, one per block, got {len(rates)}")
    return rates


# ---------------------------------------------------------------------------------------------------------------------
# The network


class LVViT(nn.Module):
    """LV-ViT; slimmed, and with reverse modules for training, unless ``distillation_type`` is None or ``none``.

    Args:
        img_size: pixels: the side of square images, or (height, width).
        stage_blocks: blocks of each stage; tokens are slimmed between stages.
        keeping_ratio: tokens of a stage over those of the one before.
        distillation_type: None or ``none`` for the teacher's network, ``frd`` for the slimmed one.
        conv_distillation: add a distillation token, which follows a CNN teacher; slimmed networks only.
        p_emb: ``3c``, ``4c``, ``6c``, ``naive`` (the single convolution), or ``4cg``, the published default, which is
            the single convolution too, against its name, and warns of it; see ``STEMS``.
        skip_lam: divisor of the residual branches.
        with_cp: recompute each block's activations in the backward pass instead of keeping them.
        keeped_patches: tokens of each stage after the first, in place of what the ratio gives: for images of
            another size than a file was trained for, whose slimming modules put out a fixed number of tokens.
        logits_only: for inference: no reverse modules, no ``aux_head``, and the forward pass gives logits alone.

    Raises:
        ValueError: for an unknown name, and options that do not go together.
    """

    def __init__(
        self,
        img_size: Pixels = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float | Sequence[float] = 0.0,
        drop_path_decay: str = "linear",
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        p_emb: str = "4cg",
        head_dim: int | None = None,
        skip_lam: float = 1.0,
        stage_blocks: Sequence[int] = (1, 1, 1, 13),
        keeping_ratio: float = 0.5,
        distillation_type: str | None = None,
        conv_distillation: bool = False,
        with_cp: bool = False,
        *,
        keeped_patches: Sequence[int] | None = None,
        logits_only: bool = False,
    ) -> None:
        super().__init__()
        if choose("distillation_type", distillation_type or "none", TYPES) == "none":
            distillation_type = None
        slimmed = distillation_type is not None
        if sum(stage_blocks) != depth:
            raise ValueError(f"stage_blocks {list(stage_blocks)} has {sum(stage_blocks)} blocks, depth is {depth}")
        if not 0 < keeping_ratio <= 1:
            raise ValueError(f"keeping_ratio must be above 0 and at most 1, got {keeping_ratio}")
        if conv_distillation and not slimmed:
            raise ValueError(
                "conv_distillation (--extra-teacher-model) needs a slimmed network: give a distillation_type such as "
                "'frd'"
            )
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.depth = depth
        self.stage_blocks = list(stage_blocks)
        self.keeping_ratio = keeping_ratio
        self.distillation_type = distillation_type
        self.conv_distillation = conv_distillation
        self.with_cp = with_cp
        self.logits_only = logits_only
        self.recover = slimmed and not logits_only
        """Whether training runs the reverse modules; off where the token loss has no weight."""

        if p_emb == "4cg":
            warnings.warn(
                "p_emb='4cg', the default, is the single convolution, as in the published code: 'naive' says so, and "
                "'4c' is the stem of four convolutions",
                stacklevel=2,
            )
        self.patch_embed = STEMS[choose("p_emb", p_emb, list(STEMS))](img_size, patch_size, in_chans, embed_dim)
        self.img_size, self.patch_size = img_size, patch_size
        self.num_patches = number = self.patch_embed.num_patches
        self.keeped_patches = stage_tokens(number, keeping_ratio, len(stage_blocks))
        if keeped_patches is not None:
            if len(keeped_patches) != len(stage_blocks) - 1:
                raise ValueError(
                    f"keeped_patches {list(keeped_patches)} must have {len(stage_blocks) - 1} numbers, one per stage "
                    "after the first"
                )
            self.keeped_patches = [number, *keeped_patches]
        self.layer_patches = layer_tokens(self.keeped_patches, stage_blocks)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, number + 1, embed_dim))
        if conv_distillation:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.dist_pos_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = get_dpr(drop_path_rate, depth, drop_path_decay)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, head_dim, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate,
                norm_layer=norm_layer, skip_lam=skip_lam,
            )
            for rate in rates
        )  # fmt: skip
        self.norm = norm_layer(embed_dim)
        self.head = _head(embed_dim, num_classes)
        if not logits_only:
            self.aux_head = _head(embed_dim, num_classes)  # of token labeling; here it only lets teacher files load
            self.aux_head.requires_grad_(False)
        if slimmed:
            self.slim_index = slimming_blocks(stage_blocks)
            if not logits_only:
                self.rtsm = reverse_modules(embed_dim, self.layer_patches[1 : depth + 1], number)
            self.tsm = slimming_modules(embed_dim, self.keeped_patches[1:])
        if conv_distillation:
            self.head_dist = _head(embed_dim, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Truncated normal, std 0.02, for linear layers and tokens; the stem keeps PyTorch's own."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith(("token", "pos_embed")):
                trunc_normal_(parameter, std=0.02)
        self.apply(init_linear)

    @property
    def slimmed(self) -> bool:
        """Whether the tokens become fewer."""
        return self.distillation_type is not None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def extra_tokens(self) -> int:
        """Tokens in front of the patches."""
        return 1 + self.conv_distillation

    def no_weight_decay(self) -> set[str]:
        """As published, where nothing reads it; see ``engine.get_param_groups`` for what is decayed."""
        return {"pos_embed", "cls_token"}

    def reset_classifier(self, num_classes: int) -> None:
        """A new class head; the other heads stay."""
        self.num_classes = num_classes
        self.head = _head(self.embed_dim, num_classes).to(self.cls_token)

    def embed(self, images: Tensor, *, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Images (B, 3, height, width) to tokens with positions, (B, E + N, C).

        Args:
            mix: changes the stem's output (B, C, rows, columns) before the positions are added.

        Raises:
            ValueError: if the images give another number of patches than the network has positions.
        """
        grid = self.patch_embed(images)
        patches = (grid if mix is None else mix(grid)).flatten(2).transpose(1, 2)  # (B, N, C)
        if patches.shape[1] != self.num_patches:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} give {patches.shape[1]} patches, this network is for "
                f"{self.num_patches} ({'x'.join(map(str, self.image_shape))} pixels); build it with "
                f"img_size=({images.shape[2]}, {images.shape[3]})"
            )
        extra, positions = self.cls_token, self.pos_embed
        if self.conv_distillation:
            extra = torch.cat((self.cls_token, self.dist_token), 1)
            positions = torch.cat((positions[:, :1], self.dist_pos_embed, positions[:, 1:]), 1)
        return self.pos_drop(torch.cat((extra.expand(patches.shape[0], -1, -1), patches), 1) + positions)

    def run_blocks(self, x: Tensor, *, keep: bool = True) -> tuple[Tensor, Tokens]:
        """Blocks and slimming.

        Args:
            x: (B, E + N, C).
            keep: return the patch tokens after every block, slimming included.

        Source: SiT, arXiv:2111.12624, token slimming between stages: TSM after the last block of each, past the class
        token.

        Returns:
            Tokens of the last block (B, E + N', C), and L tensors (B, N_l, C) that are views, none if not ``keep``.
        """
        kept: Tokens = []
        first = self.extra_tokens
        slimming = dict(zip(self.slim_index, self.tsm, strict=True)) if self.slimmed else {}
        for number, block in enumerate(self.blocks, start=1):
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x)
            if number in slimming:
                x = torch.cat((x[:, :first], slimming[number](x[:, first:])), 1)
            if keep:
                kept.append(x[:, first:])
        return x, kept

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and the distillation token's, which are the same tensor where there is no such token."""
        x = self.norm(x)
        logits = self.head(x[:, 0])
        return logits, self.head_dist(x[:, 1]) if self.conv_distillation else logits

    def forward(self, images: Tensor) -> Outputs:
        """Logits (B, K) and tokens.

        Returns:
            training: (class logits, distillation logits, recovered tokens of every block, L times (B, N, C));
            evaluation: (logits, tokens of every block, L times (B, N_l, C)), the mean of both heads where there are
            two; ``logits_only``: logits.
        """
        x, tokens = self.run_blocks(self.embed(images), keep=not self.logits_only)
        if self.logits_only:
            return self.mean_logits(*self.classify(x[:, : self.extra_tokens]))
        logits, distilled = self.classify(x)
        if not self.training:
            return self.mean_logits(logits, distilled), tokens
        if self.slimmed and self.recover:
            tokens = [reverse(kept) for reverse, kept in zip(self.rtsm, tokens, strict=True)]
        return logits, distilled, tokens

    def mean_logits(self, logits: Tensor, distilled: Tensor) -> Tensor:
        """What evaluation answers with."""
        return (logits + distilled) / 2 if self.conv_distillation else logits

    def forward_parts(self, images: Tensor, *, logits: bool, tokens: bool) -> tuple[Tensor | None, Tokens]:
        """Evaluation as far as a loss needs it: without the head, or without keeping tokens."""
        x, kept = self.run_blocks(self.embed(images), keep=tokens)
        return (self.mean_logits(*self.classify(x[:, : self.extra_tokens])) if logits else None), kept

    def deployed(self, *, fold_batch_norm: bool = True) -> LVViT:
        """A copy for inference: logits only, no reverse modules in memory, batch norm folded into the stem.

        It traces, compiles and exports; its logits are those of the evaluation mode.
        """
        model = copy.copy(self)
        model._modules = {name: part for name, part in self._modules.items() if name not in ("rtsm", "aux_head")}
        model = copy.deepcopy(model).eval().requires_grad_(False)
        model.logits_only, model.recover = True, False
        if fold_batch_norm and isinstance(model.patch_embed, _ConvStem):
            model.patch_embed = model.patch_embed.fuse().requires_grad_(False)
        return model


def _head(width: int, num_classes: int) -> nn.Module:
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


def count_ops(model: LVViT) -> OpCounts:
    """Operations of one image in evaluation mode, by kind; the reverse modules and ``aux_head`` do not run there."""
    return count_operations(model, torch.empty(1, 3, *model.image_shape, device="meta")).published


def count_published_parameters(model: nn.Module) -> int:
    """Parameters as the paper counts them: all but the reverse modules, the frozen ``aux_head`` included."""
    return sum(value.numel() for name, value in model.named_parameters() if not name.startswith("rtsm."))


# ---------------------------------------------------------------------------------------------------------------------
# The published sizes

DEFAULT_CFG: Mapping[str, Any] = {
    "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.9,
    "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    "classifier": "head",
}  # fmt: skip
"""As published, for every size; nothing here reads it."""


def build_lvvit(name: str, **kwargs: Any) -> LVViT:
    """A size of ``SIZES`` with random weights; keyword arguments are those of ``LVViT`` and win over the size's."""
    model = LVViT(**{**COMMON, **SIZES[name], **kwargs})
    model.default_cfg = dict(DEFAULT_CFG)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return model


def _register(name: str) -> Callable[..., LVViT]:
    def factory(pretrained: bool = False, **kwargs: Any) -> LVViT:
        if pretrained:
            raise CheckpointError(
                f"{name}: there are no weights that could be fetched, as the published files have no address that "
                "could be checked; get the one that the README of SiT links and pass weights=FILE: "
                f"torch.hub.load('sit', '{name}', source='local', weights=FILE)"
            )
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # what timm's registry adds
            kwargs.pop(key, None)
        return build_lvvit(name, **kwargs)

    factory.__name__ = factory.__qualname__ = name
    size = SIZES[name]
    factory.__doc__ = f"{size['depth']} blocks of width {size['embed_dim']}; slimmed with distillation_type='frd'."
    return register_model(factory)


FACTORIES: Mapping[str, Callable[..., LVViT]] = {name: _register(name) for name in SIZES}
"""Name -> function with timm's signature of model factories; the published names are importable from here, too."""
globals().update(FACTORIES)
