"""Cascades small enough for tests, with weights that make their exits disagree."""

from typing import Any

import torch
from torch import Tensor, nn

from common.tests.reference import fill_
from dvt.models.cascade import Cascade, make_cascade
from dvt.models.deit import VisionTransformer
from dvt.models.reuse import resize_side
from dvt.models.t2t_vit import T2T_ViT

T2T_GRIDS = [{"tokens_type": f"performer{suffix}"} for suffix in ("_less_less_token", "_less_token", "")]
SMALL_GRIDS = [{"patch_size": patch} for patch in (6, 4, 3)]
"""4x4, 6x6 and 8x8 tokens of images of 24 pixels."""


def small_cascade(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Cascade:
    """Three DeiT stages on images of 24 pixels."""
    settings = {"img_size": 24, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 10, **options}
    return filled(make_cascade(VisionTransformer, SMALL_GRIDS, **settings), seed, dtype)


def t2t_cascade(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Cascade:
    """Three T2T-ViT stages at the published grids and 224 pixels."""
    settings = {"embed_dim": 16, "depth": 1, "num_heads": 2, "token_dim": 8, "num_classes": 10, **options}
    return filled(make_cascade(T2T_ViT, T2T_GRIDS, **settings), seed, dtype)


def filled(cascade: Cascade, seed: int, dtype: torch.dtype) -> Cascade:
    """Deterministic weights, in evaluation mode."""
    network: nn.Module = fill_(cascade.to(dtype), seed)
    assert isinstance(network, Cascade)
    return network.eval()


def resize_grid(maps: Tensor, target: int | tuple[int, int]) -> Tensor:
    """Resize maps (..., rows, columns) as a stage does: up-sampled by two, then pooled, as ``A X B^T``."""
    sides = zip(maps.shape[-2:], (target, target) if isinstance(target, int) else target, strict=True)
    rows, columns = (resize_side(*pair).to(maps) for pair in sides)
    return rows @ maps @ columns.T
