"""A lean network as ONNX or as a program of torch.export, for any number of images, read back and compared.

    export_onnx(fast, "fast.onnx")
    export_torch(fast, "features.pt2", features=True)

ACT and SMYRF draw random projections in every pass; a file has those of one draw. What a file cannot say is refused:
numbers of tokens that depend on the images (ATS, unless it has ``drop=False``), and in ONNX the shifts of bits of ACT.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.hosts.network import Lean
from common.measure.flops import evaluating
from common.run.errors import ExportError, UsageError
from common.run.export import export_onnx as write_onnx
from common.run.export import export_program as write_program


class Features(nn.Module):
    """A lean network whose output is ``features``."""

    def __init__(self, fast: Any) -> None:
        super().__init__()
        self.fast = fast

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, rows, columns) of images (B, 3, H, W)."""
        return self.fast.features(images)


def export_onnx(fast: Any, path: str | os.PathLike[str], *, features: bool = False) -> float:
    """Write a lean network as ONNX: input ``images``, of the network's own size, any number of them; float32.

    Args:
        fast: what ``lean`` gave. It is as usable afterwards.
        path: of the file; weights of more than 2 GB lie beside it, in FILE.data.
        features: what ``fast.features`` gives in place of what the network returns.

    Returns:
        Largest difference of an output under onnxruntime, relative to its largest value.

    Raises:
        UsageError: if this is no lean network.
        ExportError: naming the method that cannot be written, what torch cannot export, packages that are missing, or
            by how much the file computes something else.
    """
    model, images = _prepare(fast, features)
    for method in fast.methods:
        if what := method.hinders_onnx:
            raise ExportError(f"{path}: {method.name} needs {what}, which torch cannot write as ONNX: use torch.export")
    with _at_rest(model), torch.no_grad():
        output = model(images[:1])
        names = list(output) if hasattr(output, "keys") else ["features" if features else "logits"]
        return write_onnx(model, images, path, outputs=names)


def export_torch(fast: Any, path: str | os.PathLike[str], *, features: bool = False) -> float:
    """Write a lean network for ``torch.export.load``; arguments, result and errors as ``export_onnx``."""
    model, images = _prepare(fast, features)
    with _at_rest(model):
        return write_program(model, images, path)


def _prepare(fast: Any, features: bool) -> tuple[nn.Module, Tensor]:
    """What is exported, and images for it and for the check."""
    if not isinstance(fast, Lean):
        raise UsageError(f"expected a network of leanvit.lean, got a {type(fast).__name__}")
    for method in fast.methods:
        if why := method.hinders_export:
            raise ExportError(f"{method.name} cannot be exported: {why}")
        if why := method.hinders_any_batch:
            raise ExportError(f"{method.name} with {why}")
    facts, net = fast.plan.host.facts, cast(Any, fast)
    if any(tensor.is_floating_point() and (tensor.dtype, tensor.device.type) != (torch.float32, "cpu")
           for tensor in net.state_dict().values()):  # fmt: skip
        net = copy.deepcopy(net).float().cpu()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, facts.channels, *facts.image_size, generator=generator)
    return (Features(net) if features else net), images


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Generator[None]:
    """In evaluation mode, and every module that draws random projections draws once."""
    drawing = [module for module in model.modules() if hasattr(module, "draw")]
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in drawing:
            vars(module)["draw"] = _once(cast(Any, module).draw)
        try:
            yield
        finally:
            for module in drawing:
                del vars(module)["draw"]


def _once(draw: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    drawn: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def again(*args: Any) -> tuple[Tensor, Tensor]:
        if args not in drawn:
            drawn[args] = draw(*args)
        return drawn[args]

    return again
