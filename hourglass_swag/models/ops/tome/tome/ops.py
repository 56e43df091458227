"""The forms that merging can take, and the fused operator: where its library is, how it is loaded, what it computes.

The operator ``tome::merge_wavg`` averages merged tokens in one pass: it reads each token once and writes each row once,
where the plain form gathers, scatters, and divides. It comes from ``csrc``, compiled for the CPU and, with nvcc, for
CUDA. Nothing needs it: without it the plain PyTorch form runs, and a line says so once.
"""

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

FORMS = {
    "auto": "the fused operator where it was built, the plain PyTorch form elsewhere",
    "native": "plain PyTorch",
    "fused": "the fused operator for weighted averages; an error where it was not built",
    "torch_scatter": "the package torch-scatter, which the published code uses; an error where it is not installed",
}
"""Values of ``scatter``: how merged tokens are reduced into the rows they join. All give the same result."""

_SOURCE = Path(__file__).resolve().parent.parent
BUILD = f"pip install --no-build-isolation -e {_SOURCE if (_SOURCE / 'setup.py').exists() else 'FOLDER_OF_SETUP_PY'}"

_log = logging.getLogger(__name__)
_devices: frozenset[str] | None = None  # kinds of device the operator was built for; None: not looked for yet
_said = False


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Type in which sizes and sums are kept: float32 for half precision, otherwise the type itself."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def check_form(scatter: str) -> str:
    """The form itself, if it can be used here.

    Raises:
        ValueError: for a name that is not in ``FORMS``.
        ImportError: if it needs something that is not installed or not built.
    """
    if scatter not in FORMS:
        raise ValueError(f"scatter must be one of {', '.join(FORMS)}, got {scatter!r}")
    devices = load()
    if scatter == "fused" and not devices:
        raise ImportError(f"scatter = 'fused', but the operators of tome are not built; build them with: {BUILD}")
    if scatter == "torch_scatter":
        torch_scatter()
    return scatter


def torch_scatter() -> ModuleType:
    """The package torch-scatter.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module("torch_scatter")
    except ImportError as error:
        raise ImportError(
            f"scatter = 'torch_scatter', but torch-scatter cannot be imported ({error}); install it with "
            "pip install --no-build-isolation torch-scatter, or leave the choice to 'auto'"
        ) from error


def choose(scatter: str, x: Tensor, *, fusible: bool) -> str:
    """The form to use for ``x``: "native", "fused" or "torch_scatter".

    Args:
        scatter: a key of ``FORMS``.
        x: tokens.
        fusible: whether the operator computes what is wanted.

    Raises:
        ValueError, ImportError: see ``check_form``.
        RuntimeError: if the operator was asked for and not built for this device.
    """
    if scatter == "torch_scatter" or not fusible:
        return "torch_scatter" if scatter == "torch_scatter" else "native"
    if scatter not in FORMS:
        raise ValueError(f"scatter must be one of {', '.join(FORMS)}, got {scatter!r}")
    kind = x.device.type
    if scatter == "native" or kind == "meta":
        return "native"
    built = _devices if _devices is not None or torch.compiler.is_compiling() else load()
    if built is not None and kind in built:
        return "fused"
    if scatter == "fused":
        where = ", ".join(sorted(built)) if built else "no device"
        raise RuntimeError(f"scatter = 'fused', but the operator is built for {where}, not for {kind}; build: {BUILD}")
    if not torch.compiler.is_compiling():
        _say_once(kind)
    return "native"


def _say_once(kind: str) -> None:
    """Tell that the plain form runs."""
    global _said
    if not _said:
        _said = True
        _log.warning("tome: the fused merge is not built for %s, plain PyTorch runs instead; to build: %s", kind, BUILD)


def find_libraries() -> Iterator[Path]:
    """Compiled libraries beside this file, then in a package ``tome`` that was installed by itself."""
    folders = [Path(__file__).parent]
    if spec := importlib.util.find_spec("tome"):
        folders += [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        yield from sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))


def is_loaded() -> bool:
    """Whether this process knows the operator."""
    return hasattr(torch.ops.tome, "merge_wavg")


def load(libraries: Iterator[Path] | None = None) -> frozenset[str]:
    """Load the operator, the first time this is called, and return the kinds of device that it was built for.

    A library that cannot be loaded (built for another torch, say) is named in a warning.

    Args:
        libraries: files to try; None for ``find_libraries``.
    """
    global _devices
    if _devices is None:
        if not is_loaded():  # this file may be imported under two names
            for path in find_libraries() if libraries is None else libraries:
                try:
                    torch.ops.load_library(path)
                except OSError as error:
                    _log.warning("tome: %s cannot be loaded (%s); to build it again: %s", path, error, BUILD)
                else:
                    _register()
                    break
        _devices = frozenset(torch.ops.tome.devices().split()) if is_loaded() else frozenset()
    return _devices


def merge_wavg(x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted average of merged tokens by the fused operator; ``size`` gets no gradient.

    Args:
        x: tokens, (B, N, C).
        size: weight of each token, (B, N, 1); None for one each.
        keep, source, into: see ``merge.Matching``.

    Returns:
        Rows (B, U, C) of the type of ``x`` and their sizes (B, U, 1).
    """
    if size is not None:
        size = size.to(accumulation_type(x.dtype)).contiguous()
    return torch.ops.tome.merge_wavg(x.contiguous(), size, keep.contiguous(), source.contiguous(), into.contiguous())


def _register() -> None:
    """Give the operator a shape function, so that it traces and compiles, and a gradient."""

    @torch.library.register_fake("tome::merge_wavg")
    def _(x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.new_empty(keep.shape[0], keep.shape[1], x.shape[2])
        return rows, x.new_empty(keep.shape[0], keep.shape[1], 1, dtype=accumulation_type(x.dtype))

    torch.library.register_autograd("tome::merge_wavg", _backward, setup_context=_save)


def _save(ctx, inputs, output) -> None:
    x, size, keep, source, into = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(size, keep, source, into, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, gradient: Tensor, _) -> tuple[Tensor, None, None, None, None]:
    """Gradient of x: that of the row which a token joined, times the token's share in it."""
    size, keep, source, into, total = ctx.saved_tensors
    batch, width = keep.shape[0], gradient.shape[2]
    position = torch.cat([keep, source], dim=1)  # (B, U + r)
    row = torch.cat([torch.arange(keep.shape[1], device=keep.device).expand_as(keep), into], dim=1)
    share = 1 / total.squeeze(2).gather(1, row)
    if size is not None:
        share = share * size.squeeze(2).gather(1, position)
    # Positions that are in neither (behind the last whole group of a k-th matching) have no share.
    shares = share.new_zeros(batch, ctx.num_tokens).scatter(1, position, share)
    rows = row.new_zeros(batch, ctx.num_tokens).scatter(1, position, row)
    joined = gradient.gather(1, rows[..., None].expand(-1, -1, width))
    return (joined * shares[..., None]).to(gradient.dtype), None, None, None, None
