"""Runners of the vectors of scores, cost, Lagrangian, proximal step, masks and primal-dual steps."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.tests.reference import Case, Checks, NotCovered
from uvc.cost_model import CostModel, ProjectedCostModel
from uvc.models.gates import GatedTransformer, apply_masks_, count_mask_elements, register_masks
from uvc.pruning import blocks_of, group_scores, least_sum, proximal_step_, removal, update_masks_
from uvc.settings import PrimalDualSettings
from uvc.tests.model_cases import NUMBER, build_model, mac_rows, replay, tensor
from uvc.uvc_optimizer import PrimalDual


def pruning_numbers(case: Case, model: GatedTransformer, fs: float, fr: float) -> tuple[Tensor, Tensor]:
    """s and r by the formula that the folder states: shares fs and fr of the bounds, times a normal distribution."""
    seed, depth, heads = int(case.raw.get("sr_seed", case.seed)), len(model.blocks), model.num_heads
    normal = torch.special.ndtr(tensor("s", (depth, 2), seed))
    s = fs * normal * torch.tensor([heads, model.hidden_dim])
    r = fr * model.head_dim * torch.special.ndtr(tensor("r", (depth, heads), seed))
    return s, r


def stated_numbers(case: Case, model: GatedTransformer) -> tuple[Tensor, Tensor]:
    """The same from the case's own ``fs`` and ``fr``; zeros without them."""
    return pruning_numbers(case, model, float(case.raw.get("fs") or 0), float(case.raw.get("fr") or 0))


def block_number(case: Case) -> int:
    """The block that the text speaks of."""
    found = re.search(r"block (\d+)", str(case.raw.get("what", "")))
    return int(found[1]) if found else 0


def compare(case: Case, checks: Checks, values: Mapping[str, Any]) -> None:
    """Every output of the case from ``values``."""
    for name in case.outputs:
        if name not in values:
            raise NotCovered(f"output {name} of {case.name}")
        checks.output(name, values[name])


def run_scores(case: Case, checks: Checks) -> None:
    """Scores of the groups of one block."""
    scores, block = group_scores(build_model(case)), block_number(case)
    compare(
        case, checks,
        {"dim_scores": scores.dims[block], "head_scores": scores.heads[block], "neuron_scores": scores.neurons[block]},
    )  # fmt: skip


def run_least_sum(case: Case, checks: Checks) -> None:
    """T_k and its gradient, for a list of numbers."""
    numbers = torch.tensor(case.build["s"], dtype=torch.float64, requires_grad=True)
    found = re.search(r"\bn\s*=\s*(\d+)", f"{case.text} {case.raw.get('what', '')}")
    stated_size = case.raw.get("n", case.build.get("n", found[1] if found else None))
    least = max(int(numbers.detach().ceil().max()), 1)

    def values(size: int) -> dict[str, Tensor]:
        scores = tensor("least", (size,), case.seed).square().expand(len(numbers), -1)
        value = least_sum(scores, numbers)
        (gradient,) = torch.autograd.grad(value.sum(), numbers)
        return {"value": value, "grad": gradient}

    def fits(size: int) -> bool:
        return all(
            np.allclose(value.detach(), checks.stored.get(f"{case.name}/{name}", value.detach()), rtol=1e-9)
            for name, value in values(size).items()
        )

    # the folder need not say how many scores there are: at least as many as the largest number wants
    sizes = [int(stated_size)] if stated_size is not None else range(least, least + 64)
    compare(case, checks, values(next((size for size in sizes if fits(size)), sizes[0])))


def set_gate_mode(model: GatedTransformer, case: Case) -> bool:
    """Gate settings from the last words of a resource case's name; whether blocks are gated at all."""
    mode = re.search(r"(none|gumbel_soft|gumbel_hard|softl0|softmax)$", case.name)
    mode = mode[1] if mode else "gumbel_soft" if "noise_seed" in case.raw else "none"
    model.gates.hard = mode == "gumbel_hard"
    model.gates.mode = {"softl0": "soft_l0", "softmax": "softmax"}.get(mode, "gumbel")  # pyright: ignore[reportAttributeAccessIssue]
    model.gates.eps = float(case.raw.get("eps", model.gates.eps))
    return mode != "none"


def run_resource(case: Case, checks: Checks) -> None:
    """R and its gradients in every gate mode."""
    model = build_model(case)
    gated = set_gate_mode(model, case)
    state = PrimalDual(model, PrimalDualSettings(enable_block_gating=gated), seed=None)
    s, r = stated_numbers(case, model)
    with torch.no_grad():
        state.s.copy_(s)
        state.r.copy_(r)
    with replay(int(case.raw.get("noise_seed", case.seed))):
        ratio = state.resource(group_scores(model))
    gradients = torch.autograd.grad(ratio, [state.s, state.r, model.block_skip_gating], allow_unused=True)
    values = dict(zip(("grad_s", "grad_r", "grad_gate"), gradients, strict=True))
    compare(case, checks, {"resource": ratio, **values})


def run_published_resource(case: Case, checks: Checks) -> None:
    """Full cost of a published network, and its share for stated whole numbers, with and without dropped blocks."""
    what = str(case.raw.get("what", ""))
    model = build_model(case)
    found = re.search(r"blocks? ((?:\d+(?:,? and |, ))*\d+) (?:are |is )?dropped", what)
    if not found:
        raise NotCovered("a text that does not say which blocks are dropped")
    dropped = [int(text) for text in re.findall(r"\d+", found[1])]
    seed, depth, heads = int(case.raw.get("sr_seed", case.seed)), len(model.blocks), model.num_heads
    shares = [float(text) for text in re.findall(r"ceil\(([\d.]+)", case.text)]
    normal = torch.special.ndtr(tensor("s", (depth, 2), seed))
    s = torch.stack([shares[0] * heads * normal[:, 0], shares[1] * model.hidden_dim * normal[:, 1]], dim=1).ceil()
    r = (shares[2] * torch.special.ndtr(tensor("r", (depth, heads), seed))).ceil()
    cost, scores = CostModel(model), group_scores(model).heads
    run = torch.ones(depth, dtype=torch.float64)
    run[dropped] = 0
    nothing = torch.zeros_like(s), torch.zeros_like(r)
    compare(
        case, checks,
        {
            "full_flops": 2 * cost.full, "macs_embed": np.array(model.embed_macs()), "s": s, "r": r,
            "macs_blocks": mac_rows(model, 1), "ratio": cost.ratio(s, r, scores),
            "ratio_two_blocks_dropped": cost.ratio(s, r, scores, run),
            "ratio_all_kept_two_dropped": cost.ratio(*nothing, scores, run),
        },
    )  # fmt: skip


def run_projected_resource(case: Case, checks: Checks) -> None:
    """The cost of the output projections alone."""
    model = build_model(case)
    s, r = stated_numbers(case, model)
    cost, scores = ProjectedCostModel(model), group_scores(model).heads
    full = cost.value(torch.zeros_like(s), torch.zeros_like(r), scores)
    compare(case, checks, {"value": cost.value(s, r, scores), "full": full})


def duals(case: Case, model: GatedTransformer) -> tuple[Tensor, Tensor]:
    """y and p as the folder states them."""
    depth = len(model.blocks)
    return tensor("y", (depth, 2), case.seed).abs(), tensor("p", (depth, model.num_heads), case.seed).abs()


def stated(case: Case, name: str, default: float) -> float:
    """A number from the case, or from its text, such as ``z=1.7``, ``lr 3e-2`` or ``budget 0.5``."""
    if isinstance(case.raw.get(name), (int, float)):
        return float(case.raw[name])
    found = re.search(rf"\b{name}\s*=?\s*({NUMBER})", str(case.raw.get("what", "")))
    return float(found[1]) if found else default


def run_lagrangian(case: Case, checks: Checks) -> None:
    """The terms of the Lagrangian and their gradients."""
    model = build_model(case)
    s, r = stated_numbers(case, model)
    y, p = duals(case, model)
    z, budget = torch.tensor(stated(case, "z", 1.7), dtype=torch.float64), stated(case, "budget", 0.5)
    state = PrimalDual(model, PrimalDualSettings(budget=budget), seed=None)
    with torch.no_grad():
        state.s.copy_(s)
        state.r.copy_(r)
    scores = group_scores(model)
    for variable in (y, p, z):
        variable.requires_grad_()
    least_s, least_r = state.least_of_s(scores), state.least_of_r(scores)
    s_term, r_term = (y * least_s).sum(), (p * least_r).sum()
    with replay(int(case.raw.get("noise_seed", case.seed))):
        z_term = z * (state.resource(scores) - budget)
    grads = torch.autograd.grad(s_term + r_term, [state.s, state.r, y, p], retain_graph=True)
    values = dict(zip(("grad_s", "grad_r", "grad_y", "grad_p"), grads, strict=True))
    (grad_z,) = torch.autograd.grad(z_term, z, retain_graph=True)
    compare(
        case, checks,
        {
            **values, "sloss": s_term, "rloss": r_term, "yloss": s_term, "ploss": r_term, "zloss": z_term,
            "grad_z": grad_z, "least_s_norm": least_s, "least_r_norm": least_r,
        },
    )  # fmt: skip


def run_proximal(case: Case, checks: Checks) -> None:
    """The proximal step on proj and fc2."""
    model = build_model(case)
    y, p = duals(case, model)
    scores = group_scores(model)
    after = proximal_step_(model, scores, removal(scores, *stated_numbers(case, model)), y, p, stated(case, "lr", 0.03))
    again = group_scores(model)
    checks.close("returned scores", after.dims.numpy(), again.dims.numpy())
    checks.close("returned scores", after.neurons.numpy(), again.neurons.numpy())
    norms = torch.stack([block.mlp.fc2.weight.square().sum(0) for block in blocks_of(model)])
    for name in case.outputs:
        if name == "fc2_col_norms":
            stored = checks.stored[f"{case.name}/{name}"]
            close = np.allclose(norms.detach(), stored, rtol=1e-9)
            checks.output(name, norms if close else norms.sqrt())
        else:
            checks.output(name, model.get_parameter(name))


def run_masks(case: Case, checks: Checks) -> None:
    """Masks set, weights reversed along columns, masks set again with the old zeros of fc1."""
    model = register_masks(build_model(case))
    assert isinstance(model, GatedTransformer)
    s, r = stated_numbers(case, model)
    values: dict[str, Any] = {}
    for call in ("first", "second"):
        update_masks_(model, s, r, keep_stale=True)
        masks = {
            "proj": [block.attn.proj.get_buffer("mask")[0] for block in blocks_of(model)],
            "fc1": [block.mlp.fc1.get_buffer("mask")[:, 0] for block in blocks_of(model)],
            "fc2": [block.mlp.fc2.get_buffer("mask")[0] for block in blocks_of(model)],
        }
        values |= {f"{call}_{name}": torch.stack(rows) for name, rows in masks.items()}
        values[f"{call}_total"] = count_mask_elements(model)[0]
        with torch.no_grad():
            for block in blocks_of(model):
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.copy_(layer.weight.flip(1))
    compare(case, checks, values)


def run_pruned_weights(case: Case, checks: Checks) -> None:
    """The groups zeroed in the weights."""
    model = register_masks(build_model(case))
    update_masks_(model, *stated_numbers(case, model))
    apply_masks_(model)
    blocks = blocks_of(model)
    compare(
        case, checks,
        {
            "proj": torch.stack([block.attn.proj.weight.square().sum(0) for block in blocks]),
            "fc1": torch.stack([block.mlp.fc1.weight.square().sum(1) for block in blocks]),
            "fc2": torch.stack([block.mlp.fc2.weight.square().sum(0) for block in blocks]),
        },
    )  # fmt: skip


def settings_of(args: Mapping[str, Any], **more: Any) -> PrimalDualSettings:
    """Settings of the step from option values in the published names."""
    names = ("budget", "slr", "rlr", "ylr", "plr", "soptim", "roptim", "sl2wd", "glr", "gating_weight")
    found = {name: args[name] for name in names if name in args}
    schedule = args.get("zlr_schedule_list", [10])
    schedule = [int(text) for text in schedule.split(",")] if isinstance(schedule, str) else schedule
    return PrimalDualSettings(
        **found, zlr=float(schedule[0]), enable_block_gating=bool(args.get("enable_block_gating", 1)),
        enable_pruning=bool(args.get("enable_pruning", 1)),
        flops_with_mhsa=bool(args.get("flops_with_mhsa", 1)), **more,
    )  # fmt: skip


def apply_gate_args(model: GatedTransformer, args: Mapping[str, Any]) -> None:
    """Gate settings of the forward pass from option values in the published names."""
    model.gates.block_gating = bool(args.get("enable_block_gating", 1))
    model.gates.mode = "gumbel" if args.get("use_gumbel", 1) else "soft_l0"
    model.gates.eps = float(args.get("eps", 0.1))
    model.gates.jumping = bool(args.get("enable_jumping", 0))


def run_optimizer(case: Case, checks: Checks) -> None:
    """A trajectory of primal-dual steps with stated gate gradients."""
    raw, args = case.raw, case.raw["args"]
    model = build_model(case)
    apply_gate_args(model, args)
    settings = settings_of(args, gating_interval=int(raw["gating_interval"]), z_grad_clip=float(raw["z_grad_clip"]))
    state = PrimalDual(model, settings, seed=None)
    if raw.get("fs_fr"):
        s, r = pruning_numbers(case, model, *map(float, raw["fs_fr"]))
        with torch.no_grad():
            state.s.copy_(s)
            state.r.copy_(r)
    rows: dict[str, list[Tensor]] = {}
    gates = model.block_skip_gating
    found = re.search(rf"grad\s*=\s*({NUMBER})\s*\*\s*fill", str(raw.get("what", "")))
    factor = float(found[1]) if found else 0.1
    with replay(int(raw.get("noise_seed", case.seed))) as draws:
        for step in range(1, int(raw["steps"]) + 1):
            gates.grad = factor * tensor(f"gate-grad-{step}", tuple(gates.shape), case.seed)
            resource = state.step(float(raw["main_lr"]), warmup=bool(raw.get("warmup", False)))
            for name, value in trajectory(state, resource).items():
                rows.setdefault(name, []).append(value)
    if "draws" in raw:
        checks.equal("draws", [list(shape) for shape in draws], raw["draws"])
    compare(case, checks, {name: torch.stack(values) for name, values in rows.items()})


def trajectory(state: PrimalDual, resource: Tensor) -> dict[str, Tensor]:
    """What the trajectories of the folder hold after a step."""
    block = blocks_of(state.model)[0]
    values = {name: getattr(state, name).detach().clone() for name in ("s", "r", "y", "p", "z")}
    values |= {"resource": resource, "gate": state.model.block_skip_gating.detach().clone()}
    values |= {"proj0": block.attn.proj.weight.detach().norm(), "fc2_0": block.mlp.fc2.weight.detach().norm()}
    return values
