"""The forms that merging can take, and those that need something: kernels for NVIDIA GPUs, the package torch-scatter.

Plain PyTorch takes some fifty small operations for a layer's matching and merging, which on a GPU cost more time than
the layer. The kernels are three: proposals, choice, average. They are for passes without gradients.
"""

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FORMS = {
    "auto": "the kernels on an NVIDIA GPU, plain PyTorch elsewhere and for gradients",
    "native": "plain PyTorch",
    "fused": "the kernels; an error where they cannot run",
    "torch_scatter": "the package torch-scatter, which the published code uses; an error where it is not installed",
}
"""Values of ``scatter``: how tokens are matched and merged into the rows they join. All give the same result."""

HAS_KERNELS = torch.version.cuda is not None and find_spec("triton") is not None
MAX_TOKENS = 8192
"""The choice holds all proposals of an image at once."""


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Type in which sizes and sums are kept: float32 for half precision, otherwise the type itself."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def check_form(scatter: str) -> str:
    """The form itself, if it can be used here.

    Raises:
        ValueError: for a name that is not in ``FORMS``.
        ImportError: if it needs something that is not here.
    """
    if scatter not in FORMS:
        raise ValueError(f"scatter must be one of {', '.join(FORMS)}, got {scatter!r}")
    if scatter == "fused" and not (HAS_KERNELS and torch.cuda.is_available()):
        raise ImportError("scatter = 'fused' needs an NVIDIA GPU and the package triton; 'auto' goes without")
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


def fuses(scatter: str, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors (B, N, C).

    Args:
        scatter: a key of ``FORMS``.

    Raises:
        ValueError: for another form.
        RuntimeError: if the kernels were asked for and do not.
    """
    if scatter not in FORMS:
        raise ValueError(f"scatter must be one of {', '.join(FORMS)}, got {scatter!r}")
    if scatter in ("native", "torch_scatter"):
        return False
    given = [x for x in tensors if x is not None]
    fits = all(
        x.is_cuda and x.dtype != torch.float64 and x.shape[1] <= MAX_TOKENS and x.shape[2] <= MAX_TOKENS for x in given
    )
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    serves = HAS_KERNELS and fits and not gradient
    if scatter == "fused" and not serves:
        where = ", ".join(f"{x.dtype} on {x.device}" for x in given)
        raise RuntimeError(
            f"scatter = 'fused' needs half or single precision, an NVIDIA GPU and no gradients, got {where}"
        )
    return serves


@torch.library.custom_op("tome::match", mutates_args=())
def match(metric: Tensor, r: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching.

    Args:
        metric: what is compared, (B, N, c).
        r: tokens merged away, at least 1.
        rows, columns: a-tokens and b-tokens at the beginning that merge with none.

    Returns:
        ``keep`` (B, N - r), ``source`` and ``into`` (B, r) of ``merge.Matching``.
    """
    from . import kernels

    batch, tokens, channels = metric.shape
    num_a, num_b = (tokens + 1) // 2, tokens // 2
    best = metric.new_empty(batch, num_a, dtype=torch.float32)
    partner = metric.new_empty(batch, num_a, dtype=torch.int64)
    keep, source, into = _empty_match(metric, r)
    propose: Any = kernels.propose
    accept: Any = kernels.accept
    width = max(_power(channels), 16)
    # Two stages: of float32 and 80 channels they take 80 KB, and a small GPU has 99.
    propose[-(-num_a // 32), batch](
        metric,
        best,
        partner,
        tokens,
        *metric.stride(),
        rows,
        columns,
        channels=channels,
        WIDTH=width,
        TILE=32,
        STEP=64,
        num_stages=2,
    )
    width = max(_power(num_a), 16)
    accept[batch,](
        best, partner, keep, source, into, num_a, num_b, r,
        ORDERED=rows > 0, WIDTH=width, STEP=max(8192 // width, 1), num_warps=16 if width > 256 else 4,
    )  # fmt: skip
    return keep, source, into


@match.register_fake
def _empty_match(metric: Tensor, r: int, rows: int = 0, columns: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = metric.shape[:2]
    shapes = ((batch, tokens - r), (batch, r), (batch, r))
    keep, source, into = (metric.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return keep, source, into


@torch.library.custom_op("tome::merge_wavg", mutates_args=())
def merge_wavg(x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted average of merged tokens.

    Args:
        x: tokens, (B, N, C).
        size: weight of each token, (B, N, 1); None for one each.
        keep, source, into: see ``merge.Matching``.

    Returns:
        Rows (B, U, C) of the type of ``x`` and their sizes (B, U, 1), float32.
    """
    from . import kernels

    batch, tokens, channels = x.shape
    out, total = _empty_rows(x, size, keep, source, into)
    rows, r = keep.shape[1], source.shape[1]
    weights = x.new_ones(batch, tokens, dtype=torch.float32) if size is None else size.float()
    average: Any = kernels.average
    average[rows, batch](
        x.contiguous(), weights.contiguous(), keep.contiguous(), source.contiguous(), into.contiguous(),
        out, total, tokens, rows, r, channels, MERGED=max(_power(r), 16), WIDTH=max(_power(channels), 16),
    )  # fmt: skip
    return out, total


@merge_wavg.register_fake
def _empty_rows(x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*keep.shape, x.shape[2])
    return x.new_empty(shape), x.new_empty(*keep.shape, 1, dtype=torch.float32)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << max(number - 1, 0).bit_length()
