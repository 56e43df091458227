"""Remaining cost as a differentiable function of pruning numbers, block gates and patch gates.

UVC, arXiv:2203.08243: R in the constraint R <= B. Cost is multiply-accumulates by the
paper's rules (``GatedTransformer.mac_counts``), relative to the dense network.

L blocks, H heads, d channels of a head, D = H d, M hidden neurons, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uvc.models.gates import GatedTransformer
from uvc.pruning import ceil_straight_through, is_least, whole
from uvc.structure import Structure


def clamp_closed(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` kept in [low, high]; the gradient is one in the closed interval, its ends included, and zero outside.

    ``Tensor.clamp`` of current torch gives zero at the ends. There every share is before anything is pruned, so that
    with it nothing ever would be.
    """
    inside = (x >= low) & (x <= high)
    return torch.where(inside, x, x.detach().clamp(low, high))


def kept_patches(patch_gating: Tensor) -> Tensor:
    """Number of patches whose gate is at least one half, (); straight through to the gates' sigmoid."""
    gate = patch_gating.sigmoid()
    return (gate.detach() >= 0.5).to(gate.dtype).sum() + (gate - gate.detach()).sum()


@dataclass(frozen=True)
class CostModel:
    """R of one network.

    Attributes:
        embed: multiply-accumulates of the embedding.
        terms: (L, 6) of the blocks: qkv, q k^T, attention times v, proj, fc1, fc2.
        num_heads, head_dim, hidden_dim: H, d, M.
        num_patches, num_prefix_tokens: N and the class and distillation tokens.
        embeds_patches_apart: the embedding's cost shrinks with the patches that are removed.
    """

    embed: float
    terms: Tensor
    num_heads: int
    head_dim: int
    hidden_dim: int
    num_patches: int
    num_prefix_tokens: int
    embeds_patches_apart: bool = True

    @classmethod
    def of(
        cls, model: GatedTransformer, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> CostModel:
        """Cost model of a backbone, all blocks counted whatever its gates say."""
        counts = model.mac_counts(1)
        like = model.block_skip_gating
        terms = torch.tensor(counts.blocks, dtype=dtype or like.dtype, device=device or like.device)
        return cls(
            counts.embed, terms, model.num_heads, model.head_dim, model.hidden_dim, model.num_patches,
            model.num_prefix_tokens, model.embeds_patches_apart,
        )  # fmt: skip

    @property
    def full(self) -> Tensor:
        """Multiply-accumulates of the dense network, ()."""
        return self.embed + self.terms.sum()

    def shares(self, s: Tensor, r: Tensor, head_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is left of heads (a), of their output dimensions (c) and of neurons (b), (L,) each.

        Args:
            s: (L, 2). r: (L, H).
            head_scores: (L, H); which heads go first. Not differentiated.
        """
        heads, neurons, dims = ceil_straight_through(s[:, 0]), ceil_straight_through(s[:, 1]), ceil_straight_through(r)
        width = self.num_heads * self.head_dim
        gone = is_least(head_scores, whole(s[:, 0]))  # (L, H)
        pruned_dims = dims.masked_fill(gone, 0.0).sum(1)
        a = clamp_closed((self.num_heads - heads) / self.num_heads, 0.0, 1.0)
        b = clamp_closed((self.hidden_dim - neurons) / self.hidden_dim, 0.0, 1.0)
        c = clamp_closed((width - self.head_dim * heads - pruned_dims) / width, 0.0, 1.0)
        return a, c, b

    def remaining(
        self, s: Tensor, r: Tensor, head_scores: Tensor, run: Tensor | None = None, patch_gating: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Remaining cost of the embedding, (), and of each term of each block, (L, 6).

        Args:
            s, r, head_scores: see ``shares``.
            run: run weight of each block, (L,); None where every block runs.
            patch_gating: logits of patches that will be removed from the sequence; None where they stay. Linear terms
                shrink with the number of tokens, the two products of attention with its square.
        """
        a, c, b = self.shares(s, r, head_scores)
        terms = self.terms * torch.stack([a, a, c, c, b, b], dim=1)
        embed = torch.as_tensor(self.embed, dtype=terms.dtype, device=terms.device)
        if patch_gating is not None:
            kept = kept_patches(patch_gating)
            tokens = (kept + self.num_prefix_tokens) / (self.num_patches + self.num_prefix_tokens)
            square = tokens.square()
            embed = embed * (kept / self.num_patches) if self.embeds_patches_apart else embed
            terms = terms * torch.stack([tokens, square, square, tokens, tokens, tokens])
        return embed, terms if run is None else terms * run[:, None]

    def ratio(
        self, s: Tensor, r: Tensor, head_scores: Tensor, run: Tensor | None = None, patch_gating: Tensor | None = None
    ) -> Tensor:
        """R: the remaining share of the cost, (). Arguments as ``remaining``.

        Source: arXiv:2203.08243, resource constraint: R(s, r, g) <= R_budget.
        """
        embed, terms = self.remaining(s, r, head_scores, run, patch_gating)
        return (embed + terms.sum()) / self.full

    def of_structure(self, structure: Structure) -> float:
        """R of what survives: counted by the paper's rules, queries, keys and values by whole heads."""
        width = self.num_heads * self.head_dim
        tokens = structure.num_tokens / (self.num_patches + self.num_prefix_tokens)
        fewer = structure.patches is not None and self.embeds_patches_apart
        patches = len(structure.patches or ()) / self.num_patches if fewer else 1.0
        total = self.embed * patches
        for row, block in zip(self.terms.tolist(), structure.blocks, strict=True):
            if block.runs:
                a, c = len(block.heads) / self.num_heads, block.num_values / width
                b = (len(block.neurons)) / self.hidden_dim
                total += tokens * (row[0] * a + row[3] * c + (row[4] + row[5]) * b) + tokens**2 * (
                    row[1] * a + row[2] * c
                )
        return total / float(self.full)


class ProjectedCostModel(CostModel):
    """R of ``--flops_with_mhsa 0``: output projections of both halves alone, two per multiply-accumulate plus biases.

    Tokens, gates and everything else do not enter.
    """

    def value(self, s: Tensor, r: Tensor, head_scores: Tensor) -> Tensor:
        """Cost of ``attn.proj`` and ``mlp.fc2`` of all blocks, ()."""
        width = self.num_heads * self.head_dim
        heads, neurons, dims = ceil_straight_through(s[:, 0]), ceil_straight_through(s[:, 1]), ceil_straight_through(r)
        gone = is_least(head_scores, whole(s[:, 0]))
        columns = width - self.head_dim * heads - dims.masked_fill(gone, 0.0).sum(1)
        return (2 * (self.hidden_dim - neurons) * width + width).sum() + (2 * columns * width + width).sum()

    def ratio(
        self, s: Tensor, r: Tensor, head_scores: Tensor, run: Tensor | None = None, patch_gating: Tensor | None = None
    ) -> Tensor:
        """The share of ``value`` that is left, (); ``run`` and ``patch_gating`` are not used."""
        del run, patch_gating
        zero_s, zero_r = torch.zeros_like(s), torch.zeros_like(r)
        return self.value(s, r, head_scores) / self.value(zero_s, zero_r, head_scores)
