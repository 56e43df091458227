"""Make a network merge tokens, in place: ``tome.patch.timm(model)``, ``tome.patch.swag(model)``; then ``model.r = 8``.

Both are one function, ``hourglass_swag.models.tome_vit.patch``: it recognises the network, and the names stay.
"""

from typing import Any

from torch import nn


def timm(model: nn.Module, trace_source: bool = False, prop_attn: bool = True, *, scatter: str = "auto") -> Any:
    """See ``hourglass_swag.models.tome_vit.patch``.

    Raises:
        ImportError: if the package ``leanvit``, which knows the networks, is not installed.
    """
    try:
        from hourglass_swag.models.tome_vit import patch
    except ImportError as error:
        raise ImportError(
            f"tome.patch needs the package leanvit, which knows the networks: pip install it first ({error})"
        ) from error
    return patch(model, trace_source, prop_attn, scatter=scatter)


swag = timm
