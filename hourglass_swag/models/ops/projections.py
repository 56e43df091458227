"""Random projections of the hashing methods, the same numbers from the same seed in eager and in compiled models."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def set_generator(model: nn.Module, generator: torch.Generator | None) -> None:
    """Draw the random projections of all layers of ``model`` from ``generator``; None: torch's default one."""
    for module in model.modules():
        if hasattr(module, "generator"):
            vars(module)["generator"] = generator


def draw_projections(
    alpha_shape: Sequence[int], beta_shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Standard normal numbers, then uniform ones in [0, 1), both float32.

    A compiler would draw from a stream of its own; behind an operator it leaves torch's generator alone.

    Args:
        alpha_shape, beta_shape: of the two.
        device: to draw on.
        generator: None for torch's default one.
    """
    if generator is None and torch.compiler.is_compiling():
        return _draw(list(alpha_shape), list(beta_shape), device)
    return (
        torch.empty(alpha_shape, device=device, dtype=torch.float32).normal_(generator=generator),
        torch.empty(beta_shape, device=device, dtype=torch.float32).uniform_(generator=generator),
    )


@torch.library.custom_op("leanvit_projections::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw(alpha_shape: Sequence[int], beta_shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    return draw_projections(alpha_shape, beta_shape, device, None)


@_draw.register_fake
def _(alpha_shape: Sequence[int], beta_shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(alpha_shape, device=device), torch.empty(beta_shape, device=device)
