"""Costs of one network of the registry, and the published rows that command-line words stand for."""

import argparse
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from common.ledger.tables import Row, load_tables
from common.measure.flops import Counted, count_operations, count_parameters, gmacs
from hourglass_swag.models import create
from hourglass_swag.models.ops.cluster import TokenClusteringBlock
from hourglass_swag.models.ops.projections import set_generator
from hourglass_swag.tools.parser import check_method_flags, get_model_args, parse_network


@dataclass(frozen=True)
class Costs:
    """What a forward pass of one image costs."""

    gflops: float
    """G under the convention ``swag``, which the papers call GFLOPs"""
    gmacs: float
    """plain multiply-accumulates, G"""
    params_m: float
    """parameters, M"""
    clustering_percent: float | None
    """multiply-accumulates of the clustering step in percent of all; None without one"""
    counted_for: str | None = None
    """what the cost was counted for, where it depends on weights and image; None elsewhere"""


def build_network(args: argparse.Namespace, *, pretrained: bool = False, weights: str | None = None) -> nn.Module:
    """The network of parsed flags, in evaluation mode on torch's default device.

    Raises:
        As ``hourglass_swag.models.create``; ValueError for a flag of another method.
    """
    check_method_flags(args)
    model = create(
        args.model, pretrained=pretrained, weights=weights, image_size=args.resolution, **get_model_args(args)
    )
    return model.eval()


def depends_on_data(model: nn.Module) -> bool:
    """Whether a network's cost depends on weights and images."""
    return getattr(model, "depends_on_data", False)


def noise_image(resolution: int) -> torch.Tensor:
    """The image that such a cost is counted on, (1, 3, S, S): uniform noise, as published, but always the same."""
    return torch.rand(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))


def count(model: nn.Module, images: torch.Tensor) -> Counted:
    """Operations for a batch (B, 3, S, S), with the same random projections at every call.

    Where the cost depends on weights and images, it is that of these, and a batch costs what its image with most tokens
    or clusters costs, in every layer; elsewhere only the shape of the images matters, and nothing is computed.
    """
    if not depends_on_data(model):
        return count_operations(model, images.to("meta"))
    cores = [module for module in model.modules() if hasattr(module, "generator")]
    before = [core.generator for core in cores]
    try:
        set_generator(model, torch.Generator(images.device).manual_seed(0))
        return count_operations(model, images)
    finally:
        for core, own in zip(cores, before, strict=True):
            core.generator = own


def count_costs(args: argparse.Namespace, *, pretrained: bool = False, weights: str | None = None) -> Costs:
    """Costs of the network of parsed flags, from one pass on the meta device: no weights, nothing computed.

    Only where they depend on weights and image, a pass is computed on the CPU.

    Args:
        args: of ``parse_network``.
        pretrained, weights: see ``hourglass_swag.models.create``; read only in that case.

    Raises:
        As ``hourglass_swag.models.create``.
    """
    with torch.device("meta"):
        model = build_network(args)
        images = torch.empty(1, 3, args.resolution, args.resolution)
    params_m = count_parameters(model) / 1e6
    source = None
    if depends_on_data(model):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # random weights, if any, are always the same
            model, images = build_network(args, pretrained=pretrained, weights=weights), noise_image(args.resolution)
        of = weights or ("the published weights" if pretrained else "random weights (--weights FILE, --pretrained)")
        source = f"one image of uniform noise and {of}"
    counted = count(model, images)
    macs, share = gmacs(counted.executed), None
    if (clustering := clustering_layer(model)) is not None:
        width, side = (int(getattr(model, name)) for name in ("hidden_dim", "grid_size"))
        tokens = torch.empty(1, width, side, side, device="meta")
        share = 100 * gmacs(count_operations(clustering, tokens, None, False).executed) / macs
    return Costs(gmacs(counted.published, "swag"), macs, params_m, share, source)


def clustering_layer(model: nn.Module) -> TokenClusteringBlock | None:
    """The token clustering step of a Hourglass network that clusters at all."""
    return next((module for module in model.modules() if isinstance(module, TokenClusteringBlock)), None)


@cache
def _published() -> list[tuple[tuple[object, ...], Row]]:
    rows = [row for table in load_tables("hourglass_swag") for row in table.rows if row.arguments]
    return [(_settings(parse_network(row.arguments)), row) for row in rows]


def _settings(args: argparse.Namespace) -> tuple[object, ...]:
    return args.model, args.resolution, sorted((key, str(value)) for key, value in get_model_args(args).items())


def published_row(args: argparse.Namespace, column: str) -> Row | None:
    """The row with these settings that publishes a value in ``column``; None if there is none."""
    wanted = _settings(args)
    return next((row for settings, row in _published() if settings == wanted and column in row.published), None)
