"""Speed measurements: right protocol, right networks, a record that can be filed. No time is asserted."""

from pathlib import Path

import pytest
import torch
from torch import nn

from common.ledger import results
from common.measure.benchmark import BenchmarkError, PairedSpeed, Speed
from sit import ledger, speed_test, timing


class Clock:
    """A clock that moves by the next of its steps at every second look, around each pass."""

    def __init__(self, steps: list[float]) -> None:
        self.steps, self.looks, self.now = steps, 0, 0.0

    def __call__(self) -> float:
        if self.looks % 2:
            self.now += self.steps[self.looks // 2 % len(self.steps)]
        self.looks += 1
        return self.now


class Counting(nn.Module):
    """Counts its passes in a buffer, which a trace keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1  # pyright: ignore[reportOperatorIssue]
        return images.flatten(1).sum(1) * self.weight


def test_levit_s_protocol_ends_when_the_times_sum_up_and_takes_their_mean():
    """Passes of 1, 3, 1, 3, ... seconds: the sixth reaches 12, the first sum of at least 10; their mean is 2."""
    clock = Clock([1.0, 3.0])
    model = Counting()
    found = timing.measure_levit(model, torch.zeros(4, 3, 2, 2), warmup_s=1e-9, seconds=10.0, clock=clock)
    assert clock.looks == 12
    assert found == pytest.approx(4 / 2)


def test_both_protocols_run_on_a_small_pair(capsys, monkeypatch):
    words = ["--model", "sit_lvvit_desk", "--protocol", "both", "--device", "cpu", "--batch-size", "2", "--rounds", "2"]
    found = speed_test.main([*words, "--levit-warmup-s", "0.01", "--levit-seconds", "0.02"])
    printed = capsys.readouterr().out
    assert "sit_lvvit_desk teacher: " in printed
    assert "realised/theoretical" in printed
    assert "images/s @ batch size 2 (traced, float32, 1 thread, processor time)" in printed
    assert printed.splitlines()[-1] == f"sit_lvvit_desk {found['sit_lvvit_desk']:.2f}x"


def test_what_is_timed_are_deployed_networks():
    models = timing.pair("sit_lvvit_desk", torch.device("cpu"), torch.float32)
    assert models["student"](torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert not hasattr(models["student"], "rtsm")
    assert not models["teacher"].slimmed


def test_shares_of_a_training_step_add_up():
    found = timing.measure_training(
        "sit_lvvit_desk", torch.device("cpu"), batch=2, rounds=2, clock=Clock([5.0, 2.0, 1.0])
    )
    assert found["plain"] + found["teacher"] + found["recovery"] == pytest.approx(found["step"])
    assert (found["step"], found["plain"], found["teacher"]) == (5000, 2000, 1000)


def test_a_record_can_be_filed(tmp_path: Path):
    def speed(ips: float) -> Speed:
        return Speed(4, 4e3 / ips, ips, 1.0, None, "float32", "cpu", False, 5)

    speeds = {"teacher": PairedSpeed(speed(10.0), 1.0, None), "student": PairedSpeed(speed(25.0), 2.5, 1.0)}
    record = ledger.record_of("sit_lvvit_large", speeds)
    assert (record.row, record.reference_row, record.resolution) == ("sit-l", "teachers/lvvit-l", 288)
    results.check_rows([record], where="test")
    with pytest.raises(BenchmarkError, match="no published row"):
        ledger.record_of("sit_lvvit_desk", speeds)


def test_flags_that_do_not_go_together(capsys):
    for words, message in (
        (["--protocol", "levit", "--output", "x"], "--output records our protocol only"),
        (["--model", "resnet50"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            speed_test.parse_args(words)
        assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_step_in_half_precision_has_the_bits_of_a_teacher_in_full():
    """Weights kept in float16 are what autocast converts them to."""
    from common.run.precision import autocast
    from sit.engine import store_for_autocast
    from sit.models.lvvit import build_lvvit

    device = torch.device("cuda")
    torch.manual_seed(0)
    teacher = build_lvvit("sit_lvvit_tiny", distillation_type=None).to(device).eval().requires_grad_(False)
    images = torch.randn(4, 3, 224, 224, device=device)
    with autocast("fp16", device), torch.no_grad():
        expected, tokens = teacher(images)
        store_for_autocast(teacher, torch.float16)
        found, stored = teacher(images)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(tokens, stored, strict=True))
