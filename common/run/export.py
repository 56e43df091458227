"""A network as ONNX or as a program of torch.export, for any number of images: written, read back and compared.

Nothing stays on the disk that computes something else than the network. The network itself is as usable afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.run.errors import ExportError
from common.run.files import make_folder, write_atomic
from common.run.program import get_logger

logger = get_logger(__name__)

TOLERANCE = 1e-4
"""Largest difference of an output from the network's, relative to the output's largest value (float32)."""
ONE_FILE = 1 << 31
"""Bytes that an ONNX file may hold; weights of larger networks lie beside it, in FILE.data."""


def difference(run: Callable[[Tensor], Any], images: Tensor, expected: Any, what: str | os.PathLike[str]) -> float:
    """How far ``run`` is from what it should give for one image and for all of them.

    Args:
        run: images to a tensor, or several in any structure.
        images: (B, C, H, W).
        expected: of all images, in the same order.
        what: in the message.

    Returns:
        Largest difference, relative to the largest value of the output.

    Raises:
        ExportError: above ``TOLERANCE``.
    """
    found = 0.0
    if not any(of_all.any() for of_all in tree_leaves(expected)):
        logger.warning("%s: all outputs are zero (a head that is not trained?), so comparing them says nothing", what)
    for count in sorted({1, len(images)}):
        with torch.no_grad():
            outputs = [one for one in tree_leaves(run(images[:count])) if isinstance(one, Tensor)]
        for output, of_all in zip(outputs, tree_leaves(expected), strict=True):
            error = float(((output - of_all[:count]).abs().max() / of_all.abs().max().clamp_min(1e-12)).detach())
            if not error <= TOLERANCE:
                raise ExportError(f"{what} gives other outputs than the network: off by {error:.1e} of the largest")
            found = max(found, error)
    return found


def export_program(model: nn.Module, images: Tensor, path: str | os.PathLike[str], *, expected: Any = None) -> float:
    """Write ``path`` for ``torch.export.load``, whole or not at all.

    Args:
        model: in evaluation mode; it takes images as its first argument.
        images: at least 2, (B, C, H, W), of which 2 are the example.
        path: of the file, by habit ``.pt2``.
        expected: outputs for the images; default: the model's own.

    Returns:
        The largest difference of the file's outputs, see ``difference``.

    Raises:
        ExportError: if torch cannot export the network, or the file computes something else.
    """
    path = Path(path)
    expected = _expected(model, images, expected)
    with _temporary(path) as temporary:
        with _said_by("torch.export", path):
            program = torch.export.export(model, (images[:2],), dynamic_shapes=_any_batch(model))
            content = io.BytesIO()  # torch's writer of files ends the process where the disk is full
            torch.export.save(program, content)
        write_atomic(temporary, content.getvalue())
        return difference(torch.export.load(temporary).module(), images, expected, path)


def export_onnx(
    model: nn.Module,
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = ("logits",),
    expected: Any = None,
) -> float:
    """Write ``path`` as ONNX with the input ``images``, whole or not at all, and run it under onnxruntime on the CPU.

    Args:
        model, images, path, expected: as for ``export_program``, on the CPU in float32.
        outputs: names.

    Returns:
        The largest difference of the file's outputs, see ``difference``.

    Raises:
        ExportError: if packages of the extra ``export`` are missing, torch cannot export the network, or the file
            computes something else.
    """
    path = Path(path)
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{path}: ONNX needs {', '.join(missing)}: pip install 'leanvit[export]', or leave it out")
    import onnxruntime  # only where it is asked for

    expected = _expected(model, images, expected)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    with _temporary(path) as temporary:
        with _said_by("torch.onnx.export", path):
            program = torch.onnx.export(
                model, (images[:2],), dynamo=True, dynamic_shapes=_any_batch(model), input_names=["images"],
                output_names=list(outputs), verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(temporary, external_data=size > 0.9 * ONE_FILE)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(temporary, options, providers=["CPUExecutionProvider"])

        def run(given: Tensor) -> list[Tensor]:
            return [torch.as_tensor(one) for one in session.run(None, {"images": given.numpy()})]

        return difference(run, images, expected, path)


def _expected(model: nn.Module, images: Tensor, expected: Any) -> Any:
    if model.training:
        raise ExportError("the network is in training mode: call eval() first")
    with torch.no_grad():
        return model(images) if expected is None else expected


def _any_batch(model: nn.Module) -> dict[str, Any]:
    """The images, by the name of the model's first argument, may be any number."""
    return {next(iter(inspect.signature(model.forward).parameters)): {0: torch.export.Dim("batch", min=1)}}


@contextlib.contextmanager
def _said_by(who: str, path: Path) -> Generator[None]:
    """The exporters raise of many kinds, and warn about themselves."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            reason = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
            raise ExportError(f"{path}: {who} cannot write this network: {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def _temporary(path: Path) -> Generator[Path]:
    """A place for a file, and those that lie beside it, that take their place at the end if all is well."""
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), reverse=True):  # FILE.data before FILE
            os.replace(file, path.with_name(file.name))
