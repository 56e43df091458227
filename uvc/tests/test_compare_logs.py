"""Comparison of a run's course with the published logs, and the image of a structure."""

import json

import pytest

from common.run.checkpoint import save_atomic
from common.run.errors import UsageError
from uvc import compare_logs, draw_structure
from uvc.compact_files import save_compact
from uvc.compare_logs import PUBLISHED, STAGE2, Epoch, check_stage1, read_run, read_text_log
from uvc.removal import compress
from uvc.tests.random_structures import random_network


def text_of(log):
    """A published log in its own form, from its facts, with fragments of progress bars and a second rank between."""
    lines = []
    for row in log.epochs:
        stage = "Warm Up" if row.epoch <= log.warmup_epochs else "UVC Train"
        lines += [f"Start [Epoch {row.epoch}] at Stage {stage}", "Training:  12%|#2| 3/25 [00:01<00:08]"]
        lines += [f"Global Steps: {row.step}", f"Valid Loss: {row.loss}", f"Valid Accuracy: {row.top1_percent}"]
        lines += [f"[Validation Sparsity|Step {row.step}|Epoch {row.epoch}]"] * 2
        lines += [f"Parameter size: 5.60M / 5.65M = {row.kept_percent}%"] * 2
        lines += [f"Expectation FLOPs: {row.expected_percent}% Real FLOPs: {row.real_percent}%"] * 2
    return "\n".join(lines)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != STAGE2])
def test_a_published_log_agrees_with_itself(name, tmp_path, capsys):
    log = PUBLISHED[name]
    epochs = read_text_log(text_of(log))
    assert [(e.epoch, e.top1_percent, e.real_percent) for e in epochs] == [
        (row.epoch, row.top1_percent, row.real_percent) for row in log.epochs
    ]
    path = tmp_path / "train.log"
    path.write_text(text_of(log))
    assert compare_logs.main([str(path), "--against", name]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1:] == ["of", "6", "checks", "hold"]


def write_run(folder, rows, **arguments):
    lines = [{"event": "start", "arguments": {"budget": 0.5, "warmup_epochs": 1, **arguments}}]
    for index, (top1, kept, real, blocks) in enumerate(rows):
        lines.append({
            "event": "epoch", "epoch": index, "test_top1_percent": top1, "test_kept_parameters_percent": kept,
            "test_expected_cost_percent": real, "test_remaining_cost_percent": real, "test_blocks_running": blocks,
        })  # fmt: skip
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "ep')


def test_a_run_of_ours_is_read_and_judged(tmp_path, capsys):
    write_run(tmp_path, [(70, 100, 100, 12), (50, 90, 60, 9), (60, 80, 49, 8)])
    assert compare_logs.main([str(tmp_path), "--against", "deit-tiny", "--plot", str(tmp_path / "course.png")]) == 0
    assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == "7 of 7 checks hold"


@pytest.mark.parametrize(
    ("rows", "failing"),
    [
        ([(70, 99, 100, 12), (50, 90, 60, 9), (60, 80, 49, 8)], "nothing is pruned during the warm-up"),
        ([(70, 100, 100, 12), (50, 90, 90, 9), (60, 80, 55, 8)], "the cost comes down to the budget"),
        ([(70, 100, 100, 12), (50, 90, 40, 9), (60, 80, 20, 8)], "the cost ends within one block and a half"),
        ([(70, 100, 100, 12), (80, 90, 60, 9), (90, 80, 49, 8)], "accuracy falls when pruning starts"),
        ([(70, 100, 100, 12), (50, 90, 50, 9), (40, 80, 49, 8)], "and recovers afterwards"),
        ([(70, 100, 100, 12), (50, 90, 50, 9), (60, 80, 49, 0)], "some blocks still run"),
        ([(70, 100, 100, 12)], "the run went beyond the warm-up"),
    ],
)
def test_each_check_can_fail(tmp_path, rows, failing, capsys):
    write_run(tmp_path, rows)
    assert compare_logs.main([str(tmp_path), "--against", "deit-tiny"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS")]
    assert len(failed) == 1
    assert failing in failed[0]


def test_soft_and_hard_cost_apart():
    run = [Epoch(1, 70.0, kept_percent=100.0), Epoch(2, 60.0, expected_percent=80.0, real_percent=45.0)]
    checks = check_stage1(run, PUBLISHED["deit-tiny"], budget=0.5, warmup_epochs=1)
    found = {check.name: check.holds for check in checks}
    assert not found["soft and hard cost agree at the end"]


def test_stage_2(tmp_path, capsys):
    write_run(tmp_path, [(75.5, None, None, None), (76.3, None, None, None), (78.0, None, None, None)])
    assert compare_logs.main([str(tmp_path), "--against", "deit-small-stage2"]) == 0
    assert "78.82" in capsys.readouterr().out
    write_run(tmp_path, [(75.5, None, None, None), (74.3, None, None, None)])
    assert compare_logs.main([str(tmp_path), "--against", "deit-small-stage2"]) == 1


def test_a_text_log_of_stage_2_counts_in_shares(tmp_path, capsys):
    path = tmp_path / "train.log"
    path.write_text("Valid Accuracy: 0.74238\nValid Loss: 1.0\nValid Accuracy: 0.75578\nValid Accuracy: 0.7633\n")
    assert compare_logs.main([str(path), "--against", "deit-small-stage2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "74.24", "74.24"]
    assert lines[3].split() == ["2", "76.33", "76.33"]


def test_a_run_without_warm_up(tmp_path):
    write_run(tmp_path, [(70, 90, 90, 12), (50, 80, 60, 9), (60, 80, 49, 8)], enable_warmup=False, warmup_epochs=5)
    assert compare_logs.main([str(tmp_path), "--against", "deit-tiny"]) == 0


def test_logs_that_say_nothing(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_run(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"event": "start"}\n')
    with pytest.raises(UsageError, match="nothing about any epoch"):
        compare_logs.main([str(tmp_path), "--against", "deit-tiny"])


def test_the_image_of_a_structure(tmp_path, capsys):
    model, _, _ = random_network(3, depth=3, img_size=16, patch="remove")
    save_atomic(model.state_dict(), tmp_path / "deit_desk_1.pth.tar")
    path, _ = save_compact(compress(model), tmp_path / "small", costs={"remaining_percent": 12.5})
    for file in (tmp_path / "deit_desk_1.pth.tar", path):
        structure = draw_structure.main([str(file), "--output", str(tmp_path / "s.png")])
        assert len(structure.blocks) == 3
        assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == "remaining 12.50 %"
