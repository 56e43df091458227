"""Lean networks as ONNX and as programs: each method is written or refused with the reason, none breaks the network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from common.hosts import lean
from common.hosts.export import export_onnx, export_torch
from common.hosts.network import METHODS, make_method
from common.run.errors import ExportError, UsageError
from common.tests.test_hosts_life import build, images

pytestmark = pytest.mark.slow
REFUSED = {
    (export_onnx, "act"): "act needs shifts of bits, which torch cannot write as ONNX",
    (export_onnx, "ats"): "ats cannot be exported: how many tokens survive .* drop=False",
    (export_torch, "ats"): "ats cannot be exported: how many tokens survive .* drop=False",
}


def fast_network(name: str, method: str, **settings: Any) -> Any:
    return lean(build(name), make_method(method, settings))


def outputs(fast: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [*tree_leaves(fast(images())), fast.features(images())]


@pytest.mark.parametrize("export", [export_onnx, export_torch])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_written_or_refused(method: str, export: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install -e .[export]")
    fast = fast_network("timm", method)
    before = outputs(fast)
    if reason := REFUSED.get((export, method)):
        with pytest.raises(ExportError, match=reason):
            export(fast, tmp_path / "fast")
        assert not list(tmp_path.iterdir())
    else:
        assert export(fast.train(), tmp_path / "fast") < 1e-5
        assert fast.training
        fast.eval()
    for one, other in zip(outputs(fast), before, strict=True):
        assert torch.equal(one, other)


def test_ats_of_a_fixed_length(tmp_path: Path) -> None:
    fast = fast_network("timm", "ats", drop=False)
    assert export_torch(fast, tmp_path / "fast.pt2") < 1e-5
    pytest.importorskip("onnxruntime", reason="pip install -e .[export]")
    assert export_onnx(fast, tmp_path / "fast.onnx") < 1e-5


def test_features_and_outputs_by_name(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e .[export]")
    fast = fast_network("timm, mixed", "hourglass").double()
    assert export_onnx(fast, tmp_path / "features.onnx", features=True) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "features.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {"images": images(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(found).double(), fast.features(images(5).double()), rtol=0, atol=1e-4)
    assert fast.restore().head.weight.dtype == torch.float64
    fast = fast_network("transformers, DINOv3", "tome")
    assert export_onnx(fast, tmp_path / "bare.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "bare.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["last_hidden_state", "pooler_output"]


def test_other_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a network of leanvit\.lean, got a VisionTransformer"):
        export_onnx(build("timm"), tmp_path / "x.onnx")


def test_outputs_of_zeros_are_said_to_prove_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net: Any = build("timm")
    torch.nn.init.zeros_(net.head.weight)
    torch.nn.init.zeros_(net.head.bias)
    assert export_torch(lean(net, "tome", r=1), tmp_path / "fast.pt2") == 0
    assert "all outputs are zero" in caplog.text
