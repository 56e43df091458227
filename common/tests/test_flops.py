"""Costs: the analytic layer counts, the conventions, and the independent count of executed operations."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.measure import flops
from common.measure.flops import (
    CONVENTIONS,
    KINDS,
    OpCounts,
    count_operations,
    count_parameters,
    gmacs,
)


class Function(nn.Module):
    """A module from a function, so that single operations can be counted."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def executed(function: Callable[..., Tensor], *shapes: tuple[int, ...], device: str = "meta") -> int:
    return count_operations(Function(function), *(torch.rand(shape, device=device) for shape in shapes)).executed.macs


def test_op_counts_add_and_repeat() -> None:
    one = OpCounts(linear=3, add=1)
    assert one + one == OpCounts(linear=6, add=2)
    assert one * 5 == 5 * one == OpCounts(linear=15, add=5)
    assert isinstance(one + one, OpCounts)
    assert isinstance(one * 2, OpCounts)
    assert one == OpCounts(linear=3, add=1), "the operands stay as they were"
    assert (OpCounts(conv=2, matmul=3, head=4) + one).macs == 12


def test_conventions_weigh_each_kind_as_the_papers_do() -> None:
    ones = OpCounts(dict.fromkeys(KINDS, 1))
    assert CONVENTIONS["macs"].total(ones) == 4
    assert CONVENTIONS["uvc"].total(ones) == 3
    assert CONVENTIONS["fvcore"].total(ones) == 4 + 5 + 2 + 1 + 1
    assert CONVENTIONS["swag"].total(ones) == 4 + 2 + 4 + 4 + 5 + 2 + 10
    assert CONVENTIONS["swag"].by_kind(OpCounts(softmax=2, tanh=7)) == {"softmax": 10}
    assert gmacs(OpCounts(linear=5, linear_bias=7) * 10**9, "swag") == 12.0
    assert gmacs(OpCounts(linear=5, linear_bias=7) * 10**9) == 5.0


class Deviating(nn.Linear):
    """A layer whose published count is twice what runs, and a softmax that does not run."""

    def published_ops(self, inside: OpCounts, args: Sequence[Any], result: Tensor) -> OpCounts:
        return 2 * inside + OpCounts(softmax=result.numel() + args[0].numel())


def test_a_module_may_say_what_its_paper_counts() -> None:
    """Plain multiply-accumulates are those executed here; a published total holds those of the published code."""
    model = nn.Sequential(nn.Linear(4, 5), Deviating(5, 6), nn.GELU())
    counted = count_operations(model, torch.rand(3, 4))
    assert counted.executed == OpCounts(linear=3 * 20 + 3 * 30, linear_bias=15 + 18, gelu=18)
    assert counted.published == OpCounts(linear=60 + 180, linear_bias=15 + 36, gelu=18, softmax=18 + 15)
    counted = count_operations(model, torch.rand(3, 4), published={model[1]: lambda *_: {"head": 7}})
    assert counted.published == OpCounts(linear=60, linear_bias=15, head=7, gelu=18)
    model[0] = nn.Sequential(model[0], Deviating(5, 5))
    outer = count_operations(model, torch.rand(3, 4), published={model[0]: lambda inside, *_: inside})
    assert outer.published["linear"] == 60 + 2 * 75 + 180, "rules nest"


def test_meta_inputs_need_no_weights_to_be_there() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    counted = count_operations(model.train(), torch.empty(1, 3, 8, 8, device="meta"))
    assert counted == count_operations(model, torch.rand(1, 3, 8, 8))
    assert counted.executed == OpCounts(conv=144 * 27, conv_bias=144, batch_norm=144, pool=144, linear=8, linear_bias=2)
    assert weights == [parameter.data_ptr() for parameter in model.parameters()]
    assert model.training
    assert not model[1].num_batches_tracked


def test_arithmetic_on_indices_costs_nothing() -> None:
    counted = count_operations(Function(lambda x: x[:, torch.arange(3) + 1] + 1), torch.rand(2, 5))
    assert counted.executed == OpCounts(add=6)


def test_an_unknown_kind_or_convention_is_an_error() -> None:
    with pytest.raises(ValueError, match="lineer"):
        CONVENTIONS["macs"].total(OpCounts(lineer=1))
    with pytest.raises(ValueError, match="unknown counting convention 'gflops'"):
        gmacs(OpCounts(), "gflops")
    with pytest.raises(ValueError, match="sofmax"):
        flops.Convention("mine", "wrong", {"sofmax": 1})


def linear(rows: int, inputs: int, outputs: int) -> OpCounts:
    return OpCounts(linear=rows * inputs * outputs, linear_bias=rows * outputs)


def test_dense_vit_matches_the_published_closed_form() -> None:
    """ViT-L/16 at 512 layer by layer: 364.77 G, as the official tool printed."""
    width, mlp, heads, tokens, layers = 1024, 4096, 16, 1025, 24
    elements = tokens * width
    block = linear(tokens, width, 3 * width) + linear(tokens, width, width)
    block += OpCounts(matmul=2 * tokens * elements, softmax=heads * tokens * tokens, div=elements)
    block += linear(tokens, width, mlp) + linear(tokens, mlp, width)
    block += OpCounts(layer_norm=2 * elements, dropout=2 * elements + tokens * mlp, gelu=tokens * mlp, add=2 * elements)
    stem = OpCounts(conv=32 * 32 * width * 3 * 16 * 16, conv_bias=32 * 32 * width, add=elements, dropout=elements)
    total = stem + layers * block + OpCounts(layer_norm=elements) + linear(1, width, 1000)
    assert f"{gmacs(total, 'swag'):.5g}" == "364.77"


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (lambda x, w, b: F.linear(x, w, b), [(2, 3, 4), (5, 4), (5,)], 2 * 3 * 4 * 5),
        (lambda x, w: F.linear(x, w), [(2, 3, 4), (5, 4)], 2 * 3 * 4 * 5),
        (lambda a, b: a @ b, [(2, 7, 3, 4), (2, 7, 4, 5)], 2 * 7 * 3 * 4 * 5),
        (lambda a, b: a @ b, [(2, 3, 4), (4,)], 2 * 3 * 4),
        (lambda a, b: a @ b, [(6,), (6,)], 6),
        (lambda c, a, b: torch.addmm(c, a, b), [(5,), (3, 4), (4, 5)], 60),
        (lambda c, a, b: torch.baddbmm(c, a, b), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (lambda c, a, b: torch.addbmm(c, a, b), [(3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (lambda c, a, b: torch.addmv(c, a, b), [(3,), (3, 4), (4,)], 12),
        (lambda a, b: torch.einsum("bcn,bck->bkn", a, b), [(2, 8, 5), (2, 8, 3)], 2 * 8 * 5 * 3),
        (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 4, 8, 6), (6, 4, 3, 3), (6,)], 2 * 48 * 6 * 4 * 9),
        (lambda x, w: F.conv2d(x, w, groups=2, stride=2), [(1, 4, 8, 8), (6, 2, 2, 2)], 16 * 6 * 2 * 4),
        (lambda x, w: F.conv1d(x, w), [(1, 4, 8), (6, 4, 3)], 6 * 6 * 4 * 3),
        (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(1, 4, 5, 5), (4, 3, 2, 2)], 4 * 25 * 3 * 4),
        (lambda x: F.interpolate(x, size=4, mode="bilinear").softmax(-1) * 2, [(1, 3, 8, 8)], 0),
        (lambda x: torch.lgamma(x.abs() + 1) + F.adaptive_avg_pool2d(x, 3).sum(), [(1, 3, 8, 8)], 0),
    ],
)
def test_single_operations(function: Callable[..., Tensor], shapes: list, macs: int, device: str) -> None:
    assert executed(function, *shapes, device=device) == macs


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fused_attention_counts_both_products(device: str, context: Callable[[], AbstractContextManager]) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with context():
            return F.scaled_dot_product_attention(query, key, value)

    counted = executed(attend, (2, 4, 9, 8), (2, 4, 7, 8), (2, 4, 7, 8), device=device)
    assert counted == 2 * 4 * 9 * 7 * (8 + 8)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_fused_and_plain_attention_agree(backend: SDPBackend) -> None:
    def attend(x: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(x, x, x)

    assert executed(attend, (1, 2, 5, 8), device="cpu") == 2 * 2 * 5 * 5 * 8


def test_multi_head_attention_is_seen_through_its_fast_path() -> None:
    width, tokens = 16, 6
    layer = nn.TransformerEncoderLayer(width, 4, 32, batch_first=True)
    counted = count_operations(layer, torch.rand(1, tokens, width)).executed.macs
    assert counted == tokens * (4 * width * width + 2 * width * 32) + 2 * tokens * tokens * width
    assert torch.backends.mha.get_fastpath_enabled()
    assert layer.training, "the training flag is restored"


def test_gradients_are_not_needed_and_not_counted() -> None:
    model = nn.Linear(4, 5)
    assert count_operations(model, torch.rand(3, 4, requires_grad=True)).executed.macs == 60


def test_wrappers_are_looked_through() -> None:
    model = nn.Linear(4, 5)
    assert count_operations(torch.compile(model), torch.rand(3, 4)).executed.macs == 60  # pyright: ignore[reportArgumentType]
    assert count_operations(nn.DataParallel(model), torch.rand(3, 4)).executed.macs == 60


def test_what_cannot_be_seen_is_refused() -> None:
    compiled = nn.Sequential(nn.Linear(4, 5))
    compiled[0].compile()
    with pytest.raises(ValueError, match=r"compiled module \(0\)"):
        count_operations(compiled, torch.rand(3, 4))
    traced = nn.Sequential(torch.jit.trace(nn.Linear(4, 5), torch.rand(3, 4)))
    with pytest.raises(ValueError, match="TorchScript"):
        count_operations(traced, torch.rand(3, 4))


def test_an_operation_without_a_rule_is_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="_cdist_forward"):
        executed(lambda a: torch.cdist(a, a, compute_mode="donot_use_mm_for_euclid_dist"), (1, 3, 4))
    with pytest.raises(ValueError, match=r"rnn|lstm"):
        count_operations(Recurrent(), torch.rand(1, 3, 4))


class Recurrent(nn.Module):
    """An LSTM, which runs as one fused operation."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_a_custom_operator_is_refused() -> None:
    library = torch.library.Library("leanvit_test", "FRAGMENT")
    library.define("hidden(Tensor x) -> Tensor")
    library.impl("hidden", lambda x: x @ x, "CompositeExplicitAutograd")
    with pytest.raises(ValueError, match="leanvit_test::hidden"):
        executed(torch.ops.leanvit_test.hidden, (3, 3), device="cpu")


def test_a_custom_operator_that_states_its_products_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.library.Library("leanvit_test_known", "FRAGMENT")
    library.define("square(Tensor x) -> Tensor")
    library.impl("square", lambda x: x @ x, "CompositeExplicitAutograd")
    rule = lambda args, out: out.numel() * args[0].shape[-1]  # noqa: E731
    monkeypatch.setitem(flops.CUSTOM_OPERATORS, "leanvit_test_known::square", rule)
    assert executed(torch.ops.leanvit_test_known.square, (3, 3), device="cpu") == 27


def test_every_matmul_like_operation_of_this_torch_is_counted_or_refused() -> None:
    """A new fused kernel of a coming torch must not slip through as zero."""
    operations = {name.removeprefix("aten::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    words = {"mm", "bmm", "matmul", "addmm", "linear", "attention", "convolution", "conv2d", "einsum", "lstm", "mv"}
    products = {name for name in operations if words & set(name.split("_"))}
    assert {"mm", "_grouped_mm", "linear", "convolution", "_scaled_dot_product_flash_attention"} <= products
    silent = {name for name in products if not flops._SUSPICIOUS.search(name) or flops._HARMLESS.match(name)}
    assert silent == set()
    harmless = {name for name in operations if flops._SUSPICIOUS.search(name) and flops._HARMLESS.match(name)}
    assert {"upsample_bilinear2d", "lgamma", "cummax"} <= harmless
    assert set(flops.RULES) <= operations, "a rule for an operation that this torch does not have"


def test_count_parameters_counts_a_shared_one_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.append(model[0])
    assert count_parameters(model.to("meta")) == 20 + 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_attention_on_cuda(dtype: torch.dtype) -> None:
    layer = nn.MultiheadAttention(64, 4, batch_first=True, device="cuda", dtype=dtype)
    tokens = torch.rand(2, 33, 64, device="cuda", dtype=dtype)
    counted = count_operations(layer, tokens, tokens, tokens).executed.macs
    assert counted == 2 * (4 * 33 * 64 * 64 + 2 * 33 * 33 * 64)
