"""The published protocol and its companions, with a clock that the test controls."""

import pytest
import torch
from torch import Tensor, nn

from common.tests.test_benchmark import IMAGES, Costing, FakeClock
from hourglass_swag.tools.timing import (
    available_memory_bytes,
    measure_activation_bytes,
    measure_paper_protocol,
    measure_share,
)


def test_paper_protocol_restarts_the_clock_after_a_quarter_of_the_runs() -> None:
    clock = FakeClock()
    inputs: list[Tensor] = []
    model = Costing(clock, *[7.0] * 12, 0.5)
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    speed = measure_paper_protocol(model, batch_size=6, resolution=16, device="cpu", clock=clock)
    assert model.calls == 50
    assert speed.throughput_ips == pytest.approx(38 * 6 / (38 * 0.5))
    assert (speed.rounds, speed.latency_ms, speed.spread_percent) == (38, pytest.approx(500), None)
    assert inputs[0].shape == (6, 3, 16, 16)
    assert inputs[0].dtype == torch.float32
    assert 0 <= inputs[0].min() < 0.05 < 0.95 < inputs[0].max() < 1, "uniform in [0, 1), not normalised"
    assert all(image is inputs[0] for image in inputs)
    with pytest.raises(ValueError, match="runs >= 1"):
        measure_paper_protocol(model, batch_size=1, resolution=8, device="cpu", runs=0)


def test_share_of_a_part() -> None:
    clock = FakeClock()
    part = Costing(clock, 0.25)
    model = nn.Sequential(Costing(clock, 0.5), nn.Flatten(0, 0), Lift(), part, Lift(), Costing(clock, 0.25))
    assert measure_share(model, part, IMAGES, clock=clock) == pytest.approx(0.25)
    assert not part._forward_hooks, "the hooks are gone"
    with pytest.raises(ValueError, match="not part of"):
        measure_share(model, Costing(clock, 1.0), IMAGES, clock=clock)


class Lift(nn.Module):
    """(B, C) -> (B, C, 1, 1), so that ``Costing`` modules can follow each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], 1, 1)


def test_share_of_a_part_that_never_runs_is_an_error() -> None:
    clock = FakeClock()
    model = Costing(clock, 1.0)
    model.unused = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="never called"):
        measure_share(model, model.unused, IMAGES, clock=clock)


def test_activation_memory_is_the_largest_live_set() -> None:
    model = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 2), nn.ReLU())
    assert measure_activation_bytes(model, torch.rand(5, 8)) == 5 * (100 + 100) * 4
    in_place = nn.Sequential(nn.Linear(8, 100), nn.ReLU(inplace=True))
    assert measure_activation_bytes(in_place, torch.rand(5, 8)) == 5 * 100 * 4
    assert measure_activation_bytes(in_place.to("meta"), torch.rand(5, 8, device="meta")) == 5 * 100 * 4


def test_free_memory_of_this_machine() -> None:
    assert (available_memory_bytes(torch.device("cpu")) or 1) > 0
