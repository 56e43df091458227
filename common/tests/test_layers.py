"""Layers that two papers share: the linear attention of T2T-ViT at every precision."""

import pytest
import torch

from common.layers import EPSILON, Performer, init_linear, sinusoid_table
from common.tests.reference import array


def performer(scale: float = 1.0) -> tuple[Performer, torch.Tensor]:
    """A layer of the published width, and tokens whose keys and queries are ``scale`` times the usual."""
    torch.manual_seed(0)
    layer = Performer(147, 64).eval()
    with torch.no_grad():
        layer.kqv.weight.mul_(scale)
    return layer, torch.from_numpy(array("x", (2, 49, 147))).float()


def test_it_is_attention_with_the_kernel_of_its_features() -> None:
    layer, x = performer()
    layer, x = layer.double(), x.double()
    with torch.no_grad():
        k, q, v = layer.kqv(x).split(64, dim=-1)
        weights = layer.positive_features(q) @ layer.positive_features(k).transpose(1, 2)  # (B, T, T)
        mixed = weights / (weights.sum(-1, keepdim=True) + EPSILON) @ v
        torch.testing.assert_close(layer.attend(x), v + layer.proj(mixed))
    gram = layer.w.detach() @ layer.w.detach().T
    torch.testing.assert_close(gram, 32 * torch.eye(32, dtype=torch.double), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["autocast", "cast"])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_half_precision_stays_near_full_precision(dtype: torch.dtype, how: str, scale: float) -> None:
    """At the larger scale sums of exponentials overflow float16, as they do in trained networks."""
    layer, x = performer(scale)
    if scale > 1:  # aligned with a random direction: the feature reaches e^(m / 2)
        with torch.no_grad():
            layer.kqv.weight.zero_()
            layer.kqv.bias[:128] = layer.w[0].repeat(2)
        sums = layer.positive_features(layer.w[:1].expand(49, -1)[None]).sum()
        assert sums > torch.finfo(torch.float16).max
    with torch.no_grad():
        exact = layer(x)
        if how == "autocast":
            with torch.autocast("cpu", dtype=dtype):
                half = layer(x)
        else:
            half = layer.to(dtype)(x.to(dtype))
    assert half.isfinite().all()
    assert float((half.float() - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_gradients_stay_finite_under_autocast() -> None:
    layer, x = performer(4.0)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = layer(x).float().square().mean()
    loss.backward()
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)
    assert not layer.w.requires_grad


def test_the_position_table() -> None:
    table = sinusoid_table(50, 8)
    assert table.shape == (1, 50, 8)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[0, :, 0], torch.arange(50).sin())
    torch.testing.assert_close(table[0, :, 3], (torch.arange(50) / 10).cos())


def test_initial_weights() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).apply(init_linear)
    with torch.no_grad():
        assert 0.018 < float(layer[0].weight.std()) < 0.022
        assert not layer[0].bias.any()
        assert bool((layer[1].weight == 1).all())
