"""Reference vectors: deterministic weights and inputs by name, comparison, and the runner of a folder of cases.

A vector stores outputs alone. Weights and inputs depend only on a name, a shape and a seed, so whoever checks one fills
their own model in the same way. A folder holds ``cases.json`` (a list of cases, or an object whose ``cases`` is one)
and ``cases.npz`` (key ``<case>/<output>``). Each paper has a runner, ``python -m <paper>.tests.cases DIR``, which gives
``main`` a function that finds the code for a case.

The formats of the five sets differ a little: ``Case.raw`` is the case as written.
"""

import argparse
import ast
import fnmatch
import json
import math
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEFAULT_TOLERANCE = 1e-9  # relative to the largest magnitude of an output
_EXACT_KINDS = "iub"


class CaseError(Exception):
    """A folder or a case that cannot be used as written; the message names it."""


class NotCovered(Exception):
    """No code is meant to run this case yet; the message says what is missing."""


# Deterministic numbers


def array(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Standard normal float64 numbers that depend on name, shape and seed only (NumPy's frozen legacy stream)."""
    return np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) % 2**32).standard_normal(tuple(shape))


def weight(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Value of the state-dict entry ``name``, scaled so that attention is far from uniform and an error shows.

    ``running_var`` 1 + |n| / 10; position embeddings and tokens n / 2; matrices and kernels n / sqrt(fan in);
    one-dimensional ``weight`` or ``gamma`` 1 + n / 10; everything else n / 10.
    """
    n = array(name, shape, seed)
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        return 1 + np.abs(n) / 10
    if "pos_embed" in name or leaf.endswith("token"):
        return n / 2
    if len(shape) >= 2:
        return n / math.sqrt(math.prod(shape[1:]))
    return 1 + n / 10 if leaf in ("weight", "gamma") else n / 10


@torch.no_grad()
def fill_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Overwrite every floating-point entry of ``module.state_dict()`` in place; returns the module."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(np.asarray(weight(name, tensor.shape, seed))))
    return module


def image(batch: int, size: int | Sequence[int], seed: int = 0, channels: int = 3) -> Tensor:
    """Input images, float64, (batch, channels, height, width); ``size`` is the side, or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    name = f"image-{height}" if height == width else f"image-{height}x{width}"
    return torch.from_numpy(array(name, (batch, channels, height, width), seed))


def build(make: Callable[..., nn.Module], seed: int, *, dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    """``make(**kwargs)`` filled with ``seed``, in evaluation mode; the initialisation it would do is skipped.

    Only for modules whose state dict holds all their tensors.
    """
    with torch.device("meta"):
        module = make(**kwargs)
    module = module.to(dtype).to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.zero_()
    return fill_(module, seed).eval()


# Inputs as text

_NUMPY_NAMES = (
    "abs",
    "arange",
    "array",
    "clip",
    "floor",
    "inf",
    "int32",
    "int64",
    "ones",
    "sqrt",
    "stack",
    "tile",
    "zeros",
)
_METHODS = frozenset({"array", "image", "astype", "shape", "float", "double", "long", "T", "sum", "mean", "reshape"})
_SYNTAX = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Constant,
    ast.Tuple, ast.List, ast.Subscript, ast.Slice, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip


def input_names(seed: int, *, tensors: bool = False) -> dict[str, Any]:
    """What the text of an input may name: ``fill``, ``seed``, and a few functions of NumPy.

    Args:
        seed: of the case; the seed of an ``array`` or ``image`` that states none.
        tensors: let ``fill.array`` give tensors instead of NumPy arrays.
    """

    def seeded_array(name: str, shape: Sequence[int], seed: int = seed) -> Any:
        numbers = array(name, shape, seed)
        return torch.from_numpy(np.asarray(numbers)) if tensors else numbers

    def seeded_image(batch: int, size: int | Sequence[int], seed: int = seed, channels: int = 3) -> Tensor:
        return image(batch, size, seed, channels)

    numpy = SimpleNamespace(**{name: getattr(np, name) for name in _NUMPY_NAMES})
    return {
        "fill": SimpleNamespace(array=seeded_array, image=seeded_image),
        "array": seeded_array,
        "image": seeded_image,
        "seed": seed,
        "np": numpy,
        "abs": abs,
        "sqrt": math.sqrt,
        "clip": np.clip,
        "int": np.int64,
        "int64": np.int64,
        "float32": np.float32,
        "zeros": lambda *shape: torch.zeros(*shape, dtype=torch.float64),
        "sum": lambda value: value.sum(),
        "mean": lambda value: value.mean(),
    }


def evaluate_text(text: str, names: Mapping[str, Any]) -> Any:
    """Value of an arithmetic expression over ``names``: calls of these and of a few methods, nothing else.

    Raises:
        CaseError: if the text is no such expression.
    """
    tree = _parse(text, names)
    if tree is None:
        raise CaseError(f"cannot read the expression {text!r}")
    return eval(compile(tree, "<input of a case>", "eval"), {"__builtins__": {}}, dict(names))  # checked by _parse


def leading_expression(text: str, names: Mapping[str, Any]) -> str:
    """The longest beginning of ``text`` that ``evaluate_text`` can read; prose may follow it.

    Raises:
        CaseError: if there is none.
    """
    for end in range(len(text), 0, -1):
        if not text[end - 1].isspace() and _parse(text[:end], names) is not None:
            return text[:end].strip()
    raise CaseError(f"no expression at the beginning of {text!r}")


def find_expression(text: str, names: Mapping[str, Any], after: str = "") -> str:
    """The expression in a text: the one behind ``after``, or the first that draws numbers, with a factor before it.

    Raises:
        CaseError: if there is none.
    """
    if after:
        found = re.search(rf"(?<![\w.]){re.escape(after)}\s*=\s*", text)
        if not found:
            raise CaseError(f"{text!r} does not say what {after} is")
        return leading_expression(text[found.end() :], names)
    found = re.search(r"(?:-?[\d.]+(?:e-?\d+)?\s*\*\s*)?(?:fill\.(?:array|image)|array|image|zeros)\(", text)
    if not found:
        raise CaseError(f"{text!r} draws no numbers")
    return leading_expression(text[found.start() :], names)


def _parse(text: str, names: Mapping[str, Any]) -> ast.Expression | None:
    """Syntax tree of an allowed expression, or None."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return None
    if isinstance(tree.body, ast.Tuple):
        return None
    for node in ast.walk(tree):
        allowed = isinstance(node, _SYNTAX)
        if isinstance(node, ast.Name):
            allowed = node.id in names
        elif isinstance(node, ast.Attribute):
            in_numpy = isinstance(node.value, ast.Name) and node.value.id == "np"
            allowed = node.attr in (_NUMPY_NAMES if in_numpy else _METHODS)
        elif isinstance(node, ast.Call):
            allowed = isinstance(node.func, (ast.Name, ast.Attribute))
        elif isinstance(node, ast.Constant):
            allowed = isinstance(node.value, (int, float, str, bool, type(None)))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            allowed = isinstance(node.right, ast.Constant) and abs(_number(node.right.value)) <= 64
        if not allowed:
            return None
    return tree


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.inf


# Cases and their comparison


@dataclass(frozen=True)
class Case:
    """One case of a folder.

    Attributes:
        build: what is built, in the published names.
        text: how its input is made, if that is a text.
        outputs: names of the arrays to compare, without the case's own name.
        values: plain numbers and texts to compare.
        raw: the case as written.
    """

    name: str
    seed: int
    build: Mapping[str, Any]
    text: str
    outputs: tuple[str, ...]
    values: Any
    raw: Mapping[str, Any]

    @property
    def tolerance(self) -> float:
        """Relative tolerance: the first number that the case states, or the default."""
        stated = self.raw.get("tolerance", DEFAULT_TOLERANCE)
        if isinstance(stated, (int, float)):
            return float(stated)
        found = re.search(r"\d+(?:\.\d+)?(?:e-?\d+)?", str(stated))
        return float(found.group()) if found and "exact" not in str(stated)[:5] else DEFAULT_TOLERANCE

    def names(self, **more: Any) -> dict[str, Any]:
        """Names for the texts of this case."""
        return input_names(self.seed) | more

    def read(self, after: str = "", **more: Any) -> Any:
        """Value of an expression in ``text``; see ``find_expression``."""
        names = self.names(**more)
        return evaluate_text(find_expression(self.text, names, after), names)

    def read_loss(self, **results: Tensor) -> Tensor:
        """The scalar that ``text`` says is differentiated, from what the model returned."""
        names = input_names(self.seed, tensors=True) | results
        return evaluate_text(find_expression(self.text, names, "loss"), names)


@dataclass
class Checks:
    """Compares what a runner computed with what a case stores, and remembers the worst."""

    case: Case
    stored: Mapping[str, np.ndarray]
    largest: float = 0.0
    failures: list[str] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)

    def output(self, name: str, value: Any, *, tolerance: float | None = None, absolute: bool = False) -> None:
        """Compare with the array ``<case>/<name>``.

        Args:
            name: of the output.
            value: tensor, array or number.
            tolerance: instead of the case's; integers and booleans must be equal whatever it is.
            absolute: the tolerance is not relative to the largest magnitude.
        """
        self.compared.add(name)
        key = f"{self.case.name}/{name}"
        if key not in self.stored:
            self.fail(f"cases.npz has no array {key}")
            return
        got = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        self.close(name, got, self.stored[key], tolerance=tolerance, absolute=absolute)

    def close(
        self, name: str, got: np.ndarray, want: np.ndarray, *, tolerance: float | None = None, absolute: bool = False
    ) -> None:
        """Compare two arrays; shapes must agree."""
        if got.shape != want.shape:
            self.fail(f"{name} has shape {list(got.shape)}, expected {list(want.shape)}")
            return
        exact = want.dtype.kind in _EXACT_KINDS
        error = relative_error(got, want, absolute=absolute or exact)
        self.largest = max(self.largest, error)
        limit = 0 if exact and tolerance is None else self.case.tolerance if tolerance is None else tolerance
        if not error <= limit:
            self.fail(f"{name} differs by {error:.2e}, allowed is {limit:.0e}")

    def number(self, name: str, got: float, want: float, *, tolerance: float | None = None) -> None:
        """Compare two numbers, relative to the expected one."""
        self.close(name, np.asarray(float(got)), np.asarray(float(want)), tolerance=tolerance)

    def equal(self, name: str, got: Any, want: Any) -> None:
        """Compare plain values exactly."""
        if got != want:
            self.fail(f"{name} is {got!r}, expected {want!r}")

    def fail(self, reason: str) -> None:
        """Remember a difference."""
        self.failures.append(reason)


def relative_error(got: np.ndarray, want: np.ndarray, *, absolute: bool = False) -> float:
    """Largest difference, relative to the largest magnitude expected; infinite where only one is a finite number."""
    if want.size == 0:
        return 0.0
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    odd = ~np.isfinite(want)
    if not np.array_equal(got[odd], want[odd], equal_nan=True) or not np.isfinite(got[~odd]).all():
        return math.inf
    if odd.all():
        return 0.0
    scale = 1.0 if absolute else np.abs(want[~odd]).max() or 1.0
    return float(np.abs(got[~odd] - want[~odd]).max() / scale)


# Running a folder

Runner = Callable[[Case, Checks], None]


@dataclass(frozen=True)
class Result:
    """Outcome of one case: its largest relative error, and why it failed or was not run."""

    name: str
    status: str  # pass, FAIL or not covered
    error: float | None = None
    reason: str = ""
    seconds: float = 0.0

    def line(self, width: int) -> str:
        """The printed line."""
        error = " " * 8 if self.error is None else f"{self.error:8.1e}"
        return f"{self.name:{width}}  {error}  {self.status}" + (f": {self.reason}" if self.reason else "")


def read_cases(folder: str | Path) -> tuple[list[Case], Mapping[str, np.ndarray]]:
    """Cases of a folder and the arrays they store.

    Raises:
        CaseError: if the folder, one of its two files, or a case is missing something.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CaseError(f"{folder} is not a folder; expected one with cases.json and cases.npz")
    for name in ("cases.json", "cases.npz"):
        if not (folder / name).is_file():
            raise CaseError(f"{folder} has no {name}; a folder of reference vectors holds cases.json and cases.npz")
    try:
        content = json.loads((folder / "cases.json").read_text())
    except ValueError as error:
        raise CaseError(f"{folder / 'cases.json'} is not valid JSON: {error}") from error
    entries = content.get("cases") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
        raise CaseError(f"{folder / 'cases.json'} holds no list of cases with a name")
    try:
        with np.load(folder / "cases.npz", allow_pickle=False) as archive:
            stored = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CaseError(f"{folder / 'cases.npz'} cannot be read, it may be truncated: {error}") from error
    return [_make_case(entry) for entry in entries], stored


def _make_case(entry: Mapping[str, Any]) -> Case:
    name, outputs = str(entry["name"]), entry.get("outputs") or ()
    text, made, seed = entry.get("input"), entry.get("build"), entry.get("seed")
    return Case(
        name=name,
        seed=seed if isinstance(seed, int) else 0,
        build=made if isinstance(made, dict) else {},
        text=text if isinstance(text, str) else "",
        outputs=tuple(str(output).removeprefix(f"{name}/") for output in outputs),
        values=entry.get("values", {}),
        raw=entry,
    )


def run_cases(
    cases: Sequence[Case], stored: Mapping[str, np.ndarray], find_runner: Callable[[Case], Runner]
) -> Iterator[Result]:
    """Run cases one by one. Whatever goes wrong inside one is its failure; an output nobody compared is one, too."""
    for case in cases:
        checks, start = Checks(case, stored), time.perf_counter()
        try:
            find_runner(case)(case, checks)
        except NotCovered as missing:
            yield Result(case.name, "not covered", reason=str(missing))
            continue
        except Exception as error:
            checks.fail(f"{type(error).__name__}: {error}")
        else:
            for output in case.outputs:
                if output not in checks.compared:
                    checks.fail(f"output {output} was not compared")
        status = "FAIL" if checks.failures else "pass"
        seconds = time.perf_counter() - start
        yield Result(case.name, status, checks.largest, "; ".join(checks.failures), seconds)


def main(
    find_runner: Callable[[Case], Runner],
    argv: Sequence[str] | None = None,
    *,
    program: str,
    more_cases: Callable[[Path], Sequence[Case]] = lambda folder: (),
) -> int:
    """Command line of a paper's runner: a line per case and a summary.

    Args:
        find_runner: gives the function that runs a case, or raises ``NotCovered``.
        argv: command line.
        program: how the command is called, for its help.
        more_cases: makes cases of further files of the folder; ``CaseError`` if one cannot be used.

    Returns:
        Exit status: 0, 1 if a case failed or is not covered, 2 if the folder cannot be used.
    """
    parser = argparse.ArgumentParser(prog=program, description="Run every reference vector of a folder.")
    parser.add_argument("folder", metavar="DIR", help="folder with cases.json and cases.npz")
    parser.add_argument(
        "--only", metavar="PATTERN", default="*", help="cases to run, such as 'cluster*' (default: all)"
    )
    args = parser.parse_args(argv)
    try:
        cases, stored = read_cases(args.folder)
        cases += more_cases(Path(args.folder))
    except CaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cases = [case for case in cases if fnmatch.fnmatch(case.name, args.only)]
    if not cases:
        print(f"error: {args.folder} has no case named {args.only}", file=sys.stderr)
        return 2
    width = max(len(case.name) for case in cases)
    count: dict[str, int] = {"pass": 0, "FAIL": 0, "not covered": 0}
    for result in run_cases(cases, stored, find_runner):
        count[result.status] += 1
        print(result.line(width), flush=True)
    print(f"{count['pass']} passed, {count['FAIL']} failed, {count['not covered']} not covered, of {len(cases)} cases")
    return int(count["pass"] < len(cases))
