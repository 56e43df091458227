"""Compare the compiled operators of ACT and SMYRF with their plain form.

    python -m hourglass_swag.tests.check_operators FOLDER

A process of its own, because a library can be loaded only once. FOLDER holds ``leanvit_ops/_C*.so``; ``--device cuda``
checks those of ACT on a GPU.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.library import opcheck

from common.measure.flops import count_operations
from common.tests.reference import fill_
from hourglass_swag.models.ops import library
from hourglass_swag.models.ops.ACT.extensions import plain
from hourglass_swag.models.ops.smyrf.attn import SmyrfAttention, attend_in_clusters
from hourglass_swag.tests import cases
from hourglass_swag.tests.counting import make

VECTORS = Path(__file__).parent / "vectors" / "methods"
SIZES = ((4, 50, 8, 7), (5, 257, 40, 64), (2, 1025, 417, 80), (1, 5, 3, 300))  # R, N, C, D
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CLUSTERS = (  # R, N, M, D, T, c_q, c_k, padded
    (4, 17, 17, 16, 4, 4, 4, False),
    (4, 24, 24, 64, 3, 6, 6, False),
    (2, 12, 24, 32, 4, 4, 8, False),
    (3, 17, 17, 80, 5, 4, 4, True),
    (2, 10, 10, 48, 2, 10, 10, False),
    (16, 65, 65, 112, 32, 64, 64, False),
    (4, 40, 40, 128, 4, 20, 20, True),
    (2, 33, 33, 96, 2, 16, 16, True),
    (1, 7, 7, 16, 3, 9, 9, True),
    # few pairs, cluster by cluster
    (3, 130, 260, 64, 4, 4, 8, False),
    (3, 130, 259, 32, 4, 4, 8, True),
    (1, 257, 257, 80, 8, 8, 8, False),
    # many pairs, tile by tile: a row of its own, tails of tiles and panels, clusters that hold three rows
    (1, 257, 257, 64, 32, 32, 32, False),
    (3, 130, 260, 112, 32, 8, 16, False),
    (3, 130, 259, 96, 32, 8, 16, True),
    (4, 5, 10, 48, 9, 12, 24, False),
    (2, 400, 400, 16, 255, 2, 2, False),  # as many rounds as can be counted
    (2, 30, 30, 16, 256, 6, 6, False),  # one more
    (1, 600, 600, 16, 768, 2, 2, True),  # more than 256 clusters
)


def operators() -> Any:
    """The compiled ones."""
    return getattr(torch.ops, library.NAMESPACE)


def check_act(device: str) -> None:
    """ACT's three operators in every type, the same bits every time."""
    ops = operators()
    for R, N, C, D in SIZES:
        hashes = torch.randint(-C, C, (R, N)) * 2**50
        for ours, theirs in zip(ops.ada_cluster(hashes.to(device)), plain.ada_cluster(hashes), strict=True):
            assert torch.equal(ours.cpu(), theirs)
        groups = torch.randint(-1, C + 1, (R, N)).int()
        for dtype in DTYPES:
            x, y, weights = torch.randn(R, N, D).to(dtype), torch.randn(R, C, D).to(dtype), torch.rand(R, C)
            for name, data in (("weighted_sum", x), ("broadcast", y)):
                arguments = [tensor.to(device) for tensor in (data, groups, weights)]
                ours = getattr(ops, name)(*arguments)
                assert torch.equal(ours, getattr(ops, name)(*arguments))
                torch.testing.assert_close(ours.cpu(), getattr(plain, name)(data, groups, weights))


def check_registration() -> None:
    """Gradients, and what tracing must know."""
    ops = operators()
    x = torch.randn(2, 9, 3, dtype=torch.double, requires_grad=True)
    y = torch.randn(2, 4, 3, dtype=torch.double, requires_grad=True)
    weights = torch.rand(2, 4, dtype=torch.double, requires_grad=True)
    groups = torch.randint(0, 4, (2, 9)).int()
    assert torch.autograd.gradcheck(lambda x, w: ops.weighted_sum(x, groups, w), (x, weights))
    assert torch.autograd.gradcheck(lambda y, w: ops.broadcast(y, groups, w), (y, weights))
    assert torch.autograd.gradgradcheck(lambda x, w: ops.weighted_sum(x, groups, w), (x, weights))
    opcheck(ops.ada_cluster.default, (torch.randint(0, 4, (2, 9)),))
    opcheck(ops.weighted_sum.default, (x, groups, weights))
    opcheck(ops.broadcast.default, (y, groups, weights))
    opcheck(ops.sort_rows.default, (torch.randn(3, 9),))
    q, order = torch.randn(2, 9, 16), torch.rand(2, 2, 9).argsort(-1)
    opcheck(ops.attend_in_clusters.default, (q, q, q, order, order, 3, 3, 0.1, False), test_utils="test_faketensor")
    refused: tuple[Callable[[], Any], ...] = (
        lambda: ops.ada_cluster(x),
        lambda: ops.weighted_sum(x, groups[:, :3], weights),
        lambda: ops.broadcast(y, groups.float(), weights),
        lambda: ops.sort_rows(x),
        lambda: ops.attend_in_clusters(q, q, q, order, order, 5, 5, 0.1, False),
        lambda: ops.attend_in_clusters(q, q, q, groups, groups, 3, 3, 0.1, False),
    )
    for call in refused:
        try:
            call()
        except RuntimeError:
            continue
        raise AssertionError("bad input was taken")


def check_smyrf() -> None:
    """Sorting, and attention with at most twice the error of the plain form."""
    ops = operators()
    values = torch.randn(3, 2, 1025)
    values[0, 0, :6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-40])
    assert torch.equal(ops.sort_rows(values), values.sort(dim=-1, stable=True)[1])
    for R, N, M, D, T, c_q, c_k, padded in CLUSTERS:
        q, k, v = 2 * torch.randn(R, N, D), torch.randn(R, M, D), torch.randn(R, M, D)
        orders = SmyrfAttention(T, c_q, c_k, padded=padded).orders(q, k)
        options: dict[str, Any] = {"norm_factor": D**0.5, "padded": padded}
        exact = attend_in_clusters(q.double(), k.double(), v.double(), *orders, (c_q, c_k), **options)
        other = attend_in_clusters(q, k, v, *orders, (c_q, c_k), **options)
        ours = ops.attend_in_clusters(q, k, v, *orders, c_q, c_k, D**-0.5, padded)
        error, allowed = (ours - exact).abs().max(), 2 * (other - exact).abs().max() + 2e-6
        assert error <= allowed, f"{(R, N, M, D, T, c_q, c_k, padded)}: error {error:.1e}, allowed {allowed:.1e}"


def check_threads() -> None:
    """Results do not depend on the number of threads."""
    ops, x = operators(), torch.randn(7, 33, 16)
    groups, weights = torch.randint(0, 5, (7, 33)).int(), torch.rand(7, 5)
    orders = torch.rand(4, 7, 33).argsort(-1), torch.rand(7, 4, 33).argsort(-1).transpose(0, 1)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        attended = [ops.attend_in_clusters(x, x, x, *orders, size, size, 0.2, False) for size in (3, 11)]
        results.append((ops.weighted_sum(x, groups, weights), *attended, ops.sort_rows(x)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_models() -> None:
    """Whole models: compiled operators, the same under torch.compile, and the plain form; costs; gradients."""
    size = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 2}
    size |= {"hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    clusters = {"smyrf_n_hashes": 4, "smyrf_q_cluster_size": 4, "smyrf_k_cluster_size": 4}
    methods: tuple[tuple[str, dict[str, Any]], ...] = (
        ("act_vision_transformer", {"act_q_hashes": 3, "act_group_k": True}),
        ("smyrf_vision_transformer", clusters),
        ("smyrf_vision_transformer", clusters | {"smyrf_padded": True}),
    )
    for method, options in methods:
        model, images = fill_(make(method, **size, **options)).eval(), torch.randn(1, 3, 32, 32)
        expected = seeded(model, images)
        traced: Any = torch.compile(model, fullgraph=True, backend="aot_eager")  # its C++ would be compiled for long
        torch.testing.assert_close(seeded(traced, images), expected, rtol=1e-5, atol=1e-5)
        torch._dynamo.reset()
        with library.plain_only():
            torch.testing.assert_close(seeded(model, images), expected, rtol=1e-5, atol=1e-5)
        torch.manual_seed(1)
        compiled = count_operations(model, images)
        torch.manual_seed(1)
        with library.plain_only():
            assert count_operations(model, images).executed.macs == compiled.executed.macs
        model.train()(images).square().sum().backward()


def seeded(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Output of a model under seed 1."""
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(images)


def main() -> None:
    """Run all checks; the last line says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder that holds leanvit_ops/_C*.so")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of ACT's operators")
    args = parser.parse_args()
    library.find_library = lambda: next(args.folder.glob(f"{library.NAMESPACE}/_C*.so"))
    print("devices:", *sorted(library.load()["ada_cluster"]))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check_act(args.device)
    if args.device == "cpu":
        check_registration()
        check_smyrf()
        check_threads()
        check_models()
        assert cases.main([str(VECTORS)]) == 0
    print("all agree")


if __name__ == "__main__":
    main()
