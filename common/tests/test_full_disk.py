"""Full disks, and outputs where nothing can be written: one line, nothing half-written, what was there stays."""

import errno
import importlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from common.run.checkpoint import load_safely, save_atomic, save_described
from common.run.errors import OutputError, UsageError
from common.run.files import append, check_output, output_files, write_atomic
from common.run.launch import World
from common.run.metrics import Record
from common.run.program import run
from common.tests.full_disk import contents, fill_disk
from common.tests.jobs import training
from dvt.tests.test_transfer import few_digits
from sit.tests.tools import SMALL, miniature_imagenet
from uvc import compress
from uvc.tests.conftest import OWN

ALONE = World(0, 1, 0, torch.device("cpu"), None)


@pytest.mark.parametrize("room", [0, 1, 7, 8])
def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    file = tmp_path / "log.jsonl"
    append(file, "first\n")
    fill_disk(monkeypatch, room)
    with pytest.raises(OutputError, match=r"cannot write .*log.jsonl \(No space left on device\)"):
        append(file, "nine byte")
    assert file.read_text() == "first\n"


@pytest.mark.parametrize("room", [0, 40, 400])
@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_atomic(file, "new" * 1000),
        lambda file: save_atomic({"x": torch.ones(1000)}, file),
        lambda file: save_described(file, {"x": torch.ones(1000)}, "key", "{}"),
    ],
    ids=["text", "checkpoint", "safetensors"],
)
def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Any], room: int
) -> None:
    (tmp_path / "file").write_text("old")
    fill_disk(monkeypatch, room)
    with pytest.raises(OutputError, match=r"cannot write .*file \(No space left on device\): is the disk full"):
        write(tmp_path / "file")
    assert contents(tmp_path) == {"file": b"old"}


def test_a_log_is_rewound_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path / "log.jsonl")
    for step in range(3):
        record.write("epoch", {"epoch": step, "step": step})
    before = contents(tmp_path)
    fill_disk(monkeypatch, 30)
    with pytest.raises(OutputError, match=r"log.jsonl \(No space left"):
        record.rewind(1, 1)
    assert contents(tmp_path) == before


def test_a_run_that_filled_the_disk_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the space ends; the checkpoint and the log are whole, and what follows is what it would have been."""
    digest = training(tmp_path / "whole", ALONE)
    needed = sum(map(len, contents(tmp_path / "whole").values()))
    for room in range(0, 4 * needed, needed // 3):
        with monkeypatch.context() as patch:
            fill_disk(patch, room)
            with pytest.raises(OutputError, match="No space left") if room < needed // 2 else suppress(OutputError):
                training(tmp_path / "full", ALONE)
                break
        found = contents(tmp_path / "full")
        assert found.keys() <= {"last.pth", "best.pth", "log.jsonl"}
        for name in found.keys() - {"log.jsonl"}:
            load_safely(tmp_path / "full" / name)
        for line in found.get("log.jsonl", b"").splitlines():
            json.loads(line)
    assert room > needed, "the disk was never full in the middle of a run"
    assert training(tmp_path / "full", ALONE) == digest


# -------------------------------------------------- every program that trains


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``, and small networks with random weights for every program."""
    folder = tmp_path_factory.mktemp("material")
    miniature_imagenet(folder / "data")
    torch.manual_seed(0)
    small = {"img_size": 32, "num_classes": 3}
    import scala.models_scala  # noqa: F401 - registers its networks
    from dvt.models import create_model
    from sit.models.lvvit import build_lvvit
    from uvc.models import create

    probed = "deit_so_tiny_patch16_224_scala"
    known = {"model": probed, "smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.25, "input_size": 32}
    state = timm.create_model(probed, **small).state_dict()
    save_atomic({"model": state, "args": known}, folder / "scala.pth")
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0)
    save_atomic(teacher.state_dict(), folder / "vit.pth")
    save_atomic({"model": build_lvvit("sit_lvvit_desk", num_classes=3).state_dict()}, folder / "sit.pth")
    save_atomic({"state_dict": create_model("DVT_desk", num_classes=3, img_size=32).state_dict()}, folder / "dvt.pth")
    dense = create("deit_desk", num_classes=3).state_dict()
    dense = {key: value for key, value in dense.items() if not any(word in key for word in OWN)}
    save_atomic({"model": dense}, folder / "uvc.pth")
    return folder


HERE = "--device cpu --workers 0 --batch-size 4 --data-path {data}"
UVC = "--device cpu --num_workers 0 --train_batch_size 4 --model_type deit_desk --data_dir {data} --model_path {uvc}"
WIDTHS = "--granularity 0.25 --full_warm_epoch 0 --warmup-epochs 0 --no-repeated-aug"
TRAINING = {
    "scala.main_scala": f"{HERE} {WIDTHS} --input-size 32 --patch-size 8 --embed-dim 32 --num-heads 4 --depth 1 "
    "--model deit_tiny_patch16_224_scala --epochs 1 --output_dir {out} --resume auto",
    "scala.main_dinov2": f"{HERE} {WIDTHS} --input-size 48 --model deit_so_tiny_patch16_224_scala --epochs 1 "
    "--teacher-model vit_tiny_patch16_224 --teacher-path {vit} --teacher-classes 0 --output-dir {out} --resume auto",
    "scala.linear_probe": f"{HERE} --data-set folder --checkpoint {{scala}} --ratios 0.5 1.0 --epochs 1 "
    "--output-dir {out} --resume auto",
    "dvt.main": "{data} --model DVT_desk --data-set IMNET --img-size 32 --num-classes 3 -b 4 -j 0 --device cpu "
    "--warmup-epochs 0 --cooldown-epochs 0 --epochs 1 --output {out} --experiment a --resume auto",
    "dvt.transfer_learning": "--model DVT_desk --dataset digits --b 32 --workers 0 --device cpu --epochs 1 "
    "--output {out}",
    "sit.main": " ".join(SMALL) + " --data-path {data} --teacher-path {sit} --finetune {sit} --print-freq 0 "
    "--output_dir {out} --resume auto",
    "uvc.joint_train": f"{UVC} --distillation-type none --num_epochs 1 --warmup_epochs 0 --log_interval 2 "
    "--output_dir {out}",
    "uvc.post_train": f"{UVC} --distillation-type none --epochs 1 --checkpoint_dir {{uvc}} --output_dir {{out}}",
    "hourglass_swag.train": f"{HERE} -m vit_desk --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 "
    "--output-dir {out} --resume auto",
}


def words_of(text: str, material: Path, out: Path) -> list[str]:
    files = {file.stem: file for file in material.glob("*.pth")}
    return text.format(data=material / "data", out=out, **files).split()


def start(program: str, words: list[str]) -> None:
    module = importlib.import_module(program)
    module.main(module.parse_args(words) if program == "hourglass_swag.get_flops_fps" else words)


@pytest.mark.parametrize("program", TRAINING)
def test_training_on_a_full_disk(program: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if program == "dvt.transfer_learning":
        few_digits(monkeypatch)
    words = words_of(TRAINING[program], material, tmp_path / "out")
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(OutputError, match=r"cannot write .* \(No space left on device\)"):
            start(program, words)
    assert not any(contents(tmp_path).values())
    start(program, words)
    before = contents(tmp_path)
    assert any(name.endswith("log.jsonl") for name in before)
    if program == "dvt.transfer_learning":
        words.append("--resume")
    if program.startswith("uvc."):
        words += ["--resume", "auto"]
    with monkeypatch.context() as patch:
        fill_disk(patch, room=20)
        with pytest.raises(OutputError, match=r"cannot write .* \(No space left on device\)"):
            start(program, words)
    assert contents(tmp_path) == before


# -------------------------------------------------- every program that evaluates, measures, exports or draws

EVALUATING = {
    "scala.main_scala": f"--eval {HERE} --input-size 32 --model deit_so_tiny_patch16_224_scala --resume {{scala}} "
    "--eval_ratio 0.5 --output_dir {out}",
    "dvt.main": "{data} --model DVT_desk --data-set IMNET --img-size 32 --num-classes 3 -b 4 -j 0 --device cpu "
    "--eval_checkpoint {dvt} --output {out}",
    "sit.main": " ".join(SMALL) + " --data-path {data} --eval --finetune {sit} --teacher-path= --output_dir {out} "
    "--distillation-type none",
    "uvc.post_train": f"{UVC} --eval --distillation-type none --checkpoint_dir {{uvc}} --output_dir {{out}}",
}
"""Programs whose results go to a folder."""
WRITING = {
    "scala.benchmark": "--output {out}",
    "scala.export": "--checkpoint {scala} --ratio 0.5 --output {out}.safetensors",
    "scala.visualize": "--output {out}.png",
    "dvt.inference": "--model DVT_desk --checkpoint_path {dvt} --data_url {data} --eval_mode 2 --img-size 32 "
    "--num-classes 3 --workers 0 --device cpu --search-images 8 --output {out}",
    "dvt.benchmark": "--model DVT_desk --output {out}",
    "dvt.pack": "--model DVT_desk --checkpoint {dvt} {data} --img-size 32 --num-classes 3 --workers 0 --device cpu "
    "--search-images 8 --output {out}",
    "sit.export": "--output {out}.pt",
    "sit.strip": "{sit} {out}",
    "sit.speed_test": "--output {out}",
    "uvc.compress": "--checkpoint {uvc} --model_type deit_desk --output {out}",
    "uvc.draw_structure": "{uvc} --model_type deit_desk --output {out}",
    "hourglass_swag.get_flops_fps": "-m vit_desk --no-pretrained --output {out}",
    "hourglass_swag.export": "-m vit_desk --no-pretrained --torch-export {out}",
    "hourglass_swag.imagenet_1k_eval": "-m vit_desk --no-pretrained {data} --dataset folder --workers 0 "
    "--device cpu -b 4 --output {out}",
}
"""Programs whose result is one file."""
SLOW = ("scala.benchmark", "dvt.benchmark", "sit.speed_test", "hourglass_swag.get_flops_fps", "hourglass_swag.export")


QUICK = [*EVALUATING.items(), *(item for item in WRITING.items() if item[0] not in SLOW)]


@pytest.mark.parametrize(("program", "text"), QUICK, ids=[program for program, _ in QUICK])
def test_results_on_a_full_disk(
    program: str, text: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(text, material, tmp_path / "out")
    start(program, words)
    before = contents(tmp_path)
    assert before
    fill_disk(monkeypatch, room=20)
    with pytest.raises((OutputError, SystemExit), match=r"cannot write .*out.* \(No space left on device\)"):
        start(program, words)
    assert contents(tmp_path) == before


PLACES = [(program, text, True) for program, text in (*TRAINING.items(), *EVALUATING.items())]
PLACES += [(program, text, False) for program, text in WRITING.items()]


@pytest.mark.parametrize(("program", "text", "folder"), PLACES, ids=[program for program, _, _ in PLACES])
def test_outputs_that_cannot_be_written_are_named_at_once(
    program: str, text: str, folder: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")
    words = words_of(text, material, tmp_path / ("file" if folder else "file/out"))
    with pytest.raises((UsageError, SystemExit), match=r"the output: .*file is a file, not a folder; name another"):
        start(program, words)
    assert contents(tmp_path) == {"file": b"old"}
    (tmp_path / "closed").mkdir()
    make = tempfile.TemporaryFile

    def refuse(dir: Path) -> Any:  # the tests may run as root, who may write everywhere
        if dir == tmp_path / "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises((UsageError, SystemExit), match=r"the output: .*write in .*closed: Permission denied; name"):
        start(program, words_of(text, material, tmp_path / "closed" / "out"))
    assert os.listdir(tmp_path / "closed") == []


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, found in (("pipe", "pipe is a pipe or a device"), ("folder", "folder is a folder")):
        with pytest.raises(OutputError, match=f"cannot write .*{name}"):
            write_atomic(tmp_path / name, "text")
        with pytest.raises(UsageError, match=found):
            check_output(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_no_output_takes_the_place_of_an_input_or_of_another(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    (tmp_path / "link").symlink_to("weights.pth")
    for name in ("weights.pth", "link", "../" + tmp_path.name + "/weights.pth"):
        with pytest.raises(UsageError, match="read or written as something else, which would be lost"):
            check_output(tmp_path / name, inputs=[None, tmp_path / "weights.pth"])
    check_output(tmp_path / "a", None, tmp_path / "b")
    with pytest.raises(UsageError, match="a is read or written as something else"):
        check_output(tmp_path / "a", None, tmp_path / "a")
    args = ["--checkpoint", str(tmp_path / "weights.pth"), "--output", str(tmp_path / "f")]
    with pytest.raises(UsageError, match=r"f\.safetensors is read or written as something else"):
        compress.main([*args, "--onnx", str(tmp_path / "f.safetensors")])
    assert sorted(os.listdir(tmp_path)) == ["link", "weights.pth"]


def test_images_of_one_name_are_drawn_to_files_of_their_own() -> None:
    files = output_files([Path("a/x.png"), Path("b/x.jpg"), Path("y.png")], "m", Path("out"))
    assert [file.name for file in files] == ["x_m.png", "x_m_2.png", "y_m.png"]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_else_a_disk_refuses_is_one_line(reason: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(reason, os.strerror(reason), "figure.png")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: [Errno {reason}] {os.strerror(reason)}: 'figure.png'\n"
