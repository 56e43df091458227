"""The accuracy script end to end: generated images, one process and two, both folder layouts, wrong inputs."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.tests.reference import build
from hourglass_swag import imagenet_1k_eval
from hourglass_swag.evaluation import AverageMeter, ProgressMeter, accuracy, make_meters, swag_eval_transform
from hourglass_swag.models import create
from hourglass_swag.tools import processes
from hourglass_swag.tools.sweep import read_settings, table

SCRIPT = Path(imagenet_1k_eval.__file__)
LAST_LINE = re.compile(r"^ \*   Acc@1 (\d+\.\d{3}) Acc@5 (\d+\.\d{3})$")
NETWORK = ["-r", "32", "-j", "0", "-b", "4"]


def write_images(folder: Path, number: int) -> None:
    """Images of two classes, which share them unevenly and come in several shapes."""
    draw = np.random.default_rng(0)
    for i in range(number):
        target = folder / ("n01" if i % 3 else "n02") / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (32 + 3 * i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Weights that tell images apart, and 7 images under val/, the same under img_val/ elsewhere."""
    root = tmp_path_factory.mktemp("material")
    torch.save(build(partial(create, "vit_desk"), 1, dtype=torch.float32).state_dict(), root / "desk.pth")
    write_images(root / "data" / "val", 7)
    write_images(root / "swag" / "img_val", 7)
    return root


def run_script(*arguments: object, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)]
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
    )


def evaluate(material: Path, *arguments: object, data: str = "data", model: str = "vit_desk") -> dict:
    """The script's main(), in this process."""
    words = ["-m", model, *NETWORK, "--weights", material / "desk.pth", *arguments, material / data]
    return imagenet_1k_eval.main([str(word) for word in words])


@pytest.mark.slow
def test_the_script_and_two_processes_give_the_same_accuracy(material, tmp_path):
    arguments = ["-m", "hourglass_vit_desk", *NETWORK, "-l", 2, "-n", 16, "--weights", material / "desk.pth"]
    arguments += ["-p", 1, material / "data"]
    one = run_script(*arguments, "--output", tmp_path / "one.json")
    assert one.returncode == 0, one.stderr
    two = run_script(
        *arguments,
        "--output",
        tmp_path / "two.json",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    )
    assert two.returncode == 0, two.stderr
    results = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    assert [result["images"] for result in results] == [7, 7]
    assert [result["processes"] for result in results] == [1, 2]
    for key in ("top1_percent", "top5_percent"):
        assert results[0][key] == results[1][key]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)
    lines = [done.stdout.splitlines() for done in (one, two)]
    assert lines[0][-1] == lines[1][-1]
    printed = LAST_LINE.match(lines[0][-1])
    assert printed
    assert float(printed[1]) == pytest.approx(results[0]["top1_percent"], abs=1e-3)
    assert sum(line.startswith("Test: [") for line in lines[0]) == 2  # 4 + 3 images
    assert sum(line.startswith("Test: [") for line in lines[1]) == 2  # rank 0 has 4, two at a time
    assert lines[0][1] == "using CPU, this will be slow"


def test_the_published_folder_layout_is_the_same_data(material):
    assert evaluate(material)["loss"] == evaluate(material, data="swag")["loss"]


def test_accuracy_is_that_of_the_network_on_the_transformed_images(material, capsys):
    result = evaluate(material)
    model = build(partial(create, "vit_desk"), 1, dtype=torch.float32)
    right = 0
    for path in sorted((material / "data" / "val").glob("*/*.png")):
        with Image.open(path) as image, torch.no_grad():
            right += int(model(swag_eval_transform(32)(image)[None]).argmax()) == (path.parent.name == "n02")
    assert result["top1_percent"] == pytest.approx(100 * right / 7)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f" *   Acc@1 {100 * right / 7:.3f} Acc@5 ")


def test_options_of_a_run(material, capsys):
    assert evaluate(material, "--limit", 3)["images"] == 3
    assert evaluate(material, "--amp", "bf16")["images"] == 7
    digits = ["-m", "vit_desk", "-r", "32", "-j", "0", "--dataset", "digits", "--no-pretrained", "--limit", "50"]
    assert imagenet_1k_eval.main(digits)["images"] == 50
    assert "the weights are random" in capsys.readouterr().err


@pytest.mark.slow
def test_one_process_per_gpu_or_one_on_the_cpu(material, capfd):
    result = evaluate(material, "--multiprocessing-distributed", "--world-size", 1, "--rank", 0)
    assert (result["images"], result["processes"]) == (7, max(torch.cuda.device_count(), 1))
    assert LAST_LINE.match(capfd.readouterr().out.splitlines()[-1])


def test_bad_images_stop_the_run_or_are_counted(material, tmp_path, capsys):
    write_images(tmp_path / "val", 5)
    (tmp_path / "val" / "n01" / "broken.png").write_bytes(b"no image")
    words = ["-m", "vit_desk", *NETWORK, "--weights", str(material / "desk.pth"), str(tmp_path)]
    with pytest.raises(SystemExit, match=r"cannot decode image .*broken\.png"):
        imagenet_1k_eval.main(words)
    result = imagenet_1k_eval.main([*words, "--skip-bad-images"])
    assert (result["images"], result["skipped"]) == (5, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "skipped 1 images that cannot be decoded"
    assert LAST_LINE.match(lines[-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "vit_desk", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["-m", "vit_desk", "--weights", "/nowhere.pth", "DATA"], "/nowhere.pth: no such file"),
        (["-m", "vit_desk", "DATA"], "vit_desk has no published weights"),
        (
            ["-m", "hourglass_vit_desk", "--no-pretrained", "DATA"],
            "num_clusters (-n, --num_cluster) must be a square, got 1000",
        ),
        (["-m", "vit_desk", "-r", "30", "--no-pretrained", "DATA"], "multiple of patch_size = 4, got 30"),
        (
            [
                "-m",
                "smyrf_vit_desk",
                "--smyrf_plug_in_index",
                "0",
                "--smyrf_n_hashes",
                "1",
                "--smyrf_q_cluster_size",
                "64",
                "--smyrf_k_cluster_size",
                "64",
                "--no-pretrained",
                "DATA",
            ],
            "must be multiples of the cluster sizes 64, 64 (--smyrf_q_cluster_size, --smyrf_k_cluster_size)",
        ),
        (
            ["-m", "vit_desk", "--world-size", "2", "--rank", "0", "DATA"],
            "multicast address, where nothing can listen",
        ),
        (["-m", "vit_desk", "--world-size", "2", "DATA"], "--world-size 2 needs a --rank from 0 to 1, got -1"),
        (["-m", "vit_desk", "--device", "tpu", "DATA"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["-m", "vit_desk", "--amp", "fp16", "--no-pretrained", "DATA"], "--amp fp16 needs a CUDA device"),
    ],
)
def test_wrong_inputs_are_named_in_one_line(material, words, message):
    if "--device" not in words:
        words = [*words, "--device", "cpu"]
    resolution = [] if "-r" in words else ["-r", "32"]
    words = [str(material / "data") if word == "DATA" else word for word in words]
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        imagenet_1k_eval.main([*words, *resolution, "-j", "0"])
    assert str(caught.value).startswith("error: ")


def test_flags_are_not_abbreviated(capsys):
    """An abbreviated --multiprocessing-distributed would reach the processes it starts, and start them again."""
    with pytest.raises(SystemExit):
        imagenet_1k_eval.parse_args(["-m", "vit_desk", "--dataset", "digits", "--multiproc"])
    assert "unrecognized arguments: --multiproc" in capsys.readouterr().err


def test_logits_that_are_not_numbers_give_no_accuracy(material, tmp_path):
    state = torch.load(material / "desk.pth", weights_only=True)
    state["class_token"].fill_(3e38)  # a number, but not with another added
    torch.save(state, tmp_path / "nan.pth")
    words = ["-m", "vit_desk", *NETWORK, "--weights", str(tmp_path / "nan.pth"), str(material / "data")]
    with pytest.raises(SystemExit, match="logits that are not numbers"):
        imagenet_1k_eval.main(words)


def test_a_label_beyond_the_classes_is_an_error(material, tmp_path):
    for i in range(12):
        folder = tmp_path / "val" / f"class{i:02}"
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(folder / "a.png")
    words = ["-m", "vit_desk", *NETWORK, "--weights", str(material / "desk.pth"), str(tmp_path)]
    with pytest.raises(SystemExit, match="the model knows classes 0 to 9"):
        imagenet_1k_eval.main(words)


def test_accuracy_with_few_classes_and_ties_of_batches():
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    acc1, acc5 = accuracy(logits, torch.tensor([1, 1, 1]), topk=(1, 5))
    assert acc1.item() == pytest.approx(200 / 3)
    assert acc5.item() == pytest.approx(100)
    assert acc1.shape == (1,)


def test_meters_average_over_images(capsys):
    meter = AverageMeter("Acc@1", ":6.2f")
    meter.update(100.0, 1)
    meter.update(torch.tensor([50.0]), 3)
    assert str(meter) == "Acc@1  50.00 ( 62.50)"
    meter.reset()
    assert meter.count == 0
    ProgressMeter(1000, make_meters()[2:], prefix="Test: ").display(7)
    assert capsys.readouterr().out == "Test: [   7/1000]\tAcc@1   0.00 (  0.00)\tAcc@5   0.00 (  0.00)\n"


def test_shares_of_a_machines_batch(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [processes.images_per_process(200, size) for size in (1, 3, 400)] == [200, 66, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes.images_per_process(200, 8) == 100


def test_where_processes_meet(monkeypatch):
    assert processes.meeting_point("tcp://10.0.0.1:2345") == ("10.0.0.1", 2345)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert processes.meeting_point("env://") == ("node7", 29500)
    for wrong in ("tcp://10.0.0.1", "10.0.0.1:2345", "tcp://10.0.0.1:port"):
        with pytest.raises(SystemExit, match="--dist-url must be tcp://HOST:PORT"):
            processes.meeting_point(wrong)


@pytest.mark.slow
def test_processes_started_by_hand(material, tmp_path):
    """The published flags --world-size, --rank and --dist-url: every process is started by its own command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["-m", "vit_desk", *NETWORK, "--weights", material / "desk.pth", "--device", "cpu"]
    arguments += ["--world-size", 2, "--dist-url", f"tcp://127.0.0.1:{port}", "--output", tmp_path / "r.json"]
    commands = [
        [sys.executable, str(SCRIPT), *map(str, arguments), "--rank", str(rank), str(material / "data")]
        for rank in range(2)
    ]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [job.communicate(timeout=180)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert LAST_LINE.match(outputs[0].splitlines()[-1])
    assert outputs[1] == ""
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 7


def test_a_sweep_gives_what_single_runs_give(material, tmp_path, capsys):
    file = tmp_path / "rows.txt"
    lines = [
        "-m vit_desk -r 32",
        "-m tome_vit_desk -r 32 --tome_r 4",
        "-m smyrf_vit_desk -r 32 --smyrf_n_hashes 4 --smyrf_padded",
    ]
    file.write_text("# small\n" + "\n".join(lines) + "\n")
    common = ["-j", "0", "-b", "4", "--seed", "3", "--weights", str(material / "desk.pth"), str(material / "data")]
    kept = ["--cache-decoded", str(tmp_path / "kept")]
    rows = imagenet_1k_eval.main(["--sweep", str(file), *kept, "--output", str(tmp_path / "out.json"), *common])["rows"]
    last = capsys.readouterr().out.splitlines()[-4:]
    assert list(rows) == lines == [line.rsplit("  ", 1)[0].rstrip() for line in last[1:]]
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    for line in lines:
        alone = imagenet_1k_eval.main([*line.split(), *kept, *common])
        assert {key: alone[key] for key in ("loss", "top1_percent", "images")} == {
            key: rows[line][key] for key in ("loss", "top1_percent", "images")
        }


def test_a_network_of_a_sweep_that_fails_leaves_the_others(material, tmp_path, capsys, monkeypatch):
    file, output = tmp_path / "rows.txt", tmp_path / "out.json"
    file.write_text("-m vit_desk -r 32\n-m tome_vit_desk -r 32 --tome_r 4\n-m ats_vit_desk -r 32\n")
    build_models = imagenet_1k_eval.build_models

    def one_damaged(*args):
        models = build_models(*args)
        for name in models:
            if "tome" in name:
                models[name].register_forward_hook(lambda module, images, logits: logits * torch.nan)
        return models

    monkeypatch.setattr(imagenet_1k_eval, "build_models", one_damaged)
    words = ["--sweep", str(file), "--output", str(output), "-j", "0", "-b", "4", "--no-pretrained", "--seed", "3"]
    with pytest.raises(SystemExit) as ended:
        imagenet_1k_eval.main([*words, str(material / "data")])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "--tome_r 4: the network gives logits that are not numbers" in said.err
    assert [line.rsplit("  ", 1)[0].rstrip() for line in said.out.splitlines()[-2:]] == [
        "-m vit_desk -r 32",
        "-m ats_vit_desk -r 32",
    ]
    assert list(json.loads(output.read_text())["rows"]) == ["-m vit_desk -r 32", "-m ats_vit_desk -r 32"]


def test_a_sweep_takes_published_rows_and_names_what_is_none(material, tmp_path, capsys):
    groups = read_settings("tome,hourglass-l16-*,swag-l16")
    assert [group[0].shares for group in groups] == [(512, "vit_l16_in1k.torch"), (518, "vit_h14_in1k.torch")]
    assert {"swag-l16", "tome-l16-r10"} < {setting.name for setting in groups[0]}
    lines = table(groups[1], {setting.name: {"top1_percent": 88.5} for setting in groups[1]}).splitlines()
    assert lines[1] == "tome-h14-r10   88.50       88.5       +0.00"
    bad = tmp_path / "rows.txt"
    bad.write_text("-m tome_vit_desk -r 32 --base_keep_rate 0.5\n")
    unclosed = tmp_path / "unclosed.txt"
    unclosed.write_text("-m vit_desk -r '32\n")
    assert read_settings(",".join(["swag-l16"] * 100))[0][0].name == "swag-l16"  # longer than the name of any file
    data = str(material / "data")
    for words, message in (
        (["--sweep", "tone"], "--sweep tone: no file and no published row or table"),
        (["--sweep", str(bad)], "rows.txt, line 1: .*a flag of another method"),
        (["--sweep", str(unclosed)], "unclosed.txt, line 1: No closing quotation"),
        (["--sweep", "tome", "--weights", "x" * 300], "File name too long"),
        (["--sweep", "tome", "-r", "512"], "--sweep says which networks: leave out -m, -r"),
        (["--sweep", "tome", "--weights", str(material / "desk.pth")], "--weights is one file, and the networks"),
    ):
        with pytest.raises(SystemExit) as stopped:
            imagenet_1k_eval.main([*words, data])
        assert re.search(message, f"{stopped.value}{capsys.readouterr().err}")
