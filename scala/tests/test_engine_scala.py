"""The four-pass step: what it draws, whom it teaches, and one exchange of gradients per step between two processes."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.losses import DistillationLoss
from common.run.engine import Optimization
from common.run.launch import launch, shutdown
from common.run.wrapping import prepare_network
from common.tests.forks import run_forked, torchrun_variables
from common.tests.reference import array, build, image
from scala.arguments import CosineSettings
from scala.engine_scala import LaggingSchedule, ScaleCoordination, draw_widths, to_multi_hot
from scala.losses import CosubLoss, ScalaLosses, cosub_loss, transfer_loss
from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala
from scala.slicing import WidthGrid, make_grid

TINY: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5,
}  # fmt: skip
GRID = make_grid(0.25, 1.0, 0.125)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return image(4, 16, seed), torch.from_numpy(array("target", (4, 5), seed)).softmax(1)


def losses(**options: Any) -> ScalaLosses:
    return ScalaLosses(DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0), **options)


def make_step(network: nn.Module, grid: WidthGrid = GRID, **options: Any) -> ScaleCoordination:
    return ScaleCoordination(network, losses(), grid, lambda: 0, full_warm_epoch=0, **options)


def gradients_of(seed: int, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of one step of one process, which draws its widths by ``seed``."""
    random.seed(seed)
    model.zero_grad()
    make_step(model)(batch(seed), Optimization(torch.optim.SGD(model.parameters(), lr=1.0)))
    return {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in model.named_parameters()}


def _step_of_a_rank() -> dict[str, Any]:
    """What one of two processes does: a step on its own batch with its own widths."""
    world = launch("cpu", start_timeout_s=60)
    model = build(DistilledVisionTransformer_scala, 3, **TINY).train()
    network = prepare_network(model, world, find_unused_parameters=True)
    exchanges: Counter[str] = Counter()
    assert isinstance(network, nn.parallel.DistributedDataParallel)

    def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchanges["buckets"] += 1
        work = dist.all_reduce(bucket.buffer().div_(world.size), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    network.register_comm_hook(None, count)
    seed = 10 + world.rank
    random.seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    make_step(network)(batch(seed), Optimization(optimizer, network=network))
    shutdown()
    grads = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in model.named_parameters()}
    return {"grads": grads, "buckets": exchanges["buckets"]}


@pytest.mark.slow
def test_two_processes_exchange_gradients_once_per_step() -> None:
    """The mean over the ranks of their sums over four passes, though head_dist is not used by the last pass."""
    ended = run_forked(_step_of_a_rank, torchrun_variables(2), timeout_s=120)
    assert [process.status for process in ended] == [0, 0], ended[0].output + ended[1].output
    model = build(DistilledVisionTransformer_scala, 3, **TINY).train()
    alone = [gradients_of(seed, model) for seed in (10, 11)]
    for process in ended:
        assert process.result["buckets"] == 1  # a network this small has one
        for name, value in process.result["grads"].items():
            torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2, rtol=1e-12, atol=1e-14)


def test_a_step_is_the_sum_of_four_losses() -> None:
    """Gradients equal those of the total, written out by hand, with the widths that the seed draws."""
    model = build(VisionTransformer_scala, 4, **TINY).train()
    found = gradients_of(7, model)
    random.seed(7)
    upper, lower = draw_widths(GRID)
    images, targets = batch(7)
    model.zero_grad()
    outputs = {ratio: model(images, ratio) for ratio in (1.0, upper, lower, 0.25)}
    total = nn.functional.cross_entropy(outputs[1.0], targets)
    for teacher, width in ((1.0, upper), (upper, lower), (lower, 0.25)):
        p, q = outputs[teacher].detach().softmax(1), outputs[width].softmax(1)
        total = total + (p * (p / q).log()).sum() / 4 + nn.functional.cross_entropy(outputs[width], targets)
    total.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("granularity", [1 / 32, 1 / 16, 1 / 8, 1 / 4])
def test_draws_stay_in_their_halves_and_reach_every_width(granularity: float) -> None:
    grid = make_grid(0.25, 1.0, granularity)
    random.seed(0)
    pairs = [draw_widths(grid) for _ in range(600)]
    assert all(lower < 0.625 <= upper for upper, lower in pairs)
    assert sorted({width for pair in pairs for width in pair}) == grid.ratios[1:-1]


def test_warm_epochs_train_the_largest_width_without_a_draw() -> None:
    model = build(VisionTransformer_scala, 4, **TINY).train()
    seen: list[float] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    epoch = 1
    step = ScaleCoordination(model, losses(), GRID, lambda: epoch, full_warm_epoch=2)
    state = random.getstate()
    optimization = Optimization(torch.optim.SGD(model.parameters(), lr=1.0))
    terms = step(batch(1), optimization)
    assert random.getstate() == state
    assert seen == [1.0]
    assert float(terms["loss"]) == float(terms["loss_full"])
    epoch = 2
    step(batch(1), optimization)
    assert seen[1] == 1.0
    assert seen[-1] == 0.25
    assert len(seen) == 5


def test_who_teaches() -> None:
    """With US transfer every slim pass gets the logits of the largest width, else those of the pass before."""

    class Spy:
        def __init__(self) -> None:
            self.calls: list[tuple[Any, Any, Any]] = []

        def full(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
            return outputs.sum() * 0

        def slim(self, outputs: Any, teacher: Any, largest: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
            assert not teacher.requires_grad
            self.calls.append((outputs.detach(), teacher, largest))
            return outputs.sum() * 0, outputs.sum() * 0

    for transfer_type in ("progressive", "US"):
        model, spy = build(VisionTransformer_scala, 4, **TINY).train(), Spy()
        step = ScaleCoordination(model, spy, GRID, lambda: 0, full_warm_epoch=0, transfer_type=transfer_type)
        step(batch(1), Optimization(torch.optim.SGD(model.parameters(), lr=1.0)))
        for index, (_, teacher, largest) in enumerate(spy.calls):
            expected = largest if index == 0 or transfer_type == "US" else spy.calls[index - 1][0]
            assert torch.equal(teacher, expected)
    with pytest.raises(ValueError, match="--transfer_type must be one of progressive, US"):
        ScaleCoordination(nn.Identity(), losses(), GRID, lambda: 0, transfer_type="progresive")


def test_losses_by_hand() -> None:
    student, teacher = (torch.from_numpy(array(name, (4, 5), 3)) for name in ("s", "t"))
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(transfer_loss(student, teacher), (p * (p / q).log()).sum() / 4)
    hard = -q[torch.arange(4), teacher.argmax(1)].log().mean()
    torch.testing.assert_close(transfer_loss(student, teacher, "hard"), hard)
    one, two, y = student, teacher, (teacher > 0).double()

    def bce(z: Tensor, t: Tensor) -> Tensor:
        return -(t * z.sigmoid().log() + (1 - t) * (-z).sigmoid().log()).mean()

    expected = (bce(one, y) + bce(two, y) + bce(one, two.sigmoid()) + bce(two, one.sigmoid())) / 4
    torch.testing.assert_close(cosub_loss(torch.cat([one, two]), torch.cat([y, y])), expected)
    labels = torch.tensor([0, 1, 2, 3])
    same = torch.cat([labels, labels])
    pair = (torch.cat([one, two]), torch.cat([two, one]))
    torch.testing.assert_close(
        CosubLoss()(torch.zeros(1), pair, same), cosub_loss(pair[0], nn.functional.one_hot(same, 5).double())
    )


def test_losses_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="network with a distillation head"):
        DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), "hard", 0.5, 1.0)(
            torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
        )
    with pytest.raises(ValueError, match="needs a teacher"):
        DistillationLoss(nn.CrossEntropyLoss(), None, "soft", 0.5, 1.0)
    with pytest.raises(ValueError, match="must be one of none, soft, hard"):
        DistillationLoss(nn.CrossEntropyLoss(), None, "warm", 0.5, 1.0)
    for options, message in (({"kind": "warm"}, "--distill_type"), ({"ce_type": "both"}, "--ce_type")):
        with pytest.raises(ValueError, match=message):
            losses(**options)
    with pytest.raises(ValueError, match="the kind of transfer"):
        transfer_loss(torch.zeros(1, 2), torch.zeros(1, 2), "warm")


def test_a_teacher_s_predictions_as_targets_work_for_a_plain_network() -> None:
    largest, slim = (torch.from_numpy(array(name, (4, 5), 3)) for name in ("s", "t"))
    _, ce = losses(ce_type="teacher", ce_coefficient=2.0).slim(slim, largest, largest, torch.zeros(4).long())
    torch.testing.assert_close(ce, 2 * nn.functional.cross_entropy(slim, largest.argmax(1)))


def test_multi_hot_targets() -> None:
    assert to_multi_hot(torch.tensor([1, 0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert to_multi_hot(torch.tensor([[0.0, 0.4, 0.6]]), 3).tolist() == [[0, 1, 1]]


def test_the_schedule_lags_by_an_epoch_and_halves_ten_rates() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4e-3)
    schedule = LaggingSchedule(optimizer, CosineSettings(epochs=100, warmup_epochs=3))
    rates = []
    for epoch in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(epoch + 1)
    assert rates[0] == 1e-6
    assert rates[1] == 5e-7
    assert rates[11] == 1e-5 + 0.5 * (4e-3 - 1e-5) * (1 + math.cos(math.pi / 10)) > 1.9 * rates[10]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4e-3)
    LaggingSchedule(optimizer, CosineSettings(epochs=100, warmup_epochs=0))
    assert optimizer.param_groups[0]["lr"] == 4e-3
    with pytest.raises(ValueError, match="one or two fractions"):
        LaggingSchedule(optimizer, CosineSettings(epochs=10, lr_noise=[0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="must be positive"):
        LaggingSchedule(optimizer, CosineSettings(epochs=10, lr_noise=[0.1], lr_noise_pct=0.0))
