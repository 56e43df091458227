"""The counting tool against values that the published tool printed under torch 1.10.1, and the analytic counts."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.measure.flops import CONVENTIONS, count_operations
from hourglass_swag.models.ops.cluster import TokenClusteringBlock
from hourglass_swag.models.vision_transformer import VisionTransformer, make_vit
from hourglass_swag.tests.counting import networks
from hourglass_swag.tools import flop_count as tool
from hourglass_swag.tools import jit_handles
from hourglass_swag.tools.flop_count import flop_count

SMALL: dict[str, Any] = {
    "image_size": 48,
    "patch_size": 8,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 32,
    "mlp_dim": 64,
    "num_classes": 10,
}
HOURGLASS = networks("HourglassViT", "hourglass_vit")
CLUSTERED = SMALL | {"cluster_after_output": False, "clustering_location": 2, "num_cluster": 9}

PUBLISHED_TOOL = {
    "vit": (VisionTransformer, SMALL, 2_014_701),
    "vit_gap": (VisionTransformer, SMALL | {"classifier": "gap"}, 1_954_141),
    "hourglass": (HOURGLASS["HourglassViT"], CLUSTERED, 1_445_578),
    "hourglass_1_iteration": (HOURGLASS["HourglassViT"], CLUSTERED | {"cluster_iters": 1}, 1_342_762),
}
"""Total operations of one image. The published tool counts arithmetic on shapes too: tens of operations."""

HANDLES: list[tuple[str, list[list[int]], list[list[int]], dict[str, str], dict[str, int]]] = [
    ("addmm_flop_jit", [[5], [3, 4], [4, 5]], [], {}, {"addmm": 60}),
    ("bmm_flop_jit", [[2, 3, 4], [2, 4, 5]], [], {}, {"bmm": 120}),
    ("basic_binary_op_flop_jit", [[2, 3, 4], [4]], [], {"name": "x"}, {"x": 24}),
    ("basic_binary_op_flop_jit", [[1, 3, 1], [2, 1, 4]], [], {"name": "x"}, {"x": 24}),
    ("rsqrt_flop_jit", [[2, 3]], [], {}, {"rsqrt": 12}),
    ("dropout_flop_jit", [[2, 3]], [], {}, {"dropout": 6}),
    ("softmax_flop_jit", [[2, 3, 4]], [], {}, {"softmax": 120}),
    ("matmul_flop_jit", [[2, 3, 4], [2, 4, 5]], [], {}, {"matmul": 120}),
    ("batchnorm_flop_jit", [[2, 3, 4]], [], {}, {"batchnorm": 96}),
    ("linear_flop_jit", [[2, 3, 4], [5, 4], [5]], [], {}, {"linear": 150}),
    ("linear_flop_jit", [[2, 3, 4], [5, 4], []], [], {}, {"linear": 120}),
    ("matmul_flop_jit", [[2, 3, 4], [4]], [], {}, {"matmul": 24}),
    ("conv_flop_jit", [[1, 4, 8, 8], [6, 2, 3, 3], [6]], [[1, 6, 8, 8]], {}, {"conv": 384 * 18}),
    ("einsum_flop_jit", [[2, 8, 5], [2, 8, 3]], [[2, 5, 3]], {"equation": "bcn,bck->bnk"}, {"einsum": 240}),
    ("einsum_flop_jit", [[2, 8, 5]], [[5, 8, 2]], {"equation": "bcn->ncb"}, {"einsum": 0}),
]


@pytest.mark.parametrize(("handle", "inputs", "outputs", "kwargs", "count"), HANDLES)
def test_handles(handle: str, inputs: list, outputs: list, kwargs: dict, count: dict) -> None:
    assert dict(getattr(jit_handles, handle)(inputs, outputs, **kwargs)) == count


def test_handles_refuse_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="cannot be multiplied"):
        jit_handles.bmm_flop_jit([[2, 3, 4], [2, 5, 4]])
    with pytest.raises(ValueError, match="expects 5"):
        jit_handles.linear_flop_jit([[3, 4], [6, 5]])
    with pytest.raises(ValueError, match="cannot count"):
        jit_handles.einsum_flop_jit([[2, 3], [3, 4]], equation="ij,jkl->ik")


def count(model: nn.Module, size: int = 48, device: str = "meta") -> dict[str, float]:
    return flop_count(model.eval().to(device), (torch.rand(1, 3, size, size, device=device),))


def build(kind: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return kind(**options).eval()


@pytest.mark.parametrize("name", PUBLISHED_TOOL)
def test_small_models_agree_with_the_published_tool(name: str) -> None:
    kind, options, total = PUBLISHED_TOOL[name]
    model = build(kind, options)
    assert 1e9 * sum(count(model).values()) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED_TOOL)
def test_keys_and_kinds_are_the_same_number(name: str) -> None:
    kind, options, _ = PUBLISHED_TOOL[name]
    model = build(kind, options)
    counted = count_operations(model, torch.rand(1, 3, 48, 48, device="meta"))
    assert round(1e9 * sum(count(model).values())) == CONVENTIONS["swag"].total(counted.published)
    assert counted.executed.macs == counted.published.macs, "the clustering's products are those published"


def test_every_key_of_a_dense_model() -> None:
    """Per key as the published tool printed, except for its 19 operations on shapes."""
    per_key = {key: round(1e9 * value) for key, value in count(VisionTransformer(**SMALL), device="cpu").items()}
    assert per_key == {
        "conv": 221_184,
        "aten::add": 10_656,
        "dropout": 20_128,
        "batchnorm": 42_624,
        "linear": 1_245_898,
        "bmm": 350_464,
        "softmax": 109_520,
        "aten::div": 4_736,
        "aten::gelu": 9_472,
    }


@pytest.mark.parametrize(
    ("kind", "options", "printed"),
    [
        (partial(make_vit, "l16"), {}, "364.77"),
        (
            HOURGLASS["HourglassViTL16"],
            {"clustering_location": 8, "num_cluster": 256, "cluster_after_output": False},
            "178.96",
        ),
    ],
)
def test_published_sizes(kind: type[nn.Module], options: dict[str, Any], printed: str) -> None:
    model = build(kind, {"image_size": 512, "num_classes": 1000, **options})
    assert f"{sum(count(model, 512).values()):.5g}" == printed


def test_plain_and_fused_attention_count_alike() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.bmm((torch.bmm(q / 2, k.transpose(1, 2))).softmax(-1), v)

    class Fused(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    shapes = [(6, 9, 4), (6, 7, 4), (6, 7, 4)]
    inputs = tuple(torch.rand(shape) for shape in shapes)
    assert flop_count(Plain(), inputs) == flop_count(Fused(), inputs)


def test_a_whitelist_limits_and_must_be_a_subset() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU())
    assert flop_count(model, (torch.rand(3, 4),), whitelist=["aten::gelu"]) == {"aten::gelu": 15e-9}
    with pytest.raises(ValueError, match=r"must be a subset of the supported operations; .'aten::fft'. are not"):
        flop_count(model, (torch.rand(3, 4),), whitelist=["aten::fft"])


def test_customized_rules_for_operations_and_layers() -> None:
    def double(inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> dict[str, int]:
        return {"twice": 2 * inputs[0][0]}

    def whole(layer: nn.Module, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> dict[str, int]:
        return {type(layer).__name__: outputs[0][-1]}

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    counted = flop_count(model, (torch.rand(3, 4),), customized_ops={"aten::tanh": double, nn.Linear: whole})
    assert counted == {"Linear": 5e-9, "twice": 6e-9}


def test_the_clustering_layer_counts_as_published_whatever_it_executes() -> None:
    layer = TokenClusteringBlock(4, n_iters=2)
    counted = flop_count(layer, (torch.rand(3, 8, 6, 6),))
    tokens, clusters, width = 36, 4, 8
    pairs = clusters * tokens
    iteration = width * (tokens + clusters) + 3 * pairs + 2 * pairs * width + 2 * pairs + 5 * pairs + clusters * width
    assert round(1e9 * sum(counted.values())) == 3 * (2 * iteration + 3 * pairs)


def test_wrappers_are_looked_through_and_the_mode_stays() -> None:
    model = nn.Linear(4, 5).train()
    expected = {"linear": 75e-9}
    assert flop_count(nn.DataParallel(model), (torch.rand(3, 4),)) == expected
    assert flop_count(torch.compile(model), (torch.rand(3, 4),)) == expected  # pyright: ignore[reportArgumentType]
    assert model.training


def test_uncounted_operations_are_named_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "_reported", set())
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Unflatten(1, (2, 2)))
    with caplog.at_level(logging.WARNING):
        flop_count(model, (torch.rand(3, 4),))
        flop_count(model, (torch.rand(3, 4),))
    assert caplog.messages == ["operations that the convention does not count: aten::tanh"]
