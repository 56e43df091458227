import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.run.errors import UsageError
from common.run.metrics import Means, ProgressLine, Record, clock_text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_are_over_pictures_and_continue() -> None:
    means = Means()
    means.add({"loss": 1.0, "token": 3.0}, 4)
    means.add({"loss": 4.0}, 2)
    again = Means(means.sums)
    again.add({"loss": 1.0}, 6)
    assert again.reduce() == {"loss": (4 + 8 + 6) / 12, "token": 3.0}
    assert means.reduce() == {"loss": 2.0, "token": 3.0}


def test_plain_progress_lines() -> None:
    out, clock = io.StringIO(), Clock()
    with ProgressLine("epoch 1/3", 10, file=out, interval_s=10, clock=clock) as line:
        for batch in range(10):
            clock.now += 4.0
            line.update(8, {"loss": 1.5 - batch / 10, "lr": 0.001})
    lines = out.getvalue().splitlines()
    assert lines[0] == "epoch 1/3  1/10 batches  2 img/s  0:36 left  loss 1.5  lr 0.001"
    assert [text.split()[2] for text in lines] == ["1/10", "4/10", "7/10", "10/10", "10/10"]
    assert lines[-1].split("  ")[3] == "0:00 left"


def test_short_work_prints_nothing() -> None:
    out, clock = io.StringIO(), Clock()
    with ProgressLine("test", 3, file=out, clock=clock) as line:
        for _ in range(3):
            clock.now += 0.5
            line.update(8)
    assert out.getvalue() == ""


def test_time_left_of_a_resumed_epoch_counts_its_own_batches() -> None:
    clock = Clock()
    line = ProgressLine("epoch", 100, done=50, file=io.StringIO(), clock=clock)
    assert "? left" in line.line()
    clock.now = 10.0
    line.update(8)
    assert "51/100 batches  1 img/s  8:10 left" in line.line()
    unknown = ProgressLine("epoch", None, file=io.StringIO(), clock=clock)
    unknown.update(1)
    assert unknown.line().startswith("epoch  1 batches")


def test_terminal_bar_shows_rate_time_left_and_terms() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with ProgressLine("epoch 1/3", 4, file=out) as line:
        assert line.bar is not None
        line.bar.delay = 0
        for _ in range(4):
            line.update(8, {"loss": 0.25})
            line.bar.refresh()
        text = str(line.bar)
    assert "epoch 1/3 100%" in text
    assert "img/s  loss 0.25" in text
    assert "left" in text


def test_progress_is_for_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.run.metrics.is_main", lambda: False)
    out, clock = io.StringIO(), Clock()
    with ProgressLine("test", 3, file=out, clock=clock) as line:
        clock.now = 100.0
        line.update(8)
    assert out.getvalue() == ""


def test_clock_text() -> None:
    assert [clock_text(seconds) for seconds in (0, 59.6, 3723, math.inf)] == ["0:00", "1:00", "1:02:03", "?"]


def test_record_is_one_valid_object_per_line(tmp_path: Path) -> None:
    record = Record(tmp_path / "deep" / "log.jsonl")
    record.write("start", {"arguments": {"path": Path("x"), "lr": float("inf")}})
    record.write("epoch", {"epoch": 0, "step": 5, "train_loss": torch.tensor(1.5), "test_loss": math.nan})
    first, second = events(tmp_path / "deep" / "log.jsonl")
    assert first == {"event": "start", "arguments": {"path": "x", "lr": None}}
    assert second == {"event": "epoch", "epoch": 0, "step": 5, "train_loss": 1.5, "test_loss": None}


def test_record_forgets_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record = Record(path)
    record.write("start", {})
    for epoch in range(3):
        record.write("step", {"epoch": epoch, "step": 2 * epoch + 1})
        record.write("epoch", {"epoch": epoch, "step": 2 * epoch + 2})
    record.write("width", {"ratio": 0.5})
    record.write("structure", {"step": 5, "heads": [1, 2]})
    record.write("structure", {"step": 6, "heads": [1, 1]})
    with path.open("a") as file:
        file.write('{"event": "epoch", "epo')  # killed while writing
    Record(path).rewind(2, 5)
    kept = [(row["event"], row.get("epoch"), row.get("step")) for row in events(path)]
    assert kept == [
        ("start", None, None), ("step", 0, 1), ("epoch", 0, 2), ("step", 1, 3), ("epoch", 1, 4), ("step", 2, 5),
        ("structure", None, 5),
    ]  # fmt: skip
    Record(path).rewind(0, 0)
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_rows_of_a_step_are_replaced_together(tmp_path: Path) -> None:
    record = Record(tmp_path / "log.jsonl")
    record.write("epoch", {"epoch": 0, "step": 5})
    record.replace("width", [{"ratio": 0.5}, {"ratio": 1}], step=5)
    record.replace("width", [{"ratio": 0.5}], step=7)
    record.replace("width", [{"ratio": 0.75}], step=5)
    kept = [(row["event"], row["step"], row.get("ratio")) for row in events(tmp_path / "log.jsonl")]
    assert kept == [("epoch", 5, None), ("width", 7, 0.5), ("width", 5, 0.75)]


def test_record_without_a_file_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = Record(None)
    record.rewind(0, 0)
    record.write("epoch", {"epoch": 0})
    monkeypatch.setattr("common.run.metrics.is_main", lambda: False)
    Record(tmp_path / "log.jsonl").write("epoch", {"epoch": 0})
    assert list(tmp_path.iterdir()) == []


def test_a_published_file_is_made_anew_of_all_rows(tmp_path: Path) -> None:
    def epochs(rows: list[dict[str, Any]]) -> str:
        return "".join(f"{row['epoch']}\n" for row in rows if row["event"] == "epoch")

    for _ in range(2):  # a resumed run does the last epoch again
        record = Record(tmp_path / "log.jsonl", published=("epochs.txt", epochs))
        record.rewind(1, 5)
        record.write("start", {})
        record.write("epoch", {"epoch": 0 if not (tmp_path / "epochs.txt").exists() else 1, "step": 5})
    assert (tmp_path / "epochs.txt").read_text() == "0\n1\n"
    record.write("step", {"epoch": 2, "step": 6})
    assert (tmp_path / "epochs.txt").read_text() == "0\n1\n"


def test_tensorboard_on_request(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = Record(None, tensorboard=tmp_path)
    record.write("start", {"arguments": {"lr": 1}})
    record.write("epoch", {"epoch": 0, "step": 5, "train_loss": 1.5})
    record.write("epoch", {"epoch": 1, "step": 10, "train_loss": 0.5})
    record.write("structure", {"step": 10, "kept": [[3, 2], [1]], "note": "text"})
    record.close()
    reader = EventAccumulator(str(tmp_path)).Reload()
    lists = ["structure/kept/0/0", "structure/kept/0/1", "structure/kept/1/0"]
    assert reader.Tags()["scalars"] == ["epoch/train_loss", *lists]
    assert reader.Scalars("structure/kept/0/1")[0].value == 2
    assert [(event.step, event.value) for event in reader.Scalars("epoch/train_loss")] == [(5, 1.5), (10, 0.5)]


def test_missing_tensorboard_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install 'leanvit"):
        Record(None, tensorboard=tmp_path)
