"""Measuring speed, with a clock that the test controls: no test here asserts a real duration."""

import io

import pytest
import torch
from torch import Tensor, nn

from common.measure import benchmark
from common.measure.benchmark import (
    NotEnoughMemory,
    Speed,
    compare,
    describe_device,
    random_images,
)


class FakeClock:
    """Seconds that pass only when a model says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Costing(nn.Module):
    """A model whose passes take the given seconds, one after the other; the last value repeats."""

    def __init__(self, clock: FakeClock, *seconds: float, log: list[str] | None = None, name: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.clock, self.seconds, self.calls = clock, seconds, 0
        self.log, self.name = log, name

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.clock.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1
        if self.log is not None:
            self.log.append(self.name)
        return images.mean(dim=(2, 3))


IMAGES = torch.rand(4, 3, 8, 8)


def measure(model: nn.Module, images: Tensor, **options) -> Speed:
    """A model by itself."""
    return compare({"model": model}, images, baseline="model", **options)["model"].speed


def test_measure_reports_the_median_after_the_warm_up() -> None:
    clock = FakeClock()
    model = Costing(clock, 9.0, 9.0, 0.1, 0.2, 0.3, 0.4, 5.0).train()
    speed = measure(model, IMAGES, warmup=2, rounds=5, clock=clock)
    assert model.calls == 7
    assert model.training, "the mode is restored"
    assert speed.latency_ms == pytest.approx(300)
    assert speed.throughput_ips == pytest.approx(4 / 0.3)
    assert speed.spread_percent == pytest.approx(100 * 0.2 / 0.3)
    assert (speed.batch_size, speed.rounds, speed.dtype, speed.compiled) == (4, 5, "float32", False)
    assert speed.peak_memory_mb is None


def test_one_round_has_no_spread() -> None:
    clock = FakeClock()
    speed = measure(Costing(clock, 0.5), IMAGES, warmup=0, rounds=1, clock=clock)
    assert speed.spread_percent is None
    assert speed.rounds == 1


def test_a_time_limit_ends_the_run_between_rounds() -> None:
    clock = FakeClock()
    model = Costing(clock, 2.0)
    speed = measure(model, IMAGES, warmup=1, rounds=100, limit_s=9.0, clock=clock)
    assert model.calls == 4, "a fifth pass would end at ten seconds"
    assert speed.rounds == 3


def test_a_long_warm_up_is_cut_to_a_fifth_of_the_limit() -> None:
    clock = FakeClock()
    model = Costing(clock, 2.0)
    speed = measure(model, IMAGES, warmup=10, rounds=3, limit_s=18.0, clock=clock)
    assert model.calls == 5, "two of warm-up, which end after 4 of 18 s, and three timed"
    assert speed.rounds == 3


def test_a_limit_inside_the_warm_up_reports_its_last_pass() -> None:
    clock = FakeClock()
    model = Costing(clock, 60.0)
    speed = measure(model, IMAGES, warmup=3, rounds=10, limit_s=1.0, clock=clock)
    assert model.calls == 1
    assert (speed.rounds, speed.latency_ms) == (1, pytest.approx(60e3))


def test_compare_takes_turns_and_reports_the_median_of_paired_ratios() -> None:
    clock, log = FakeClock(), []
    # The machine slows down by ten times in the middle: single medians would mislead, paired ratios do not.
    models = {
        "dense": Costing(clock, 2.0, 2.0, 20.0, 20.0, 20.0, log=log, name="dense"),
        "fast": Costing(clock, 1.0, 1.0, 10.0, 10.0, 8.0, log=log, name="fast"),
    }
    result = compare(models, IMAGES, baseline="dense", warmup=0, rounds=5, clock=clock)
    assert result["fast"].speedup == pytest.approx(2.0)
    assert result["dense"].speedup == 1.0
    assert result["fast"].speed.rounds == 5
    assert result["fast"].speedup_spread_percent == pytest.approx(0.0)
    assert log[:4] == ["dense", "fast", "fast", "dense"], "the order rotates"
    assert log.count("dense") == log.count("fast") == 5


def test_compare_and_measure_refuse_what_makes_no_sense() -> None:
    clock = FakeClock()
    with pytest.raises(ValueError, match="baseline 'b'"):
        compare({"a": Costing(clock, 1.0)}, IMAGES, baseline="b")
    with pytest.raises(ValueError, match="rounds >= 1"):
        measure(Costing(clock, 1.0), IMAGES, rounds=0)


def test_random_images_look_like_images() -> None:
    images = random_images(3, 64, seed=1)
    assert images.shape == (3, 3, 64, 64)
    assert images.isfinite().all()
    assert images.std() > 0.4
    assert (images.flatten(1).std(dim=1) > 0.3).all(), "no constant picture"
    assert (images[:, :, 1:] - images[:, :, :-1]).abs().mean() < 0.3 * images.std(), "smooth: neighbours are alike"
    assert images.flatten(1).unique(dim=0).shape[0] == 3
    assert torch.equal(random_images(1, 64, seed=1)[0], images[0]), "picture i depends on the seed and i alone"
    assert not torch.equal(random_images(1, 64, seed=2)[0], images[0])
    assert random_images(1, 30, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_out_of_memory_names_the_batch() -> None:
    class Hungry(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_empty(2**57)

    with pytest.raises(NotEnoughMemory, match="batch of 4 images of 8x8 in float32 does not fit"):
        measure(Hungry(), IMAGES)

    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(Broken(), IMAGES)


def test_a_compiled_model_is_recorded_as_such() -> None:
    clock = FakeClock()
    compiled = torch.compile(Costing(clock, 1.0), backend="eager", dynamic=False)
    assert measure(compiled, IMAGES, warmup=1, rounds=1).compiled  # pyright: ignore[reportArgumentType]


def test_progress_moves_within_a_long_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.sys, "stderr", io.StringIO())
    seen: list[float] = []
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    with benchmark.PassBar("Timing", 2) as bar:
        move = bar.update
        monkeypatch.setattr(bar, "update", lambda step: (move(step), seen.append(bar.n)))
        with bar.one_pass(model):
            assert model(IMAGES) is IMAGES, "watching changes nothing, whatever an update of the bar returns"
        assert seen == [0.25, 0.5, 0.75, 1]
        with bar.one_pass(model):
            model(IMAGES)
        assert seen[4:] == [2], "short passes are not watched"
    assert not any(block._forward_hooks for block in model)


def test_describe_device_names_what_a_number_depends_on() -> None:
    description = describe_device("cpu")
    assert description["type"] == "cpu"
    assert description["name"]
    assert description["torch"] == torch.__version__
    assert {"python", "timm", "torchvision", "threads", "cuda"} <= set(description)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda_excludes_the_other_models() -> None:
    images = random_images(2, 32, "cuda")
    small = nn.Conv2d(3, 4, 3, device="cuda")
    large = nn.Sequential(nn.Conv2d(3, 4, 3, device="cuda"), nn.Flatten(), nn.Linear(3600, 10_000, device="cuda"))
    result = compare({"small": small, "large": large}, images, baseline="small", rounds=3)
    weights_mb = 3600 * 10_000 * 4 / 2**20
    assert result["large"].speed.peak_memory_mb == pytest.approx(weights_mb, rel=0.2)
    assert result["small"].speed.peak_memory_mb is not None
    assert result["small"].speed.peak_memory_mb < weights_mb / 4
    assert describe_device("cuda")["driver"]
