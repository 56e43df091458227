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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from common.layers import TokensToToken, check_image_size
from common.measure.flops import Counted, OpCounts, count_operations
from uvc.structure import frozen

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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompactConfig":
        """Read what ``dataclasses.asdict`` gave, perhaps through JSON.

        Raises:
            ValueError: naming what is missing, unknown or impossible.
        """
        try:
            blocks = tuple(BlockShape(**frozen(block)) for block in values["blocks"])
            arguments: dict[str, Any] = {**frozen(values), "blocks": blocks}
            return cls(**arguments)
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
        head_dim: d, the most value dimensions that a head can keep.
        shape: the heads and how their values are held.
        qkv_bias: whether ``qkv`` has a bias.
        scale: of the scores; None for 1/sqrt(d).

    Attributes:
        value_rows: which of the value rows hold the kept dimensions, head after head, (V,).
        spread: which value row each of the K x d attention channels reads; an unused channel reads any.
        gather: which attention channel each column of ``proj`` reads; a padded column, whose weights are zero, any.
    """

    spread: Tensor
    gather: Tensor

    def __init__(
        self, dim: int, head_dim: int, shape: BlockShape, *, qkv_bias: bool = True, scale: float | None = None
    ) -> None:
        super().__init__()
        if not shape.heads or max(shape.value_dims) > head_dim:
            raise ValueError(f"every head keeps 1 to {head_dim} value dimensions, got {list(shape.value_dims)}")
        self.heads, self.head_dim, self.scale = shape.heads, head_dim, scale
        self.keys, width = shape.heads * head_dim, shape.held_values(head_dim)
        self.qkv = nn.Linear(dim, 2 * self.keys + width, bias=qkv_bias)
        self.proj = nn.Linear(width, dim)
        channels = [head * head_dim + place for head, kept in enumerate(shape.value_dims) for place in range(kept)]
        self.full = shape.full_values or len(channels) == width == self.keys  # nothing to spread
        self.value_rows = channels if shape.full_values else list(range(len(channels)))
        spread = torch.zeros(self.keys, dtype=torch.long)
        spread[channels] = torch.arange(len(channels))
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer("gather", torch.tensor(channels + [0] * (width - len(channels))), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([self.keys, self.keys, self.proj.in_features], dim=-1)
        if not self.full:
            v = v.index_select(-1, self.spread)
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)  # (B, T, K d)
        return self.proj(mixed if self.full else mixed.index_select(-1, self.gather))


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
            self.attn = CompactAttention(dim, config.head_dim, shape, qkv_bias=config.qkv_bias, scale=config.scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps) if thinks else nn.Identity()
        self.mlp: nn.Module = Constant(dim)
        if thinks:
            self.mlp = Mlp(dim, round_up(shape.neurons, shape.multiple))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def places(self) -> dict[str, list[int]]:
        """Where the layers hold what is kept, the rest being zero: rows of qkv and fc1, columns of proj and fc2."""
        held: dict[str, list[int]] = {}
        if isinstance(self.attn, CompactAttention):
            first = 2 * self.attn.keys
            held["attn.proj"] = self.attn.value_rows
            held["attn.qkv"] = [*range(first), *(first + row for row in self.attn.value_rows)]
        if self.shape.neurons:
            held["mlp.fc1"] = held["mlp.fc2"] = list(range(self.shape.neurons))
        return held

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
            self.tokens_to_token = TokensToToken(config.image_size, config.in_chans, config.token_dim, dim)
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
        check_image_size(images, config.image_size)
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
        sums = self.config.sum_blocks
        total = self.config.skipped_first * x if sums else x
        for block, shape in zip(self.blocks, self.config.blocks, strict=True):
            x = block(x)
            total = total + shape.repeats * x if sums else x
        x = self.norm(total[:, : self.config.prefix])
        if self.head_dist is None:
            return self.head(x[:, 0])
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2

    def places(self) -> dict[str, list[int]]:
        """``CompactBlock.places`` of all blocks, by the layers' names."""
        blocks = enumerate(self.blocks)
        return {
            f"blocks.{index}.{layer}": held
            for index, block in blocks
            if isinstance(block, CompactBlock)
            for layer, held in block.places().items()
        }

    def fill_(self, state: Mapping[str, Tensor], sources: Mapping[str, Sequence[int]]) -> "CompactViT":
        """``fill_`` with the layers of ``places``."""
        fill_(self, state, sources, self.places())
        return self

    def count(self) -> Counted:
        """Operations of one image, without weights or data: as executed, and as ``published``.

        The latter leaves out zeros that only pad, and values spread to d channels per head.
        """

        def as_head(inside: OpCounts, args: Any, result: Any) -> Mapping[str, int]:
            del args, result
            return {"head": inside["linear"]}

        heads: list[nn.Module] = [head for head in (self.head, self.head_dist) if head is not None]
        size = (1, self.config.in_chans, *self.config.image_size)
        images = torch.empty(size, dtype=self.cls_token.dtype, device="meta")
        return count_operations(self, images, published=dict.fromkeys(heads, as_head))


@torch.no_grad()
def fill_(
    network: nn.Module,
    state: Mapping[str, Tensor],
    sources: Mapping[str, Sequence[int]],
    targets: Mapping[str, Sequence[int]],
) -> None:
    """Copy weights in; what is not named in a layer of ``targets`` becomes zero.

    Args:
        network: takes them.
        state: weights by the network's names; others are not looked at.
        sources, targets: by layer, rows of the weight and the bias, or columns of the weight (``proj``, ``fc2``): where
            ``state`` holds what is kept, and where the network does.
    """
    for name, parameter in network.named_parameters():
        layer, kind = name.rpartition(".")[::2]
        by_columns = layer.endswith(("attn.proj", "fc2"))
        if layer not in targets or (by_columns and kind == "bias"):
            parameter.copy_(state[name])
            continue
        parameter.zero_()
        source, target = list(sources[layer]), list(targets[layer])
        if by_columns:
            parameter[:, target] = state[name][:, source]
        else:
            parameter[target] = state[name][source]


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
    return made.fill_(network.state_dict(), network.places())
