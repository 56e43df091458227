"""Deterministic numbers, the reader of inputs written as text, and the comparison."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from common.tests.reference import (
    Case,
    CaseError,
    Checks,
    array,
    build,
    evaluate_text,
    fill_,
    find_expression,
    image,
    input_names,
    read_cases,
    relative_error,
    weight,
)


def make_case(text: str = "", **raw) -> Case:
    return Case("case", 3, {}, text, (), {}, raw)


def test_numbers_are_those_of_the_stored_vectors():
    """Values that the tool which made the vectors printed."""
    assert array("image-8", (3,), 5).tolist() == [0.15969003356078865, 0.5725961429329696, 2.204733591263589]
    assert weight("a.running_var", (2,), 1).tolist() == [1.05945925011749, 1.0637832966947494]
    assert weight("encoder.pos_embedding", (2, 1, 1), 1).ravel().tolist() == [-0.3022098421075313, 1.5224038861275677]
    assert weight("q.weight", (2,), 3).tolist() == [1.069763564167497, 0.8913949136166678]
    assert weight("q.weight", (1, 4), 3)[0, :2].tolist() == [0.34881782083748514, -0.543025431916661]
    assert weight("q.bias", (1,), 3).tolist() == [0.14292148562747303]
    assert image(2, 8, 5).dtype == torch.float64
    assert image(2, 8, 5)[0, 0, 0, 0] == array("image-8", (2, 3, 8, 8), 5)[0, 0, 0, 0]


def test_modules_are_filled_by_name_and_built_without_initialisation():
    model = fill_(nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).double(), 2)
    assert torch.equal(model.state_dict()["0.weight"], torch.from_numpy(weight("0.weight", (4, 3, 2, 2), 2)))
    assert model.state_dict()["1.num_batches_tracked"] == 0
    built = build(nn.BatchNorm2d, 2, num_features=4)
    assert not built.training
    assert built.state_dict()["num_batches_tracked"] == 0
    assert torch.equal(built.state_dict()["running_var"], torch.from_numpy(weight("running_var", (4,), 2)))


@pytest.mark.parametrize(
    ("text", "after", "expression"),
    [
        ("fill.image(batch=2, size=32, seed=1)", "", "fill.image(batch=2, size=32, seed=1)"),
        ("fill.image(1, 48, seed).float(), model filled with seed", "", "fill.image(1, 48, seed).float()"),
        ("0.5 * fill.array('f', (2, 8), seed)  (batch, channels)", "", "0.5 * fill.array('f', (2, 8), seed)"),
        ("zeros(17, 2, 32)", "", "zeros(17, 2, 32)"),
        ("x = array('x',(2,3)); y = 2*array('y',(1,))", "y", "2*array('y',(1,))"),
        (
            "n = (abs(array('i', (2,3))) * 9).astype(int64) % 5; all",
            "n",
            "(abs(array('i', (2,3))) * 9).astype(int64) % 5",
        ),
    ],
)
def test_expressions_are_found_among_prose(text, after, expression):
    names = input_names(3)
    assert find_expression(text, names, after) == expression
    evaluate_text(expression, names)


def test_expressions_mean_what_they_say():
    names = input_names(3)
    assert np.array_equal(evaluate_text("2 * array('x', (4,))", names), 2 * array("x", (4,), 3))
    assert np.array_equal(evaluate_text("fill.array('x', (4,), seed=5)", names), array("x", (4,), 5))
    assert evaluate_text("np.floor(array('h',(3,10)))", names).shape == (3, 10)
    case = make_case("fill.image(1, 4, 3), loss = sum(logits * fill.array('probe', logits.shape, seed))")
    logits = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    case.read_loss(logits=logits).backward()
    assert np.array_equal(logits.grad, array("probe", (2, 3), 3))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "fill.__class__",
        "np.load('x')",
        "(lambda: 1)()",
        "open('x')",
        "[i for i in (1,)]",
        "9**9**9",
        "seed if seed else 1",
        "",
    ],
)
def test_nothing_else_is_run(text):
    with pytest.raises(CaseError):
        evaluate_text(text, input_names(0))


def test_relative_error():
    want = np.array([1.0, -4.0])
    assert relative_error(want + 0.4, want) == pytest.approx(0.1)
    assert relative_error(want + 0.4, want, absolute=True) == pytest.approx(0.4)
    assert relative_error(np.array([np.nan, 1]), np.array([1.0, 1])) == np.inf
    assert relative_error(np.array([np.inf, 1]), np.array([np.inf, 1])) == 0
    assert relative_error(np.array([-np.inf, 1]), np.array([np.inf, 1])) == np.inf
    assert relative_error(np.array([1e-3]), np.array([0.0])) == 1e-3
    assert relative_error(np.zeros((0, 2)), np.zeros((0, 2))) == 0


def test_tolerances_as_cases_write_them():
    assert make_case().tolerance == 1e-9
    assert make_case(tolerance=1e-5).tolerance == 1e-5
    assert make_case(tolerance="1e-6 (sampling points are float32); indices exact").tolerance == 1e-6
    assert make_case(tolerance="total within 1e-3 relative").tolerance == 1e-3
    assert make_case(tolerance="exact (uint8; 1 level allowed)").tolerance == 1e-9


def test_checks_find_every_kind_of_difference():
    stored = {"case/a": np.array([1.0, 2.0]), "case/i": np.array([1, 2]), "case/f": np.array([1, 2], dtype=np.float32)}
    checks = Checks(make_case(), stored)
    checks.output("a", torch.tensor([1.0, 2.0 + 1e-12], dtype=torch.float64))
    checks.output("i", torch.tensor([1, 2]))
    assert checks.failures == []
    checks.output("a", torch.tensor([1.0, 2.1]))
    checks.output("a", torch.ones(3))
    checks.output("i", torch.tensor([1, 3]))
    checks.output("b", torch.ones(1))
    checks.equal("text", "x", "y")
    checks.number("total", 1.1, 1.0, tolerance=0.01)
    assert len(checks.failures) == 6
    assert checks.compared == {"a", "i", "b"}


def test_cases_of_every_set_are_read(tmp_path):
    """What the five sets write differently: the outer object, outputs as names, no seed, a description as build."""
    entries = [
        {"name": "a", "seed": None, "build": "a text", "input": {"x": "array('x', (2,))"}, "outputs": ["a/y"]},
        {"name": "b", "outputs": {"z": {"key": "b/z", "stride": 2}}},
    ]
    np.savez(tmp_path / "cases.npz", **{"a/y": np.ones(2)})
    for content in (entries, {"format": "1", "cases": entries}):
        (tmp_path / "cases.json").write_text(json.dumps(content))
        (first, second), stored = read_cases(tmp_path)
        assert (first.seed, first.build, first.text, first.outputs) == (0, {}, "", ("y",))
        assert (second.outputs, second.values, second.raw["outputs"]["z"]["stride"]) == (("z",), {}, 2)
        assert stored["a/y"].tolist() == [1, 1]


def test_a_truncated_archive_is_named(tmp_path):
    (tmp_path / "cases.json").write_text("[]")
    np.savez(tmp_path / "cases.npz", a=np.arange(1000.0))
    whole = (tmp_path / "cases.npz").read_bytes()
    (tmp_path / "cases.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CaseError, match=r"cases\.npz cannot be read, it may be truncated"):
        read_cases(tmp_path)
