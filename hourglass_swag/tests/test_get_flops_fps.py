"""The cost and speed tool, as a user runs it, and the parts of it that need no process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.ledger.results import parse
from common.ledger.tables import load_tables
from common.measure.benchmark import BenchmarkError
from common.run.checkpoint import CheckpointError
from common.run.files import ROOT
from hourglass_swag import get_flops_fps
from hourglass_swag.tools import speed
from hourglass_swag.tools.costs import build_network, count_costs, parse_network, published_row

DESK = ["-m", "hourglass_vit_desk", "-r", "32", "-l", "2", "-n", "16"]


def run(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "hourglass_swag/get_flops_fps.py"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120, check=False
    )


def lines(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def test_the_command_prints_costs_first_and_the_throughput_last(tmp_path: Path) -> None:
    done = run(*DESK, "-b", "4", "--runs", "4", "--fps", "--against", "vit_desk", "--output", "o.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed[0].startswith("Namespace(model='hourglass_vit_desk', resolution=32, batch_size=4")
    assert printed[1] == "Flops: 0.011955 G"
    assert printed[-1].startswith("Throughput: ")
    assert printed[-1].endswith(" im/s")
    found = lines(done.stdout)
    assert "vit_desk: Flops: 0.024591 G" in printed
    assert found["Parameters"] == "0.29643 M"
    assert "eager" in found["Device"]
    assert found["Clustering"].endswith("of the time at batch 4")
    assert float(found["FPS"].split()[0]) > 0
    ratio, realised = found["FLOPs ratio"].split(", realised/theoretical: ")
    assert float(ratio) == pytest.approx(0.024591 / 0.011955, abs=1e-3)
    speed_up = float(found["Speed-up at batch 4"].split(",")[0])
    assert float(realised) == pytest.approx(speed_up / float(ratio), rel=2e-3)
    records = parse((tmp_path / "o.json").read_text(), where="o.json")[1]
    assert [(record.row, record.column) for record in records] == [
        ("hourglass_vit_desk", "fps"),
        ("vit_desk", "fps"),
        ("hourglass_vit_desk", "throughput_ips"),
        ("vit_desk", "throughput_ips"),
    ]
    assert [record.reference_row for record in records] == ["vit_desk", None, "vit_desk", None]
    assert records[2].ratio == pytest.approx(speed_up, abs=1e-3)
    assert records[2].rounds == 3
    assert json.loads((tmp_path / "o.json").read_text())["command"].endswith("--output o.json")


def test_what_cannot_be_measured_ends_with_one_line() -> None:
    done = run("-m", "hourglass_vit_desk", "-r", "32", "-l", "2")
    assert done.returncode == 2
    assert done.stderr == "error: num_clusters (-n, --num_cluster) must be a square, got 1000; nearest are 961, 1024\n"


def test_the_published_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    args = get_flops_fps.parse_args(["-m", "vit_desk", "-r", "32", "-b", "2", "--runs", "4", "--paper"])
    get_flops_fps.main(args)
    printed = capsys.readouterr().out
    assert "in 3 passes" in printed
    assert printed.splitlines()[-1].startswith("Throughput: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--paper", "--against", "vit_desk"], "--paper is one network in float32"),
        (["--paper", "--dtype", "bfloat16"], "--paper is one network in float32"),
        (["--against", "vit_huge"], "vit_huge"),
        (["--against", "vit_desk --speed"], "unknown words"),
        (["--against", "vit_desk -r 64"], "cannot differ"),
        (["-b", "0"], "--batch-size must be at least 1, got 0"),
        (["-m", "vit_tiny"], "vit_tiny"),
    ],
)
def test_wrong_flags_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        get_flops_fps.parse_args(["-m", "vit_desk", "-r", "32", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_weights_that_are_missing_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"missing\.pth"):
        get_flops_fps.main(get_flops_fps.parse_args(["-m", "vit_desk", "-r", "32", "--weights", "missing.pth"]))


def test_costs_of_the_published_rows() -> None:
    """All dense and Hourglass rows, to the published digit."""
    rows = [row for table in load_tables("hourglass_swag") if table.name in ("swag", "hourglass") for row in table.rows]
    found = {row.id: round(count_costs(parse_network(row.arguments)).gflops, 1) for row in rows}
    assert found == {row.id: float(row.published["gmacs"]) for row in rows}
    assert len(found) == 8


def test_clustering_share_of_the_macs() -> None:
    costs = count_costs(parse_network("-m hourglass_vit_l16_in1k -r 512 -l 12 -n 529"))
    clustering = 5 * 2 * 1024 * 529 * 1024 / 1e9
    assert costs.clustering_percent == pytest.approx(100 * clustering / costs.gmacs)
    assert count_costs(parse_network("-m vit_l16_in1k -r 512")).clustering_percent is None


def test_a_row_is_recognised_by_its_settings() -> None:
    row = published_row(parse_network("-r 512 -n 529 -m hourglass_vit_l16_in1k -l 12"), "fps")
    assert row is not None
    assert row.key == "hourglass/hourglass-l16-12-23x23"
    assert published_row(parse_network("-r 512 -n 529 -m hourglass_vit_l16_in1k -l 11"), "fps") is None
    dense = published_row(parse_network("-r 518 -m vit_h14_in1k"), "throughput_ips")
    assert dense is not None
    assert dense.key == "swag/swag-h14"
    with pytest.raises(ValueError, match="unknown words"):
        parse_network("-m vit_desk --speed")


def test_a_batch_that_cannot_fit_into_the_memory_is_refused_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_network(parse_network("-m vit_desk -r 32"))
    monkeypatch.setattr(speed, "available_memory_bytes", lambda device: 10 * 2**20)
    with pytest.raises(
        BenchmarkError, match=r"a batch of 1000 needs about .* GiB beside the weights, .* -b \d+ or less"
    ):
        speed.check_cpu(model, 32, 1000, torch.float32, passes=1, limit_s=None)


def test_a_long_run_on_a_cpu_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_network(parse_network("-m vit_desk -r 32"))
    speed.check_cpu(model, 32, 1, torch.float32, passes=1, limit_s=None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(speed, "LONG_S", 0)
    speed.check_cpu(model, 32, 8, torch.float32, passes=50, limit_s=600)
    warning = capsys.readouterr().err
    assert "a batch of 8 takes about" in warning
    assert "-b 4" in warning
    assert "After 600 s" in warning


def test_networks_are_cast_and_compared_with_their_own_flags() -> None:
    args = get_flops_fps.parse_args([*DESK, "--dtype", "bfloat16", "--against", "hourglass_vit_desk -l 4 -n 9"])
    networks = get_flops_fps.parse_networks(args)
    assert [network.clustering_location for network in networks.values()] == [2, 4]
    model = get_flops_fps.load(args, list(networks.values())[1], torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hourglass_on_a_gpu_reports_memory_and_share(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "hourglass_vit_l16_in1k", "-r", "512", "-l", "8", "-n", "256", "-b", "8", "--runs", "8"]
    get_flops_fps.main(get_flops_fps.parse_args([*words, "--against", "vit_l16_in1k", "--dtype", dtype]))
    printed = capsys.readouterr().out
    assert "peak memory" in printed
    assert "of the time at batch 8" in printed
