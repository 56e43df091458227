"""ToMe's kernels against its plain form; as a program with TRITON_INTERPRET=1, on a CPU."""

import torch

from hourglass_swag.models.ops.tome.tome import merge, ops

SHAPES = ((1, 17, 16, 32, 3, 1), (2, 50, 20, 24, 7, 0), (3, 65, 64, 48, 20, 1), (1, 9, 8, 2, 4, 0), (1, 4, 3, 5, 1, 1))
"""Batch, tokens, channels of the metric and of the tokens, r, tokens at the beginning that merge with none."""
LARGE = ((8, 1025, 64, 1024, 40, 1), (2, 1370, 80, 1280, 684, 1), (1, 2305, 64, 384, 200, 0))


def compare(batch: int, tokens: int, width: int, channels: int, r: int, prefix: int, *, device: str = "cpu") -> None:
    """The same matching, equals in the same order, and averages that err at most twice as much, against float64."""
    generator = torch.Generator().manual_seed(batch * tokens)
    metric, x, size = (
        torch.randn(batch, tokens, k, generator=generator, device="cpu").to(device) for k in (width, channels, 1)
    )
    if tokens > 8:
        metric[:, 5] = metric[:, 7] = metric[:, 3]  # proposals of the same cosine
    size = size.abs().ceil()
    plain, _ = merge.bipartite_soft_matching(metric, r, prefix_tokens=prefix, scatter="native")
    assert isinstance(plain, merge.Matching)
    found = ops.match(metric, plain.source.shape[1], (prefix + 1) // 2, prefix // 2)
    for got, wanted in zip(found, (plain.keep, plain.source, plain.into), strict=True):
        differs = float((got != wanted).float().mean())
        assert differs <= (0 if tokens < 1000 else 0.01), "rounding swaps close proposals at most"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for weights in (None, size):
            exact, total = plain.average(x.to(dtype).double(), None if weights is None else weights.double())
            rounded, _ = plain.average(x.to(dtype), weights)
            got, got_total = ops.merge_wavg(x.to(dtype), weights, plain.keep, plain.source, plain.into)
            assert got.dtype == dtype
            assert torch.equal(got_total.double(), total)
            allowed = 2 * (rounded - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
            assert (got - exact).abs().max() <= allowed


if __name__ == "__main__":
    for shape in SHAPES:
        compare(*shape)
    print("the kernels compute as plain PyTorch does")
