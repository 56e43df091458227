"""``--amp``: autocast, the loss scaler, and leaving autocast where float32 is needed."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from common.run.errors import UsageError
from common.run.flags import AMP_BY_DEVICE, AMP_MODES


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of ``--amp``; None for full precision. ``on`` and ``auto`` mean what suits the device.

    Raises:
        UsageError: an unknown name, or one this device cannot do, naming what it can.
    """
    if amp in AMP_BY_DEVICE:
        amp = "fp16" if device.type == "cuda" else {"on": "bf16", "auto": "none"}[amp]
    if amp not in AMP_MODES:
        raise UsageError(f"--amp must be one of {', '.join(AMP_MODES)}, got {amp!r}")
    if amp == "none":
        return None
    if amp == "fp16":
        if device.type != "cuda":
            raise UsageError(f"--amp fp16 needs a CUDA device, this is {device.type}; use --amp bf16 or none")
        return torch.float16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError("--amp bf16 is not supported by this GPU; use --amp fp16 or none")
    return torch.bfloat16


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """Autocast of ``--amp``, doing nothing for ``none``."""
    dtype = amp_dtype(amp, device)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Operations in here run in the dtype of their tensors, on the device of ``tensor``; the meta device has none.

    An exported program has no such region where autocast is off: torch cannot save all of them.
    """
    device = tensor.device.type
    if tensor.is_meta or (torch.compiler.is_exporting() and not torch.is_autocast_enabled(device)):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def make_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaler: active for fp16 only, whose gradients would underflow."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype(amp, device) is torch.float16)
