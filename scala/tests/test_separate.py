"""Separate training: every command of separate.sh, and one of them end to end."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.ledger.tables import load_tables
from common.run.files import ROOT
from scala import arguments, loading, main_scala


def commands(*words: str) -> list[list[str]]:
    """Words of main_scala.py in the commands that the script would run."""
    script = subprocess.run(
        ["bash", "scala/separate.sh", "DIR", *words], cwd=ROOT, env=os.environ | {"DRY": "1"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return [shlex.split(line)[1:] for line in script.stdout.splitlines()]


def test_every_row_of_separate_training_has_its_command() -> None:
    rows = {
        row.id: row
        for table in load_tables("scala")
        if table.name in ("scala_s", "scala_b")
        for row in table.rows
        if row.series == "separate training"
    }
    trained: dict[str, Any] = {}
    for words in commands():
        args = main_scala.parse_args(words)
        trained[Path(args.output_dir).name] = args
    assert set(trained) == set(rows)
    for name, args in trained.items():
        expected = main_scala.parse_args(shlex.split(rows[name].arguments))
        grids = [loading.resolve_grid(arguments.given(given), {}, "") for given in (args, expected)]
        assert (args.model, grids[0].largest) == (expected.model, expected.eval_ratio[0])
        assert grids[1].largest == grids[0].largest
        assert args.full_warm_epoch == args.epochs == (100 if name[0] == "s" else 300)
        assert args.distillation_type == "none"
        assert not args.repeated_aug


def test_sizes_ratios_and_flags_choose_the_runs() -> None:
    assert len(commands("s")) == 4
    (words,) = commands("b", "0.75", "--epochs", "3")
    assert main_scala.parse_args(words).epochs == 3
    with pytest.raises(subprocess.CalledProcessError) as error:
        commands("s", "0.3")
    assert "the rows are 0.25, 0.50, 0.75 and 1.0, got 0.3" in error.value.stderr


def test_a_width_without_a_registered_model_trains_alone(imagenet: Path, tmp_path: Path) -> None:
    (words,) = commands("s", "0.75")
    tiny = ["--data-path", str(imagenet), "--output_dir", str(tmp_path), "--epochs", "1", "--full_warm_epoch", "1"]
    tiny += ["--embed-dim", "32", "--num-heads", "4", "--depth", "1", "--input-size", "32", "--patch-size", "8"]
    tiny += ["--batch-size", "8", "--workers", "0", "--device", "cpu", "--num-classes", "2", "--warmup-epochs", "0"]
    result = main_scala.main([*words, *tiny])
    assert [row["ratio"] for row in result["widths"]] == [0.75]
    again = ["--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--eval_ratio", "0.75"]
    assert main_scala.main([*words, *tiny, *again])["widths"] == result["widths"]
