"""Remaining cost as a differentiable function of pruning numbers, block gates and patch gates.

UVC, arXiv:2203.08243: R in the constraint R <= B. Cost is multiply-accumulates by the
paper's rules (``GatedTransformer.block_macs``), relative to the dense network.

L blocks, H heads, d channels of a head, D = H d, M hidden neurons, N patches.
"""

from __future__ import annotations

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


class CostModel:
    """R of one network, all blocks counted whatever its gates say.

    Args:
        model: the backbone, for its sizes.
        device, dtype: of the results; None takes those of the gates.

    Attributes:
        embed: multiply-accumulates of the embedding.
        terms: (L, 6) of the blocks: qkv, q k^T, attention times v, proj, fc1, fc2.
        full: of the dense network, ().
    """

    def __init__(
        self, model: GatedTransformer, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.model, like = model, model.block_skip_gating
        self.embed = model.embed_macs()
        rows = [model.block_macs()] * len(model.blocks)
        self.terms = torch.tensor(rows, dtype=dtype or like.dtype, device=device or like.device)
        self.full = self.embed + self.terms.sum()

    def left(self, s: Tensor, r: Tensor, head_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many heads, output dimensions of heads, and neurons are left of each block, (L,) each.

        Args:
            s: (L, 2). r: (L, H).
            head_scores: (L, H); which heads go first. Not differentiated.
        """
        model = self.model
        heads, neurons, dims = ceil_straight_through(s[:, 0]), ceil_straight_through(s[:, 1]), ceil_straight_through(r)
        gone = is_least(head_scores, whole(s[:, 0]))  # (L, H)
        columns = model.embed_dim - model.head_dim * heads
        if model.values_apart:
            columns = columns - dims.masked_fill(gone, 0.0).sum(1)
        return model.num_heads - heads, columns, model.hidden_dim - neurons

    def remaining(
        self, s: Tensor, r: Tensor, head_scores: Tensor, run: Tensor | None = None, patch_gating: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Remaining cost of the embedding, (), and of each term of each block, (L, 6).

        Args:
            s, r, head_scores: see ``left``.
            run: run weight of each block, (L,); None where every block runs.
            patch_gating: logits of patches that will be removed from the sequence; None where they stay.
        """
        left = torch.stack(self.left(s, r, head_scores), dim=1)
        kept = None if patch_gating is None else kept_patches(patch_gating)
        return self._scaled(left, torch.ones_like(s[:, 0]) if run is None else run, kept)

    def _scaled(self, left: Tensor, run: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """See ``remaining``; ``left`` (L, 3) as ``self.left`` gives it, ``kept`` the number of patches.

        Linear terms shrink with the number of tokens, the two products of attention with its square.
        """
        model = self.model
        sizes = left.new_tensor([model.num_heads, model.embed_dim, model.hidden_dim])
        shares = clamp_closed(left / sizes, 0.0, 1.0)
        terms = self.terms * shares[:, [0, 0, 1, 1, 2, 2]] * run[:, None]
        embed = torch.as_tensor(self.embed, dtype=terms.dtype, device=terms.device)
        if kept is not None:
            tokens = (kept + model.num_prefix_tokens) / (model.num_patches + model.num_prefix_tokens)
            square = tokens.square()
            terms = terms * torch.stack([tokens, square, square, tokens, tokens, tokens])
            embed = embed * (kept / model.num_patches) if model.embeds_patches_apart else embed
        return embed, terms

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
        left = []
        for block in structure.blocks:
            heads = max(len(block.heads), self.model.least_kept)
            values = block.num_values if self.model.values_apart else heads * structure.head_dim
            left.append([heads, values, max(len(block.neurons), self.model.least_kept)])
        run = self.terms.new_tensor([block.runs for block in structure.blocks])
        kept = None if structure.patches is None else self.terms.new_tensor(len(structure.patches))
        embed, terms = self._scaled(self.terms.new_tensor(left), run, kept)
        return float((embed + terms.sum()) / self.full)


class ProjectedCostModel(CostModel):
    """R of ``--flops_with_mhsa 0``: output projections of both halves alone, two per multiply-accumulate plus biases.

    Tokens, gates and everything else do not enter.
    """

    def value(self, s: Tensor, r: Tensor, head_scores: Tensor) -> Tensor:
        """Cost of ``attn.proj`` and ``mlp.fc2`` of all blocks, ()."""
        width, (_, columns, neurons) = self.model.embed_dim, self.left(s, r, head_scores)
        return (2 * neurons * width + width).sum() + (2 * columns * width + width).sum()

    def ratio(
        self, s: Tensor, r: Tensor, head_scores: Tensor, run: Tensor | None = None, patch_gating: Tensor | None = None
    ) -> Tensor:
        """The share of ``value`` that is left, (); ``run`` and ``patch_gating`` are not used."""
        del run, patch_gating
        return self.value(s, r, head_scores) / self.value(torch.zeros_like(s), torch.zeros_like(r), head_scores)
