"""Token clustering: the paper's properties, and its formula written out token by token."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor

from common.measure.flops import count_operations
from common.tests.reference import array
from hourglass_swag.models.ops.cluster import (
    AvgPool,
    TokenClusteringBlock,
    allowed_clusters,
    assign_tokens,
    cluster_grid,
)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(array("features", shape, seed))


def cluster_by_hand(grid: Tensor, side: int, iterations: int, temperature: float, window: int) -> tuple[Tensor, Tensor]:
    """The formula for one image (C, H, W), with distances computed as such and a loop over tokens."""
    _, height, width = grid.shape
    cells = torch.arange(side * side, dtype=grid.dtype).view(1, 1, side, side)
    start = torch.nn.functional.interpolate(cells, size=(height, width)).flatten().long().tolist()
    z = grid.flatten(1).T
    s = torch.nn.functional.adaptive_avg_pool2d(grid[None], side)[0].flatten(1).T
    for _ in range(iterations):
        numerator, denominator = torch.zeros_like(s), torch.zeros(side * side, 1, dtype=grid.dtype)
        for p, cell in enumerate(start):
            distance = (z[p] - s).square().sum(1)
            for k in range(side * side):
                far = max(abs(cell // side - k // side), abs(cell % side - k % side)) > window // 2
                distance[k] += 1e16 * far
            weights = torch.softmax(-temperature * distance, dim=0)[:, None]
            numerator += weights * z[p]
            denominator += weights
        s = numerator / denominator.clamp_min(1e-16)
    return s, torch.cdist(z, s).argmin(1)


@pytest.mark.parametrize(
    ("size", "side", "iterations", "temperature", "window"),
    [((6, 6), 3, 3, 1.0, 3), ((5, 7), 2, 2, 0.1, 1), ((4, 4), 4, 2, 0.05, 5), ((3, 3), 5, 2, 0.2, 3)],
)
def test_formula_token_by_token(size, side, iterations, temperature, window):
    grids = features(2, 5, *size, seed=side)
    block = TokenClusteringBlock(side**2, iterations, temperature, window)
    centroids, labels = block(grids)
    for image in range(2):
        expected, nearest = cluster_by_hand(grids[image], side, iterations, temperature, window)
        torch.testing.assert_close(centroids[image], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(labels[image], nearest)


def test_weights_of_a_token_sum_to_one_and_stay_in_the_window():
    size, grid = (7, 7), (3, 3)
    allowed = allowed_clusters(size, grid, 1, device=torch.device("cpu"), dtype=torch.float64)
    penalty = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e16)
    weights = assign_tokens(features(2, 49, 8), features(2, 9, 8, seed=1), penalty, 1.0)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 49, dtype=torch.float64))
    assert (weights[:, ~allowed] == 0).all()
    assert 0 < int((~allowed).sum()) < allowed.numel()


def test_without_iterations_it_is_the_average_pool():
    grids = features(2, 4, 6, 9)
    centroids, _ = TokenClusteringBlock((2, 3), n_iters=0)(grids)
    pooled, no_labels = AvgPool((2, 3))(grids)
    assert torch.equal(centroids, pooled)
    assert no_labels is None
    torch.testing.assert_close(pooled[:, 4], grids[:, :, 3:, 3:6].mean((2, 3)))


def test_window_of_one_with_a_cluster_per_token_is_the_identity():
    grids = features(1, 4, 5, 5)
    centroids, labels = TokenClusteringBlock(25, window_size=1)(grids)
    torch.testing.assert_close(centroids, grids.flatten(2).transpose(1, 2))
    assert torch.equal(labels[0], torch.arange(25))


def test_temperature_zero_weighs_all_clusters_alike():
    grids = features(1, 4, 6, 6)
    centroids, _ = TokenClusteringBlock(9, n_iters=2, temperture=0.0, window_size=3)(grids)
    torch.testing.assert_close(centroids, grids.mean((2, 3))[:, None].expand(-1, 9, -1))


def test_only_the_last_average_carries_gradients():
    """The assignment is detached: the gradient is that of a weighted average with constant weights."""
    grids = features(1, 3, 4, 4).requires_grad_()
    block = TokenClusteringBlock(4, 3, 0.3, 3)
    probe = features(1, 4, 3, seed=2)
    (block(grids)[0] * probe).sum().backward()
    with torch.no_grad():
        before = TokenClusteringBlock(4, 2, 0.3, 3)(grids)[0]
        penalty = block._penalty((4, 4), (2, 2), grids.device, grids.dtype)
        weights = assign_tokens(grids.flatten(2).transpose(1, 2), before, penalty, 0.3)
        expected = (weights / weights.sum(1, keepdim=True)) @ probe  # (1, P, C)
    assert grids.grad is not None
    torch.testing.assert_close(grids.grad.flatten(2).transpose(1, 2), expected)


def test_labels_cost_nothing_unless_asked_for():
    block = TokenClusteringBlock(9)
    assert block(features(1, 4, 6, 6), return_labels=False)[1] is None
    with_labels, without = (count_operations(block, features(1, 4, 6, 6), None, flag) for flag in (True, False))
    more = with_labels.executed["matmul"] - without.executed["matmul"]
    assert more == 9 * 36 * 4


def test_one_block_serves_any_size_type_and_image_alone_or_in_a_batch():
    block = TokenClusteringBlock(n_iters=2, temperture=0.1, window_size=3)
    for size, number in (((6, 6), 9), ((8, 4), 4), ((6, 6), (2, 3)), ((6, 6), 9)):
        grids = features(3, 4, *size)
        together = block(grids, number)[0]
        torch.testing.assert_close(together[1:2], block(grids[1:2], number)[0])
        single = block(grids.float(), number)[0]
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), together, rtol=1e-4, atol=1e-4)


def test_half_precision_and_autocast_compute_in_float32():
    grids = features(1, 64, 8, 8).mul(40).half()
    block = TokenClusteringBlock(16)
    expected = block(grids.float())[0]
    centroids = block(grids)[0]
    assert centroids.dtype == torch.half
    torch.testing.assert_close(centroids, expected.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block(grids.float())[0], expected)


def test_meta_device_then_cpu_then_copies():
    block = TokenClusteringBlock(4, window_size=3)
    assert block(torch.empty(2, 3, 4, 4, device="meta"))[0].shape == (2, 4, 3)
    expected = block(features(1, 3, 4, 4))[0]
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(features(1, 3, 4, 4))[0], expected)
    assert not block.state_dict()


def test_windows_made_in_inference_serve_training():
    block = TokenClusteringBlock(4, window_size=3)
    with torch.inference_mode():
        block(features(1, 3, 4, 4))
    (window,) = block._windows.values()
    grids = features(1, 3, 4, 4).requires_grad_()
    block(grids)[0].sum().backward()
    assert grids.grad is not None
    assert next(iter(block._windows.values())) is window
    assert not window.is_inference()


def test_compiles_as_one_graph():
    block = TokenClusteringBlock(9, 2, 0.1, 3)
    grids = features(1, 4, 6, 6)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(grids, return_labels=False)[0], block(grids)[0])


def test_wrong_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"num_clusters .-n, --num_cluster. must be a square, got 500; nearest are 484, 529"
    ):
        cluster_grid(500)
    with pytest.raises(ValueError, match="got 0; nearest are 1"):
        TokenClusteringBlock(0)
    with pytest.raises(ValueError, match=r"window_size .--cluster_window_size. must be odd and positive, got 4"):
        TokenClusteringBlock(9, window_size=4)
    with pytest.raises(ValueError, match="n_iters"):
        TokenClusteringBlock(9, n_iters=-1)
    with pytest.raises(ValueError, match="temperture"):
        TokenClusteringBlock(9, temperture=-0.5)
    with pytest.raises(ValueError, match="neither"):
        TokenClusteringBlock()(features(1, 3, 4, 4))
    assert cluster_grid([2, 3]) == (2, 3)
    assert math.prod(cluster_grid(529)) == 529
