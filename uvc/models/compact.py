"""A pruned DeiT or T2T-ViT as a plain smaller network: what UVC's masks and gates leave, and nothing else.

UVC (ICLR 2022) ends with a dense network, masks and gates; the official code never makes it smaller. Here every block
has its own number of heads, its own value dimensions in each head and its own neurons; skipped blocks are not there.
Queries and keys keep all d dimensions of a head, because scores need them, and the scale stays 1/sqrt(d).

Letters: B batch, T tokens (class and distillation token included), D width, K kept heads, d head size,
V kept value dimensions of all heads together, J kept neurons.

Heads may keep different numbers of value dimensions. Fused attention wants them equal, so values are spread from V to
K x d channels by one ``index_select`` before it and gathered to V after it; what lands in the unused channels is
never read. The linear layers thus work on V, and only attention itself on K x d. Moving values costs more than it
saves where the width is small: ``padded`` then gives the layers zeros for what was removed, and nothing moves.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from common.measure.flops import Counted, OpCounts, PublishedRule, count_operations
from uvc.models.t2t_vit import TokensToToken

LANES = 16
"""Layers whose sizes are multiples of this run fastest: on CPUs with AVX-512 and on tensor cores."""

MOVE = 160
"""Moving a value channel to its head costs about as much as this many multiply-accumulates (Xeon, float32)."""


def round_up(number: int, multiple: int) -> int:
    """The next multiple; 0 stays 0."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class BlockShape:
    """What one block keeps.

    Attributes:
        value_dims: kept value dimensions of each kept head, at least 1 each; empty: the attention branch is a constant.
        neurons: kept neurons; 0: the MLP branch is a constant.
        multiple: layers are padded by zero rows to multiples of this, which some matrix kernels like better.
        repeats: how often the block's output counts in the sum over all blocks: itself and the skipped ones behind it.
        full_values: the layers hold d value dimensions for each kept head, zeros for those removed.
    """

    value_dims: tuple[int, ...]
    neurons: int
    multiple: int = 1
    repeats: int = 1
    full_values: bool = False

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.value_dims) or self.neurons < 0 or self.multiple < 1:
            raise ValueError(f"a kept head keeps at least one dimension and counts are not negative, got {self}")

    @property
    def heads(self) -> int:
        return len(self.value_dims)

    @property
    def value_width(self) -> int:
        """V, without padding."""
        return sum(self.value_dims)

    def held_values(self, head_dim: int) -> int:
        """Value channels that the layers hold: V and its padding."""
        return self.heads * head_dim if self.full_values else round_up(self.value_width, self.multiple)


@dataclass(frozen=True)
class CompactConfig:
    """Everything that the modules of a compact network depend on; the weights are the rest.

    Attributes:
        architecture: name of the dense network it was made from, for information.
        image_size: (height, width) in pixels.
        patches: N, patches of the dense network.
        positions: patch positions that are embedded; None: all.
        drop_tokens: the other positions have no token at all; otherwise theirs is zero and only gets its position.
        patch_scale: tokens are multiplied by a constant per position (UVC's soft patch gate).
        token_dim: width of T2T's tokens-to-token stages; 0: patches are embedded by one convolution.
        scale: of attention scores; None for 1/sqrt(d).
        sum_blocks: the last normalisation gets the sum of the streams behind all blocks (UVC's "jumping").
        skipped_first: skipped blocks before the first one kept, which count in that sum.
    """

    architecture: str
    image_size: tuple[int, int]
    patch_size: int
    in_chans: int
    embed_dim: int
    head_dim: int
    num_classes: int
    blocks: tuple[BlockShape, ...]
    patches: int
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    distilled: bool = False
    positions: tuple[int, ...] | None = None
    drop_tokens: bool = False
    patch_scale: bool = False
    token_dim: int = 0
    scale: float | None = None
    sum_blocks: bool = False
    skipped_first: int = 0

    @property
    def prefix(self) -> int:
        """Class token, and distillation token."""
        return 1 + self.distilled

    @property
    def tokens(self) -> int:
        """T, tokens that pass the blocks."""
        dropped = self.drop_tokens and self.positions is not None
        return self.prefix + (len(self.positions or ()) if dropped else self.patches)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompactConfig":
        """Read what ``as_dict`` gave, perhaps through JSON.

        Raises:
            ValueError: naming what is missing, unknown or impossible.
        """
        values = dict(values)
        try:
            values["image_size"] = tuple(values["image_size"])
            values["positions"] = None if values.get("positions") is None else tuple(values["positions"])
            values["blocks"] = tuple(
                BlockShape(**{**block, "value_dims": tuple(block["value_dims"])}) for block in values["blocks"]
            )
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of a compact network: {error}") from error


class Constant(nn.Module):
    """A branch of which only its bias is left: the same vector for every token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias


class CompactAttention(nn.Module):
    """Self-attention of K heads with d query and key dimensions and any number of value dimensions each.

    Rows of ``qkv``: K x d of the queries, K x d of the keys, V (rounded up) of the values, head after head.

    Args:
        dim: D.
        head_dim: d.
        value_dims: kept value dimensions of each head, 1 to d.
        qkv_bias: whether ``qkv`` has a bias.
        scale: of the scores; None for 1/sqrt(d).
        multiple: V is rounded up to a multiple of this by rows whose output nobody reads.
        full_values: hold K x d value rows instead, those that were removed being zero.

    Attributes:
        value_rows: which of the value rows hold the kept dimensions, head after head, (V,).
    """

    spread: Tensor
    gather: Tensor

    def __init__(
        self,
        dim: int,
        head_dim: int,
        value_dims: Sequence[int],
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        multiple: int = 1,
        full_values: bool = False,
    ) -> None:
        super().__init__()
        if not value_dims or not all(1 <= width <= head_dim for width in value_dims):
            raise ValueError(f"every head keeps 1 to {head_dim} value dimensions, got {list(value_dims)}")
        self.heads, self.head_dim, self.scale = len(value_dims), head_dim, scale
        self.keys = self.heads * head_dim
        width = BlockShape(tuple(value_dims), 0, multiple, full_values=full_values).held_values(head_dim)
        self.qkv = nn.Linear(dim, 2 * self.keys + width, bias=qkv_bias)
        self.proj = nn.Linear(width, dim)
        kept = sum(value_dims)
        self.full = width == self.keys and (full_values or kept == width)  # nothing to spread
        self.even = not self.full and len(set(value_dims)) == 1 and width == kept
        spread, gather = _channels(value_dims, head_dim, max(width, kept))
        self.value_rows: list[int] = gather[:kept].tolist() if full_values else list(range(kept))
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer("gather", gather, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x)
        if self.full:
            q, k, v = qkv.view(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            qk, v = qkv.split([2 * self.keys, self.proj.in_features], dim=-1)
            q, k = qk.view(batch, tokens, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            if self.even:
                kept = self.proj.in_features // self.heads
                v = F.pad(v.view(batch, tokens, self.heads, kept), (0, self.head_dim - kept)).transpose(1, 2)
            else:
                v = v.index_select(-1, self.spread).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)  # (B, T, K, d)
        if self.even:
            mixed = mixed[..., : self.proj.in_features // self.heads]
        mixed = mixed.reshape(batch, tokens, -1)
        if not (self.full or self.even):
            mixed = mixed.index_select(-1, self.gather)
        return self.proj(mixed)


def _channels(value_dims: Sequence[int], head_dim: int, width: int) -> tuple[Tensor, Tensor]:
    """Which of ``width`` value channels each of the K x d attention channels reads, and which of these is read back.

    Unused attention channels read any channel; padded value channels are read back from any (their weights are zero).
    """
    spread = torch.zeros(len(value_dims) * head_dim, dtype=torch.long)
    gather = torch.zeros(width, dtype=torch.long)
    start = 0
    for head, kept in enumerate(value_dims):
        place = torch.arange(kept)
        spread[head * head_dim + place] = start + place
        gather[start + place] = head * head_dim + place
        start += kept
    return spread, gather


class CompactBlock(nn.Module):
    """Pre-norm block of any size; a branch without heads or neurons adds its bias alone and needs no normalisation."""

    def __init__(self, config: CompactConfig, shape: BlockShape) -> None:
        super().__init__()
        dim, eps = config.embed_dim, config.norm_eps
        self.shape, self.head_dim = shape, config.head_dim
        attends, thinks = shape.heads > 0, shape.neurons > 0
        self.norm1 = nn.LayerNorm(dim, eps=eps) if attends else nn.Identity()
        self.attn: nn.Module = Constant(dim)
        if attends:
            self.attn = CompactAttention(
                dim,
                config.head_dim,
                shape.value_dims,
                qkv_bias=config.qkv_bias,
                scale=config.scale,
                multiple=shape.multiple,
                full_values=shape.full_values,
            )
        self.norm2 = nn.LayerNorm(dim, eps=eps) if thinks else nn.Identity()
        self.mlp: nn.Module = Constant(dim)
        if thinks:
            self.mlp = Mlp(dim, round_up(shape.neurons, shape.multiple))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def published_ops(self, inside: OpCounts, args: tuple[Tensor, ...], result: Tensor) -> OpCounts:
        """What is executed, less padding: (2 d K + V) D T for qkv, K d T^2 and V T^2, V D T for proj, 2 J D T."""
        batch, tokens, dim = args[0].shape
        shape = self.shape
        keys = shape.heads * self.head_dim
        padding = shape.held_values(self.head_dim) - shape.value_width
        padding += round_up(shape.neurons, shape.multiple) - shape.neurons
        spread = (keys - shape.value_width) * tokens**2
        return inside + {"linear": -2 * batch * padding * dim * tokens, "matmul": -batch * spread}


class PatchEmbedding(nn.Module):
    """Patch embedding by one convolution, or by one matrix product over the patches that are kept."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Images to tokens (B, N, D), or to those of ``positions``, which count patches row by row."""
        if positions is None:
            return self.proj(images).flatten(2).transpose(1, 2)
        batch, channels, height, width = images.shape
        side = self.patch_size
        patches = images.reshape(batch, channels, height // side, side, width // side, side)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)
        return F.linear(patches.index_select(1, positions), self.proj.weight.flatten(1), self.proj.bias)


class CompactViT(nn.Module):
    """The compact network: images (B, 3, H, W) to logits (B, classes), the mean of both heads where it is distilled.

    Its parameters have the names of the dense network's, with blocks renumbered; ``uvc.compress`` makes one out of a
    masked checkpoint.
    """

    positions: Tensor | None

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        kept = None if config.positions is None else torch.tensor(config.positions, dtype=torch.long)
        self.register_buffer("positions", kept, persistent=False)
        if config.token_dim:
            self.tokens_to_token = TokensToToken(config.image_size[0], config.in_chans, config.token_dim, dim)
        else:
            self.patch_embed = PatchEmbedding(config.patch_size, config.in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim))
        if config.patch_scale:
            embedded = config.patches if config.positions is None else len(config.positions)
            self.patch_scale = nn.Parameter(torch.ones(1, embedded, 1))
        self.blocks = nn.ModuleList(CompactBlock(config, shape) for shape in config.blocks)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head = nn.Linear(dim, config.num_classes)
        self.head_dist = nn.Linear(dim, config.num_classes) if config.distilled else None

    def embed(self, images: Tensor) -> Tensor:
        """Tokens with their positions, (B, T, D)."""
        config = self.config
        if images.shape[-2:] != config.image_size:
            raise ValueError(f"expected images of {config.image_size}, got {tuple(images.shape[-2:])}")
        if config.token_dim:
            x = self.tokens_to_token(images)  # its stages overlap: every patch is needed
            x = x if self.positions is None else x.index_select(1, self.positions)
        else:
            x = self.patch_embed(images, self.positions)
        if config.patch_scale:
            x = x * self.patch_scale
        if self.positions is not None and not config.drop_tokens:
            x = x.new_zeros(x.shape[0], config.patches, x.shape[2]).index_copy(1, self.positions, x)
        prefix = [self.cls_token, self.dist_token] if config.distilled else [self.cls_token]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        return x + self.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        if self.config.sum_blocks:
            total = x * self.config.skipped_first
            for block, shape in zip(self.blocks, self.config.blocks, strict=True):
                x = block(x)
                total = total + shape.repeats * x
            x = total
        else:
            for block in self.blocks:
                x = block(x)
        x = self.norm(x[:, : self.config.prefix])
        if self.head_dist is None:
            return self.head(x[:, 0])
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2

    def count(self) -> Counted:
        """Operations of one image, without weights or data: as executed, and without padding (``published``)."""
        config = self.config
        heads = [head for head in (self.head, self.head_dist) if head is not None]
        rules: dict[nn.Module, PublishedRule] = {
            head: lambda inside, args, result: {"head": inside["linear"]} for head in heads
        }
        return count_operations(
            self,
            torch.empty(1, config.in_chans, *config.image_size, dtype=self.cls_token.dtype, device="meta"),
            published=rules,
        )

    def count_ops(self) -> OpCounts:
        """Operations of one image; zeros that only pad, and values spread to d channels per head, are left out."""
        return self.count().published

    def padded_macs(self) -> int:
        """Multiply-accumulates that a pass executes beyond ``count_ops``."""
        counted = self.count()
        return counted.executed.macs - counted.published.macs


@torch.no_grad()
def padded(network: CompactViT, multiple: int = LANES, *, full_values: bool = False) -> CompactViT:
    """The same function with layers padded by zeros where that makes them faster; for running, not for storing.

    Kept neurons and value channels are rounded up to a multiple; where moving values to their heads would cost more
    than multiplying zeros, the layers hold all d value dimensions of a head. Outputs agree to rounding.

    Args:
        network: untouched.
        multiple: 1 gives the layers their exact sizes.
        full_values: let the layers hold all d value dimensions whatever that costs.

    Returns:
        A network on the same device, in the same precision and mode.
    """
    config = network.config

    def sizes(shape: BlockShape) -> BlockShape:
        keys, held = shape.heads * config.head_dim, round_up(shape.value_width, multiple)
        moved = MOVE * (keys + held) if shape.value_width < keys else 0
        cheaper = multiple > 1 and 2 * (keys - held) * config.embed_dim < moved
        return replace(shape, multiple=multiple, full_values=full_values or cheaper)

    made = CompactViT(replace(config, blocks=tuple(sizes(shape) for shape in config.blocks)))
    made.to(network.cls_token).train(network.training)  # pyright: ignore[reportCallIssue, reportArgumentType]
    rows: dict[str, tuple[list[int], list[int]]] = {}  # of layers whose sizes differ: where rows come from, and go to
    columns: dict[str, tuple[list[int], list[int]]] = {}
    for index, (old, new) in enumerate(zip(network.blocks, made.blocks, strict=True)):
        assert isinstance(old, CompactBlock)
        assert isinstance(new, CompactBlock)
        if isinstance(old.attn, CompactAttention) and isinstance(new.attn, CompactAttention):
            keys = list(range(2 * old.attn.keys))
            source, target = old.attn.value_rows, new.attn.value_rows
            columns[f"blocks.{index}.attn.proj"] = source, target
            rows[f"blocks.{index}.attn.qkv"] = (
                [*keys, *(len(keys) + row for row in source)], [*keys, *(len(keys) + row for row in target)],
            )  # fmt: skip
        if old.shape.neurons:
            neurons = list(range(old.shape.neurons))
            rows[f"blocks.{index}.mlp.fc1"] = columns[f"blocks.{index}.mlp.fc2"] = neurons, neurons
    held = dict(network.named_parameters())
    for name, parameter in made.named_parameters():
        layer, kind = name.rpartition(".")[::2]
        if layer in rows:
            source, target = rows[layer]
            parameter.zero_()
            parameter[target] = held[name][source]
        elif layer in columns and kind == "weight":
            source, target = columns[layer]
            parameter.zero_()
            parameter[:, target] = held[name][:, source]
        else:
            parameter.copy_(held[name])
    return made
