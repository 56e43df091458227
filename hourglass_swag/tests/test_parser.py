"""Command-line flags: every published one, its default and help, and what reaches the network."""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hourglass_swag import predict
from hourglass_swag.imagenet_1k_eval import parse_args
from hourglass_swag.models.ops.tome.tome.ops import FORMS
from hourglass_swag.tools import parser
from hourglass_swag.tools.parser import (
    boolean,
    check_method_flags,
    get_default_parser,
    get_model_args,
    positionals_first,
)


@pytest.mark.parametrize(
    ("word", "value"), [("True", True), ("False", False), ("0", False), ("yes", True), ("", False)]
)
def test_booleans_mean_what_they_say(word, value):
    assert boolean(word) is value
    args = get_default_parser().parse_args(["d", "-m", "act_vit_l16_in1k", "--act_group_q", word])
    assert get_model_args(args)["act_group_q"] is value


def test_other_words_are_no_booleans(capsys):
    with pytest.raises(SystemExit):
        get_default_parser().parse_args(["d", "--act_group_k", "maybe"])
    assert "expected True or False, got 'maybe'" in capsys.readouterr().err


def test_every_flag_has_a_help_text(capsys):
    actions = get_default_parser()._actions
    assert [action.dest for action in actions if not action.help] == []
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "index of the layer before which tokens are clustered; -1: nowhere (default: -1)" in text


def test_each_method_gets_its_own_arguments():
    parser = get_default_parser()
    expected = {
        "vit_b16_in1k": 0,
        "hourglass_vit_h14_in1k": 5,
        "hourglass_vit_desk": 5,
        "tome_vit_l16_in1k": 1,
        "e_vit_l16_in1k": 3,
        "act_vit_l16_in1k": 6,
        "smyrf_vit_l16_in1k": 5,
        "ats_vit_l16_in1k": 3,
        "evo_vit_l16_in1k": 2,
        "regnety_16gf_in1k": 0,
    }
    for name, number in expected.items():
        assert len(get_model_args(parser.parse_args(["d", "-m", name]))) == number, name


def test_flags_of_another_method_are_refused():
    def parse(*words: str) -> argparse.Namespace:
        return get_default_parser().parse_args(["d", "-m", *words])

    check_method_flags(parse("e_vit_l16_in1k", "--base_keep_rate", "0.5", "--evit_score", "cls"))
    check_method_flags(parse("tome_vit_l16_in1k", "--tome_r", "8", "-r", "512"))
    with pytest.raises(
        ValueError, match=r"^--tome_r 8, --drop_loc \[1\]: a flag of another method; vit_l16_in1k takes no"
    ):
        check_method_flags(parse("vit_l16_in1k", "--tome_r", "8", "--drop_loc", "1"))
    with pytest.raises(
        ValueError, match=r"--num_cluster 9: .* ats_vit_l16_in1k takes --ats_blocks_indexes, --ats_drop_"
    ):
        check_method_flags(parse("ats_vit_l16_in1k", "-n", "9"))


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["hourglass_vit_l16_in1k", "-n", "529"], "--clustering_location"),
        (["tome_vit_l16_in1k"], "--tome_r"),
        (["ats_vit_l16_in1k"], "--ats_blocks_indexes"),
    ],
)
def test_flags_that_leave_a_method_idle_are_warned_of(words: list[str], flag: str) -> None:
    with pytest.warns(UserWarning, match=f"{words[0]} without {flag}: .* this is the dense network"):
        check_method_flags(get_default_parser().parse_args(["DIR", "-m", *words]))


def test_the_papers_own_forms_of_methods_reach_the_network():
    parser = get_default_parser()
    evit = parser.parse_args(["d", "-m", "e_vit_l16_in1k", "--evit_score", "cls"])
    assert get_model_args(evit)["score"] == "cls"
    ats = parser.parse_args(["d", "-m", "ats_vit_l16_in1k", "--ats_residual", "input"])
    assert get_model_args(ats)["residual"] == "input"


def test_positionals_behind_lists_of_layers():
    words = ["--layers", "1", "2", "a.png", "b.png", "-m", "x", "--drop_loc", "3", "-1", "7.png"]
    assert positionals_first(words) == [
        "a.png",
        "b.png",
        "7.png",
        "--layers",
        "1",
        "2",
        "-m",
        "x",
        "--drop_loc",
        "3",
        "-1",
    ]
    assert positionals_first(["-l", "3", "a", "--layers", "1", "--", "b"])[-1] == "b"
    assert parse_args(["-m", "e_vit_l16_in1k", "--drop_loc", "6", "12", "DIR"]).data == "DIR"
    assert predict.parse_args(["-m", "e_vit_l16_in1k", "--drop_loc", "6", "a.png"]).images == ["a.png"]


def test_unknown_names_and_missing_data_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse_args(["DIR", "-m", "vit_b16"])
    assert "'hourglass_vit_l16_in1k'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["-m", "vit_l16_in1k"])
    assert "DIR is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["DIR", "-b", "0"])
    assert "--batch-size must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["DIR", "--limit", "-1"])
    assert "--limit must be at least 1, got -1" in capsys.readouterr().err
    assert parse_args(["--dataset", "digits"]).data is None
    assert parse_args(["--dataset", "fashion_tune"]).data is None


def test_every_flag_is_read_somewhere():
    """Flags of the network's methods are read by name; all others as an attribute of ``args``."""
    folder = Path(__file__).parent.parent
    read = {
        node.attr
        for path in (folder / "imagenet_1k_eval.py", folder / "tools" / "processes.py", folder / "tools" / "parser.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    flags = vars(parse_args(["DIR"]))
    for name in ("hourglass_vit", "tome", "e_vit", "act", "smyrf", "ats", "evo"):
        method = argparse.Namespace(**(flags | {"model": name}))
        read |= {flag for flag in flags if any(flags[flag] is value for value in get_model_args(method).values())}
        read |= {
            flag
            for flag in flags
            if flag.startswith((name, "ats_", "evo_", "evit_", "scatter")) or flag in get_model_args(method)
        }
    assert set(flags) - read == set()


def test_the_forms_of_merging_are_those_of_the_package():
    assert tuple(FORMS) == parser.FORMS


@pytest.mark.parametrize("script", ["imagenet_1k_eval", "get_flops_fps", "predict", "visualize", "train"])
def test_help_imports_nothing_heavy(script):
    command = [sys.executable, "-X", "importtime", str(Path(__file__).parents[1] / f"{script}.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "torchvision", "timm", "numpy", "PIL"}
