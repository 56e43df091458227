"""One primal-dual step of UVC, in the order of the paper's algorithm.

UVC, arXiv:2203.08243. The Lagrangian

    L = loss + sum y T_{ceil s} + sum p T_{ceil r} + z (R - B)

is minimised over weights, pruning numbers s and r and gates, and maximised over the duals y, p, z >= 0. The weights'
gradient step on the loss is the training loop's; ``PrimalDual.step`` does the rest, for all blocks and heads at once
and without waiting for the device.

L blocks, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.run.errors import CheckpointError
from uvc.cost_model import CostModel, ProjectedCostModel, clamp_closed
from uvc.models.gates import GatedTransformer, gate_weights
from uvc.pruning import Groups, group_scores, least_sum, proximal_step_, removal
from uvc.settings import PrimalDualSettings

INITIAL_DUAL = 1e-3
JUST_BELOW = 1 + 1e-8


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": partial(torch.optim.Adam, betas=(0.0, 0.999)),
    "rmsprop": torch.optim.RMSprop,
}
"""Of s and r, by the names of ``--soptim``."""


class PrimalDual:
    """Pruning numbers, duals and their updates for one model.

    Source: arXiv:2203.08243, problem (5): min over W, s, r, g of the loss, subject to R <= B and T_s = T_r = 0.

    Args:
        model: its gates must have their place; masks are not touched here.
        settings: see ``PrimalDualSettings``.
        seed: of the noise of the cost, the same on every rank, so that all draw the same.

    Attributes:
        s: (L, 2) heads and neurons to remove. r: (L, H) dimensions to remove of each head.
        y: (L, 2). p: (L, H). z: () duals of the same, and of the budget.
        zlr: learning rate of z.
        gate_total, gate_count: gradients of the gates since their last update, each weighted by its place in the
            interval, and their number.
        generator: source of the noise; None takes the global one.
        patches: the patch gates, where they are learned.
        cost: R, which the budget holds. whole_cost: the same unless that is of the output projections alone.
    """

    def __init__(self, model: GatedTransformer, settings: PrimalDualSettings, *, seed: int | None = 0) -> None:
        self.model, self.settings = model, settings
        gates = model.block_skip_gating
        depth, heads = len(model.blocks), model.num_heads
        like: dict[str, Any] = {"dtype": torch.get_default_dtype(), "device": gates.device}
        self.s = torch.zeros(depth, 2, **like, requires_grad=True)
        self.r = torch.zeros(depth, heads, **like, requires_grad=True)
        self.y = torch.full((depth, 2), INITIAL_DUAL, **like)
        self.p = torch.full((depth, heads), INITIAL_DUAL, **like)
        self.z = torch.full((), INITIAL_DUAL, **like)
        self.s_bound = torch.tensor([heads, model.hidden_dim], **like)
        self.r_bound = torch.tensor(model.head_dim, **like)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "s": OPTIMIZERS[settings.soptim]([self.s], lr=settings.slr),
            "r": OPTIMIZERS[settings.roptim]([self.r], lr=settings.rlr),
            "gates": torch.optim.SGD([gates], lr=settings.glr, momentum=0.9, weight_decay=1e-4),
        }
        self.gate_total, self.gate_count = torch.zeros_like(gates), 0
        self.patches = model.patch_gating if settings.learn_patches else None
        if self.patches is not None:
            self.optimizers["patches"] = torch.optim.SGD([self.patches], lr=settings.patchlr, momentum=0.9)
        elif settings.learn_patches:
            raise ValueError("learning patches needs patch gates; call add_patch_gates() first")
        self.zlr = settings.zlr
        self.count = 0
        self.whole_cost = CostModel(model)
        self.cost = self.whole_cost if settings.flops_with_mhsa else ProjectedCostModel(model)
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(device=gates.device).manual_seed(seed)

    # The cost

    def resource(self, scores: Groups, *, hard: bool | None = None) -> Tensor:
        """R at the current variables, (); draws one (L, 2) noise under Gumbel gates.

        Args:
            scores: of the current weights.
            hard: one-hot gates; None takes the model's setting.
        """
        gates = self.model.gates
        run = None
        if self.settings.enable_block_gating:
            hard = gates.hard if hard is None else hard
            weights = gate_weights(
                self.model.block_skip_gating, gates.mode, hard=hard, eps=gates.eps, generator=self.generator
            )
            run = weights[:, 1]
        return self.cost.ratio(self.s, self.r, scores.heads, run, self.patches)

    def lowest_ratio(self) -> float:
        """The smallest R that the variables which are learned can reach."""
        settings, model = self.settings, self.model
        s, r = torch.zeros_like(self.s), torch.zeros_like(self.r)
        if settings.enable_pruning:  # a head and a neuron of each block always stay, and a dimension of that head
            s, r = self.s_bound.expand_as(self.s) - 1, torch.full_like(self.r, model.head_dim - 1)
        run = torch.zeros_like(self.s[:, 0]) if settings.enable_block_gating else None
        patches = None if self.patches is None else torch.full_like(self.patches, -1.0)
        with torch.no_grad():
            return float(self.cost.ratio(s, r, torch.ones_like(self.r), run, patches))

    # The step

    def epoch_start(self) -> None:
        """Forget the gate gradients gathered since the last update."""
        self.gate_total, self.gate_count = torch.zeros_like(self.gate_total), 0

    def step(self, lr: float, *, warmup: bool = False) -> Tensor:
        """One primal-dual step, after the weights' own gradient step and before its gradients are cleared.

        Args:
            lr: learning rate of the weights for the proximal step.
            warmup: stop after the proximal step.

        Returns:
            R before the step, (), on the device.

        Source: arXiv:2203.08243, Algorithm 1: one step on weights (proximal), s, r, gates and the duals y, p, z.
        """
        settings, model = self.settings, self.model
        self.count += 1

        # 1. Proximal step on the weights: shrink the groups that s and r would remove.
        scores = group_scores(model)
        if settings.enable_pruning:
            removed = removal(scores, self.s, self.r)
            scores = proximal_step_(model, scores, removed, self.y, self.p, lr)

        # 2, 3. Cost at the current variables, R - B clipped for differentiation.
        resource = self.resource(scores)
        if warmup:
            return resource.detach()
        excess = clamp_closed(resource - settings.budget, -settings.z_grad_clip, settings.z_grad_clip)
        wanted = [self.s, self.r]
        if settings.enable_block_gating:
            wanted.append(model.block_skip_gating)
        if self.patches is not None:
            wanted.append(self.patches)
        by_s, by_r, *by_gates = torch.autograd.grad(excess, wanted, materialize_grads=True)

        # 4. Gradients of the Lagrangian with respect to s and r.
        with torch.enable_grad():
            pruning = (self.y * self.least_of_s(scores)).sum() + (self.p * self.least_of_r(scores)).sum()
        grad_s, grad_r = torch.autograd.grad(pruning, [self.s, self.r])
        with torch.no_grad():
            grad_s = grad_s + settings.sl2wd * self.s / self.s_bound + self.z * by_s
            grad_r = grad_r + settings.sl2wd * self.r / self.r_bound + self.z * by_r

            # 5. Gates: descend on task loss and cost, once per interval.
            if settings.enable_block_gating:
                self._step_gates(by_gates.pop(0))
            if self.patches is not None:
                self._step_patches(self.patches, by_gates.pop(0))

        # 6. Descend on s, then on r, within their bounds.
        if settings.enable_pruning:
            descend_within_bounds(self.s, grad_s, self.optimizers["s"], self.s_bound)
            descend_within_bounds(self.r, grad_r, self.optimizers["r"], self.r_bound)

        # 7. Ascend on the duals at the new primal variables.
        with torch.no_grad():
            after = self.resource(scores)
            self.y.add_(self.least_of_s(scores), alpha=settings.ylr).clamp_(min=0)
            self.p.add_(self.least_of_r(scores), alpha=settings.plr).clamp_(min=0)
            self.z.add_(after - settings.budget, alpha=self.zlr).clamp_(min=0)
        return resource.detach()

    def least_of_s(self, scores: Groups) -> Tensor:
        """T_{ceil s} of heads and neurons, (L, 2)."""
        return torch.stack([least_sum(scores.heads, self.s[:, 0]), least_sum(scores.neurons, self.s[:, 1])], dim=1)

    def least_of_r(self, scores: Groups) -> Tensor:
        """T_{ceil r} of the dimensions of each head, (L, H)."""
        return least_sum(scores.dims, self.r)

    def _step_gates(self, by_gates: Tensor) -> None:
        gates, settings = self.model.block_skip_gating, self.settings
        gradient = torch.zeros_like(gates)
        if gates.grad is not None:  # an overflow under fp16 must not reach the momentum
            gradient += torch.nan_to_num(gates.grad, posinf=0.0, neginf=0.0)
        gradient += self.z * settings.gating_weight * by_gates
        self.gate_total.add_(gradient, alpha=self.count % settings.gating_interval)
        self.gate_count += 1
        if (self.count + 1) % settings.gating_interval == 0:
            gates.grad = self.gate_total / self.gate_count
            self.epoch_start()
            self.optimizers["gates"].step()

    def _step_patches(self, patches: Tensor, by_patches: Tensor) -> None:
        patches.grad = torch.zeros_like(patches) if patches.grad is None else patches.grad.nan_to_num(0.0, 0.0, 0.0)
        patches.grad.add_(self.z * self.settings.patch_weight * by_patches)
        self.optimizers["patches"].step()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Variables, duals, optimizers, gathered gate gradients, and the generator of the noise."""
        return {
            **{name: getattr(self, name).detach().clone() for name in ("s", "r", "y", "p", "z")},
            "zlr": self.zlr,
            "eps": self.model.gates.eps,
            "count": self.count,
            "gate_total": self.gate_total.clone(),
            "gate_count": self.gate_count,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly from ``state_dict()``."""
        with torch.no_grad():
            for name in ("s", "r", "y", "p", "z"):
                variable = getattr(self, name)
                if variable.shape != state[name].shape:
                    raise CheckpointError(
                        f"the checkpoint's {name} has shape {list(state[name].shape)}, this model needs "
                        f"{list(variable.shape)}; was it written for another --model_type?"
                    )
                variable.copy_(state[name])
            self.gate_total.copy_(state["gate_total"])
        self.gate_count = int(state["gate_count"])
        self.count, self.zlr = int(state["count"]), float(state["zlr"])
        self.model.gates.eps = float(state["eps"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())


@torch.no_grad()
def descend_within_bounds(variable: Tensor, gradient: Tensor, optimizer: torch.optim.Optimizer, bound: Tensor) -> None:
    """One bounded descent step of s or r, in place.

    A variable that reached its upper limit (bound - 1) stays there; one at zero cannot fall. The whole gradient is
    scaled so that its largest entry is at most one.

    Args:
        variable: s (L, 2) or r (L, H). gradient: of the same shape.
        optimizer: holds ``variable``.
        bound: how many groups there are, () or (2,).

    Source: arXiv:2203.08243, descent on s and r: projected onto 0 <= s < number of groups.
    """
    limit = (bound - JUST_BELOW).clamp(min=0).expand_as(variable)
    over, under = variable >= limit, variable <= 0
    gradient = torch.where(over, gradient.clamp(min=0), gradient)
    gradient = torch.where(under, gradient.clamp(max=0), gradient)
    gradient = gradient * (1 / (gradient.abs().max() + 1e-6)).clamp(max=1)
    variable.grad = gradient
    optimizer.step()
    variable.grad = None
    variable.clamp_(min=0)
    variable.copy_(torch.where(over, limit, torch.minimum(variable, bound.expand_as(variable))))
