"""Attention with a bias per key: every form against float64, the kernel on a GPU or through Triton's interpreter."""

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.measure.attention import attention, has_kernel
from common.run.files import ROOT

CUDA = torch.cuda.is_available()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """Queries, keys, values as slices of one packed product, and the log of sizes of 1 to 4 patches."""
    images, heads, queries, keys, width = shape
    torch.manual_seed(0)
    qkv = torch.randn(images, max(queries, keys), 3, heads, width, device=device, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    bias = torch.randint(1, 5, (images, keys), device=device).float().log()
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], bias


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT * q.shape[3] ** -0.5 + bias.double()[:, None, None]).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 37, 64])
def test_on_a_cpu(keys: int, dtype: torch.dtype) -> None:
    q, k, v, bias = inputs((2, 3, 33, keys, 16), dtype)
    assert not has_kernel(q, k, v, bias)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(attention(q, k, v, bias).double(), exact(q, k, v, bias), rtol=0, atol=tolerance)
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_a_size_of_n_counts_like_n_equal_keys() -> None:
    q, k, v, _ = inputs((1, 2, 5, 3, 8), torch.float64)
    times = torch.tensor([1, 3, 2])
    repeated = attention(q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))
    torch.testing.assert_close(attention(q, k, v, times.double().log()[None]), repeated, rtol=0, atol=1e-12)


INTERPRETED = """
import torch
from common.measure.attention_kernel import launch, split_width
from common.tests.test_attention import exact, inputs
for shape in [(2, 3, 70, 70, 64), (1, 2, 33, 65, 80), (2, 2, 64, 128, 32), (1, 1, 5, 1, 48), (1, 2, 130, 197, 96)]:
    q, k, v, bias = inputs(shape, torch.float32)
    out = launch(q, k, v, bias, shape[4] ** -0.5, BLOCK_M=32, BLOCK_N=32)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), exact(q, k, v, bias), rtol=0, atol=1e-5)
assert [width for width in range(8, 137, 8) if split_width(width)] == [16, 32, 48, 64, 80, 96, 128]
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_the_kernel_in_triton_s_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 72])
def test_on_a_gpu(dtype: torch.dtype, width: int) -> None:
    """The error is at most twice that of plain attention in the same type."""
    for images, keys in itertools.product((1, 8), (1, 32, 37, 64, 197, 1025)):
        q, k, v, bias = inputs((images, 4, keys, keys, width), dtype, "cuda")
        assert has_kernel(q, k, v, bias) == (dtype != torch.float32 and width != 72)
        expected = exact(q, k, v, bias)
        scores = q @ k.mT * width**-0.5 + bias.to(dtype)[:, None, None]
        plain = scores.softmax(-1, dtype=torch.float32).to(dtype) @ v
        error = (attention(q, k, v, bias) - expected).norm()
        assert error <= 2 * (plain - expected).norm() + 1e-6 * expected.norm(), (images, keys)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_compiled_on_a_gpu() -> None:
    q, k, v, bias = inputs((2, 4, 37, 37, 64), torch.bfloat16, "cuda")
    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, bias), attention(q, k, v, bias))
