"""Gates of blocks and patches, and what every gated backbone shares.

UVC, arXiv:2203.08243. Each block has a pair of logits (index 0 skip, index 1 run), each
patch position may have one logit, and a linear layer may score patch tokens for selection by image.

B batch, N patches, T tokens (patches, class token and, where there is one, distillation token), D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from timm.layers import trunc_normal_  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from common.layers import init_linear, nearest_side
from common.run.errors import UsageError

GATE_TAU = 0.5
"""Temperature of the blocks' Gumbel softmax."""

GateMode = Literal["gumbel", "soft_l0", "softmax"]
PatchMode = Literal["off", "soft", "hard", "remove"]
Network = TypeVar("Network", bound=nn.Module)


def gumbel_softmax(logits: Tensor, tau: float, *, hard: bool, generator: torch.Generator | None = None) -> Tensor:
    """A sample over the last dimension, as ``torch.nn.functional.gumbel_softmax`` draws it.

    Args:
        logits: of any shape.
        tau: temperature.
        hard: one-hot in the forward pass, the soft sample's gradient in the backward pass.
        generator: source of the noise, instead of the global one: ranks that seed theirs alike draw alike.
    """
    noise = torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_(generator=generator)
    soft = ((logits - noise.log()) / tau).softmax(-1)
    if not hard:
        return soft
    index = soft.argmax(-1, keepdim=True)
    return torch.zeros_like(soft).scatter_(-1, index, 1.0) - soft.detach() + soft


def gate_weights(
    gates: Tensor, mode: GateMode, *, hard: bool = False, eps: float = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    """Weights (skip, run) of gate logits, (..., 2); they sum to one.

    Args:
        gates: logits (..., 2).
        mode: ``gumbel`` a Gumbel-softmax sample at temperature 0.5; ``soft_l0`` g1^2 / (g1^2 + eps), in which the skip
            logit plays no part; ``softmax`` of the pair.
        hard: ``gumbel`` only, see ``gumbel_softmax``.
        eps: ``soft_l0`` only.

    Raises:
        ValueError: unknown ``mode``.

    Source: arXiv:2203.08243, block gating: Gumbel softmax of the pair (skip, run).
    """
    if mode == "gumbel":
        return gumbel_softmax(gates, GATE_TAU, hard=hard, generator=generator)
    if mode == "soft_l0":
        square = gates[..., 1].square()
        run = square / (square + eps)
        return torch.stack([1 - run, run], dim=-1)
    if mode == "softmax":
        return gates.softmax(-1)
    raise ValueError(f"the mode of the gates must be gumbel, soft_l0 or softmax, got {mode!r}")


def select_tokens(
    tokens: Tensor, scores: Tensor, *, tau: float, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Zero all but the best-scored patch tokens of each image; gradients pass straight through to the scores.

    Args:
        tokens: patch tokens (B, N, D).
        scores: (B, N).
        tau: temperature of the relaxed choice, positive.
        ratio: share of tokens kept, rounded down; token 0 is kept besides.

    Returns:
        (B, N, D), zeros where a token was not selected.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the share of tokens to keep must be from 0 to 1, got {ratio}")
    noise = torch.empty_like(scores).exponential_(generator=generator)
    soft = ((scores.log_softmax(-1) - noise.log()) / tau).softmax(-1)  # (B, N)
    chosen = soft.topk(int(ratio * scores.shape[1]), dim=-1).indices
    kept = torch.zeros_like(soft).scatter_(-1, chosen, 1.0) - soft.detach() + soft
    kept = torch.cat([torch.ones_like(kept[:, :1]), kept[:, 1:]], dim=1)
    return tokens * kept[..., None]


@dataclass
class GateSettings:
    """How the gates act in a forward pass; plain numbers, so that nothing has to be read from the device.

    Attributes:
        block_gating: blend every block's output with its input by the gate's weights; off, a block runs only where its
            run logit is strictly larger.
        mode, hard, eps: see ``gate_weights``.
        warmup: both weights 0.5.
        jumping: the final norm takes the sum of the stream after every block.
        patch: ``soft`` multiplies patch tokens by their gate; ``hard`` by 0 or 1, patch 0 always 1; ``remove`` is
            ``soft`` and takes patches with a gate below one half out of the sequence; ``off``.
    """

    block_gating: bool = False
    mode: GateMode = "gumbel"
    hard: bool = False
    eps: float = 0.1
    warmup: bool = False
    jumping: bool = False
    patch: PatchMode = "off"


class GatedTransformer(nn.Module):
    """Base of the backbones: L blocks with skip gates between an embedding of patches and the heads.

    A subclass makes the modules and ``embed_patches``.

    Args:
        depth, embed_dim, num_heads, mlp_ratio, num_classes: of the network.
        distilled: there is a distillation token and a second head.

    Attributes:
        image_size: (height, width) of the input in pixels.
        gates: the settings of the forward pass.
        block_skip_gating: logits (L, 2), initially (-1, 1).
        patch_gating: logits (1, N, 1) after ``add_patch_gates``, else None.
        gumbel: scores of patches, after ``add_token_scores``.
        running: which blocks run, where ``fix_blocks`` froze that; None reads the logits in every hard forward pass,
            which waits for the device.
        kept_patches: the same for the patches of ``patch = "remove"``.
        embeds_patches_apart: a patch that is removed need not be embedded either.
        values_apart: a head can have fewer value dimensions than queries, so that single ones save something.
        least_kept: heads and neurons that every block executes, whatever is removed.
    """

    image_size: tuple[int, int]
    num_patches: int
    embeds_patches_apart = True
    values_apart = True
    least_kept = 0
    patch_gating: nn.Parameter | None
    cls_token: nn.Parameter
    dist_token: nn.Parameter | None
    pos_embed: nn.Parameter
    blocks: nn.ModuleList
    norm: nn.LayerNorm
    head: nn.Linear
    head_dist: nn.Linear | None
    gumbel: nn.Linear

    def __init__(
        self, depth: int, embed_dim: int, num_heads: int, mlp_ratio: float, num_classes: int, *, distilled: bool = False
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.num_classes = embed_dim, num_heads, num_classes
        self.hidden_dim = int(embed_dim * mlp_ratio)
        self.num_prefix_tokens = 2 if distilled else 1
        self.add_gates(depth)

    def add_gates(self, depth: int) -> None:
        """Gates of the blocks, which run; none of patches."""
        self.gates = GateSettings()
        self.block_skip_gating = nn.Parameter(torch.tensor([-1.0, 1.0]).repeat(depth, 1))
        self.register_parameter("patch_gating", None)
        self.running: tuple[bool, ...] | None = None
        self.kept_patches: Tensor | None = None

    def add_layers(
        self, block: Callable[..., nn.Module], positions: nn.Parameter, drop_path: Sequence[float], *, norm_eps: float
    ) -> None:
        """All that follows the embedding of patches: tokens, blocks, heads, with their initial weights.

        Args:
            block: makes a block from its ``drop_path``.
            positions: (1, T, D), trained or not.
            drop_path: rate of each block.
        """
        width, distilled = self.embed_dim, self.num_prefix_tokens == 2
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), positions
        self.register_parameter("dist_token", nn.Parameter(torch.zeros(1, 1, width)) if distilled else None)
        self.blocks = nn.ModuleList(block(drop_path=rate) for rate in drop_path)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.head = nn.Linear(width, self.num_classes)
        self.head_dist = nn.Linear(width, self.num_classes) if distilled else None
        for token in (self.cls_token, self.pos_embed, self.dist_token):
            if token is not None and token.requires_grad:
                trunc_normal_(token, std=0.02)
        self.apply(init_linear)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.embed_dim // self.num_heads

    def add_patch_gates(self, value: float = 3.0) -> None:
        """Give every patch position a gate of logit ``value``."""
        like = self.block_skip_gating
        self.patch_gating = nn.Parameter(
            torch.full((1, self.num_patches, 1), value, dtype=like.dtype, device=like.device)
        )

    def add_token_scores(self) -> None:
        """Give the network the linear layer that scores patches for selection by image, where it has none."""
        if not hasattr(self, "gumbel"):
            like = self.cls_token
            self.gumbel = nn.Linear(self.embed_dim, 1, device=like.device, dtype=like.dtype)

    def runs(self) -> tuple[bool, ...]:
        """Which blocks run by the hard rule: run logit strictly above skip logit. Waits for the device."""
        if self.running is not None:
            return self.running
        return tuple(run > skip for skip, run in self.block_skip_gating.detach().tolist())

    def fix_blocks(self, running: Sequence[bool] | None = None) -> None:
        """Freeze which blocks run and which patches stay, so that forward passes read nothing from the device."""
        self.running = None
        self.running = tuple(running) if running is not None else self.runs()
        if self.patch_gating is not None:
            self.kept_patches = self.find_kept_patches()

    def find_kept_patches(self) -> Tensor:
        """Positions whose gate is at least one half, (<=N,)."""
        assert self.patch_gating is not None
        return (self.patch_gating.detach().flatten() >= 0).nonzero().flatten()

    def gate_patches(self, tokens: Tensor) -> Tensor:
        """Apply the patch gates to patch tokens (B, N, D), before positions are added."""
        if self.gates.patch == "off":
            return tokens
        if self.patch_gating is None:
            raise RuntimeError("patch gating is on but the model has no patch gates; call add_patch_gates() first")
        gate = self.patch_gating.sigmoid()
        if self.gates.patch == "hard":
            gate = (gate >= 0.5).to(tokens.dtype)
            gate = torch.cat([torch.ones_like(gate[:, :1]), gate[:, 1:]], dim=1)
        return tokens * gate

    def drop_patches(self, tokens: Tensor) -> Tensor:
        """Take removed patches out of the sequence of tokens with positions, (B, T, D) -> (B, <=T, D)."""
        if self.gates.patch != "remove":
            return tokens
        kept = self.kept_patches if self.kept_patches is not None else self.find_kept_patches()
        patches = tokens[:, self.num_prefix_tokens :].index_select(1, kept)
        return torch.cat([tokens[:, : self.num_prefix_tokens], patches], dim=1)

    def run_blocks(self, x: Tensor, *options: Any) -> Tensor:
        """Blocks under their gates, (B, T, D) -> (B, T, D); each gets ``options`` besides.

        The block's output holds its input, so the run weight scales the residual update.

        Source: arXiv:2203.08243, Figure 1 (2): x <- run block(x) + skip x.
        """
        gates, summed = self.gates, torch.zeros_like(x) if self.gates.jumping else None
        running = () if gates.block_gating else self.runs()
        for index, block in enumerate(self.blocks):
            if gates.block_gating:
                if gates.warmup:
                    skip = run = 0.5
                else:
                    weights = gate_weights(self.block_skip_gating[index], gates.mode, hard=gates.hard, eps=gates.eps)
                    skip, run = weights.unbind()
                x = run * block(x, *options) + skip * x
            elif running[index]:
                x = block(x, *options)
            if summed is not None:
                summed = summed + x
        return x if summed is None else summed

    def embed_patches(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) of exactly ``image_size`` to patch tokens (B, N, D)."""
        raise NotImplementedError

    def forward_features(self, images: Tensor, tau: float = -1.0, ratio: float = 0.9) -> Tensor:
        """Normalised tokens (B, T, D); arguments as ``forward``."""
        x = self.gate_patches(self.embed_patches(images))  # (B, N, D)
        if tau > 0:
            if not hasattr(self, "gumbel"):
                raise RuntimeError("token selection needs the layer of scores; call add_token_scores() first")
            x = select_tokens(x, self.gumbel(x).squeeze(-1), tau=tau, ratio=ratio)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        return self.norm(self.run_blocks(self.drop_patches(x)))

    def forward(self, images: Tensor, tau: float = -1.0, ratio: float = 0.9) -> Tensor | tuple[Tensor, Tensor]:
        """Class logits.

        Args:
            images: (B, 3, height, width) of exactly ``image_size``.
            tau: temperature of the selection of patch tokens; none are selected unless it is positive.
            ratio: share of patch tokens that this selection keeps.

        Returns:
            In evaluation mode logits (B, classes), the mean of the two heads where there are two. In training mode
            those of the class and of the distillation token; the same twice where there is one head.
        """
        x = self.forward_features(images, tau, ratio)
        logits = self.head(x[:, 0])
        distilled = self.head_dist(x[:, 1]) if self.head_dist is not None else logits
        if self.training:
            return logits, distilled
        return (logits + distilled) / 2 if self.head_dist is not None else logits

    def embed_macs(self, batch: int = 1) -> int:
        """Multiply-accumulates of the embedding of ``batch`` images by the paper's rules."""
        raise NotImplementedError

    def block_macs(self, batch: int = 1) -> tuple[int, int, int, int, int, int]:
        """Those of a dense block: qkv, q k^T, attention times v, proj, fc1, fc2.

        Head, biases and normalisation are not counted.
        """
        tokens = self.num_patches + self.num_prefix_tokens
        rows, width = batch * tokens, self.embed_dim
        product, mlp = rows * tokens * width, rows * width * self.hidden_dim
        return rows * width * 3 * width, product, product, rows * width**2, mlp, mlp

    def no_weight_decay(self) -> set[str]:
        """Names that stage 2 does not decay."""
        return {"pos_embed", "cls_token", "dist_token"}


def check_patches_fill(img_size: int | tuple[int, int], patch_size: int) -> None:
    """Whether patches fill an image of such sides in pixels; a strip beside the last patch would never be seen.

    Raises:
        UsageError: they do not.
    """
    for side in (img_size, img_size) if isinstance(img_size, int) else img_size:
        if (nearest := nearest_side(side, patch_size)) != side:
            raise UsageError(
                f"--img_size {side}: patches of {patch_size} pixels do not fill it; give a multiple, such as {nearest}"
            )


def register_masks(model: Network) -> Network:
    """Give every module with a weight a buffer ``mask`` of ones in the weight's shape; masks that exist stay.

    Both stages do this to all modules, LayerNorm and head too, so that state dicts are interchangeable.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and "mask" not in vars(module)["_buffers"]:
            module.register_buffer("mask", torch.ones_like(weight.detach()))
    return model


def masked_weights(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Every weight that has a mask, with it."""
    modules = [module for module in model.modules() if vars(module)["_buffers"].get("mask") is not None]
    return [(module.get_parameter("weight"), module.get_buffer("mask")) for module in modules]


@torch.no_grad()
def apply_masks_(model: Network) -> Network:
    """Multiply every weight by its mask, in place."""
    for weight, mask in masked_weights(model):
        weight.mul_(mask)
    return model


def count_mask_elements(model: nn.Module) -> tuple[Tensor, int]:
    """Sum of all masks, on their device, and their size: the printed "Parameter size"."""
    masks = [mask for _, mask in masked_weights(model)]
    if not masks:
        return torch.zeros((), dtype=torch.float64), 0
    return torch.stack([mask.sum(dtype=torch.float64) for mask in masks]).sum(), sum(mask.numel() for mask in masks)
