"""Pruning, cost and the primal-dual step: what the paper says of them."""

import math

import pytest
import torch

from common.ledger.tables import load_tables
from common.run.errors import CheckpointError
from uvc.cost_model import CostModel, clamp_closed
from uvc.losses import objective
from uvc.models import create
from uvc.models.gates import register_masks
from uvc.pruning import ceil_straight_through, group_scores, least_sum, update_masks_, with_masks
from uvc.settings import PrimalDualSettings
from uvc.structure import Structure
from uvc.tests.model_cases import float64
from uvc.uvc_optimizer import PrimalDual

FAST = {"slr": 1.0, "rlr": 1.0, "zlr": 5.0, "z_grad_clip": 1.0, "gating_interval": 4, "glr": 0.1}


@pytest.fixture
def model():
    torch.manual_seed(0)
    with float64():
        return register_masks(create("deit_desk", depth=3))


def primal_dual(model, **settings):
    with float64():
        return PrimalDual(model, PrimalDualSettings(**FAST | settings))


def run(state, steps, first=1):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        state.model.block_skip_gating.grad = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        state.step(1e-2)


# Cost


@pytest.mark.parametrize("x", [-0.1, 0.0, 0.5, 1.0, 1.1])
def test_clamp_passes_the_gradient_at_its_bounds(x):
    value = torch.tensor(x, requires_grad=True)
    (gradient,) = torch.autograd.grad(clamp_closed(value, 0.0, 1.0), value)
    assert float(gradient) == (1.0 if 0 <= x <= 1 else 0.0)
    assert float(clamp_closed(value, 0.0, 1.0).detach()) == min(max(x, 0), 1)


def test_gradient_before_anything_is_pruned_is_the_cost_of_one_group(model):
    state = primal_dual(model, enable_block_gating=False)
    scores = group_scores(model)
    ratio = state.resource(scores)
    assert float(ratio.detach()) == 1.0
    by_s, by_r = torch.autograd.grad(ratio, [state.s, state.r])
    for variable, gradient in ((state.s, by_s), (state.r, by_r)):
        for index in range(variable[0].numel()):
            with torch.no_grad():
                variable[0].view(-1)[index] = 1
                assert float(state.resource(scores)) - 1 == pytest.approx(float(gradient[0].flatten()[index]), rel=1e-9)
                variable.zero_()


LOGS = next(table for table in load_tables("uvc") if table.name == "log_blocks")


@pytest.mark.parametrize("row", LOGS.rows, ids=lambda row: row.id)
def test_shares_of_the_published_logs(row):
    size, running = row.method.split("-")[1].lower(), int(row.setting.split()[0])
    with torch.device("meta"):
        model = create(f"deit_{size}_patch16_224")
    embed, block = model.embed_macs(), sum(model.block_macs())
    share = 100 * (embed + running * block) / (embed + len(model.blocks) * block)
    assert share == pytest.approx(float(next(iter(row.published.values()))), abs=0.006)


def test_cost_of_masks_gates_and_patches_is_the_cost_of_the_structure(model):
    model.add_patch_gates()
    state = primal_dual(model, learn_patches=True)
    with torch.no_grad():
        state.s.copy_(torch.tensor([[1.0, 17.2], [0.3, 0.0], [3.0, 255.0]]))
        state.r.copy_(torch.tensor([[0.0, 3.5, 15.0, 1.0]] * 3))
        model.patch_gating[0, ::3] = -0.1
        model.block_skip_gating[1] = torch.tensor([0.1, -0.1])
    update_masks_(model, state.s, state.r)
    structure = Structure.from_model(model, remove_patches=True)
    run = torch.tensor(model.runs()).double()
    ratio = state.cost.ratio(state.s, state.r, group_scores(model).heads, run, model.patch_gating)
    assert CostModel(model).of_structure(structure) == pytest.approx(float(ratio.detach()), rel=1e-12)
    assert [len(block.heads) for block in structure.blocks] == [3, 3, 1]
    assert len(structure.blocks[2].neurons) == 1


def test_the_least_that_a_budget_can_be(model):
    assert primal_dual(model).lowest_ratio() < 0.02
    assert primal_dual(model, enable_block_gating=False).lowest_ratio() > 0.02
    assert primal_dual(model, enable_block_gating=False, enable_pruning=False).lowest_ratio() == 1
    assert 0 < primal_dual(model, flops_with_mhsa=False, enable_block_gating=False).lowest_ratio() < 0.01


# Groups


def test_least_sum_and_whole_numbers():
    scores = torch.tensor([4.0, 1.0, 3.0])
    number = torch.tensor([0.0, 1e-9, 2.0, 3.0], requires_grad=True)
    value = least_sum(scores.expand(4, 3), number)
    assert value.tolist() == [0, 1, 4, 8]
    assert torch.autograd.grad(value.sum(), number)[0].tolist() == [1, 3, 4, 4]
    assert ceil_straight_through(torch.tensor([0.1, 0.7, 2.0])).tolist() == [1.0, 1.0, 2.0]


def test_masks_are_new_unless_old_zeros_are_kept(model):
    s, r = torch.zeros(3, 2), torch.zeros(3, 4)
    s[:, 1] = 5
    update_masks_(model, s, r)
    update_masks_(model, torch.zeros(3, 2), r, keep_stale=True)
    assert int((model.blocks[0].mlp.fc1.mask == 0).any(1).sum()) == 5
    assert bool(model.blocks[0].mlp.fc2.mask.all())
    update_masks_(model, torch.zeros(3, 2), r)
    assert bool(model.blocks[0].mlp.fc1.mask.all())


def test_with_masks_come_back(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update_masks_(model, torch.full((3, 2), 2.0), torch.ones(3, 4))
    with with_masks(model):
        assert not torch.equal(model.blocks[0].attn.proj.weight, before["blocks.0.attn.proj.weight"])
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


# The step


def test_warm_up_changes_nothing_that_is_learned(model):
    state = primal_dual(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.block_skip_gating.grad = torch.ones(3, 2, dtype=torch.float64)
    state.step(1e-2, warmup=True)
    assert not state.s.any()
    assert not state.r.any()
    assert float(state.z) == 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dense_network_is_pruned_until_the_budget_and_weights_shrink(model):
    state = primal_dual(model, enable_block_gating=False, budget=0.6)
    norm = float(model.blocks[0].mlp.fc2.weight.detach().norm())
    ratios = []
    for _ in range(400):
        state.step(1e-2)
        with torch.no_grad():
            ratios.append(float(state.resource(group_scores(model))))
    assert min(ratios) < 0.6
    assert float(model.blocks[0].mlp.fc2.weight.detach().norm()) < norm


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_variables_stay_within_their_bounds(model, optimizer):
    state = primal_dual(model, soptim=optimizer, roptim=optimizer, slr=300.0, rlr=300.0, zlr=1000.0, budget=0.05)
    for step in range(6):
        run(state, 1, step)
        assert 0 <= float(state.s[:, 0].detach().min()) <= float(state.s[:, 0].detach().max()) <= 4
        assert float(state.s[:, 1].detach().max()) <= 256
        assert 0 <= float(state.r.detach().min()) <= float(state.r.detach().max()) <= 16
        assert float(state.z.detach()) >= 0
        assert bool((state.y >= 0).all())
    update_masks_(model, state.s, state.r)  # structures this extreme still work
    assert all(
        math.isfinite(value) for value in model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))[0].flatten().tolist()
    )


def test_a_kept_state_continues_exactly_between_two_gate_updates(model):
    def fresh():
        torch.manual_seed(0)
        with float64():
            return primal_dual(register_masks(create("deit_desk", depth=3)), soptim="adam", roptim="rmsprop")

    whole, broken = fresh(), fresh()
    run(whole, 9)
    run(broken, 6)
    kept, weights = broken.state_dict(), {k: v.clone() for k, v in broken.model.state_dict().items()}
    resumed = fresh()
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(kept)
    run(resumed, 3, 7)
    for name in ("s", "r", "y", "p", "z"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name
    assert torch.equal(whole.model.block_skip_gating, resumed.model.block_skip_gating)
    other = primal_dual(register_masks(create("deit_desk", depth=2)))
    with pytest.raises(CheckpointError, match=r"s has shape \[3, 2\], this model needs \[2, 2\]"):
        other.load_state_dict(kept)


def test_gates_move_once_per_interval_by_the_weighted_mean(model):
    state = primal_dual(model, gating_weight=0.0)
    before, gradient = model.block_skip_gating.detach().clone(), torch.full((3, 2), 0.5, dtype=torch.float64)
    for step in range(1, 4):
        model.block_skip_gating.grad = gradient.clone()
        state.step(1e-2)
        assert torch.equal(model.block_skip_gating, before) == (step < 3)
    mean = gradient * (1 + 2 + 3) / 3
    torch.testing.assert_close(model.block_skip_gating.detach(), before - 0.1 * (mean + 1e-4 * before))


def test_an_overflow_does_not_reach_the_gates(model):
    state = primal_dual(model)
    for _ in range(4):
        model.block_skip_gating.grad = torch.full((3, 2), math.inf, dtype=torch.float64)
        state.step(1e-2)
    assert bool(model.block_skip_gating.isfinite().all())


def test_without_pruning_only_gates_move(model):
    state = primal_dual(model, enable_pruning=False)
    before = model.blocks[0].attn.proj.weight.detach().clone()
    run(state, 5)
    assert not state.s.any()
    assert torch.equal(model.blocks[0].attn.proj.weight, before)
    assert not torch.equal(model.block_skip_gating[0].detach(), torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_patches_descend_on_their_cost(model):
    with pytest.raises(ValueError, match="add_patch_gates"):
        primal_dual(model, learn_patches=True)
    model.add_patch_gates(0.01)
    state = primal_dual(model, learn_patches=True, zlr=50.0, budget=0.1, patchlr=1.0)
    run(state, 40)
    assert len(model.find_kept_patches()) < 64


def test_what_cannot_be():
    for words, message in (({"kind": "soft"}, "needs a teacher"), ({"kind": "other"}, "must be one of"),
                           ({"alpha": 2.0}, "from 0 to 1"), ({"tau": 0.0}, "must be positive")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            objective(None, **words)
