"""What a lean network goes through besides being called: files, exports, compilers, precisions, two processes.

One plan holds three methods, each where it acts on what the one before it left; the others are alone in theirs.
"""

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer as TorchvisionViT

from common.hosts import PlanError, lean
from common.hosts.network import make_method
from common.tests.forks import run_forked, torchrun_variables

SIDE = 32
TINY = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
ROTATES = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "attn_type": "rope", "global_pool": "token"}


def _huggingface(name: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    values = {**shape, "image_size": SIDE, "patch_size": 8, **options}
    return getattr(transformers, name)(getattr(transformers, config)(**values))


HOSTS: dict[str, Callable[[], Any]] = {
    "timm": lambda: VisionTransformer(**TINY, reg_tokens=2, init_values=0.1),
    "timm, DINOv3": lambda: Eva(**TINY, **ROTATES, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=2),
    "timm, mixed": lambda: Eva(**TINY, **ROTATES, rope_type="mixed"),
    "torchvision": lambda: TorchvisionViT(SIDE, 8, 4, 2, 32, 64, num_classes=5),
    "transformers, a head": lambda: _huggingface("ViTForImageClassification", "ViTConfig", num_labels=5),
    "transformers, DINOv3": lambda: _huggingface("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2),
}
PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "three": {"hourglass": {"layer": 1, "clusters": (3, 3)}, "tome": {"r": [0, 0, 2, 0]}, "evit": {"layers": (3,)}},
    "ats": {"ats": {"layers": (1, 3)}},
    "ats, padded": {"ats": {"layers": (1, 3), "drop": False}},
    "act": {"act": {"hashes": 8}},
    "smyrf": {"smyrf": {"cluster_size": 4}},
    "evo_vit": {"evo_vit": {}},
}
every_host = pytest.mark.parametrize("name", HOSTS)
every_plan = pytest.mark.parametrize("plan", PLANS)
some_hosts = pytest.mark.parametrize("name", ["timm", "timm, mixed", "transformers, a head"])


def build(name: str) -> Any:
    torch.manual_seed(0)
    net = HOSTS[name]().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.05 if parameter.dim() > 1 else 0.3, 0.1)
    return net


def build_lean(name: str, plan: str = "three") -> Any:
    return lean(build(name), *(make_method(method, settings) for method, settings in PLANS[plan].items()))


def seeded(call: Any, *args: Any) -> Any:
    """Methods that hash draw projections in every pass."""
    torch.manual_seed(2)
    return call(*args)


def images(batch: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def dynamic_batch(name: str) -> Any:
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    return {"pixel_values": batch} if name.startswith("transformers") else (batch,)


@every_plan
@every_host
def test_files_and_copies(name: str, plan: str) -> None:
    fast, batch = build_lean(name, plan), images()
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert_close(seeded(other, batch), seeded(fast, batch), 0)
        assert_close(other.restore()(batch), fast.restore()(batch), 0)
        assert other.methods == fast.methods
    state = {key: value + 0.1 for key, value in fast.restore().state_dict().items()}
    other = copy.deepcopy(fast)
    assert not other.load_state_dict(state).missing_keys
    again = build(name)
    again.load_state_dict(state)
    assert_close(seeded(other, batch), seeded(lean(again, *fast.methods), batch), 0)


@every_plan
@every_host
def test_costs_are_those_of_the_operations_that_run(name: str, plan: str) -> None:
    fast = build_lean(name, plan)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's counter does not see into it
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            seeded(fast, images(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    found = seeded(fast.gmacs, images(1) if fast.depends_on_data else None)
    assert round(found * 1e9) == counter.get_total_flops() // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plan", "strict"),
    [
        *((name, "three", False) for name in HOSTS),
        *(("transformers, DINOv3", plan, False) for plan in PLANS if plan not in ("three", "ats")),
        *(("timm", plan, True) for plan in ("three", "act")),  # a compiler traces the others below
        ("transformers, a head", "three", True),
    ],
)
def test_exports(name: str, plan: str, strict: bool) -> None:
    fast = build_lean(name, plan)
    expected = seeded(fast, images())
    with torch.set_grad_enabled(plan != "act"):  # whose clusters are as many as the image makes: one operator then
        exported = torch.export.export(fast, (images(2),), dynamic_shapes=dynamic_batch(name), strict=strict)
    assert_close(seeded(exported.module(), images()), expected)
    assert_close(seeded(fast, images()), expected, 0)  # as usable as before
    assert_close(seeded(copy.deepcopy(fast), images()), expected, 0)


@pytest.mark.parametrize("strict", [True, False])
def test_a_length_that_images_decide_is_not_exported(strict: bool) -> None:
    fast = build_lean("timm", "ats")
    with pytest.raises(Exception, match=r"ats cannot be exported: .*drop=False keeps the length") as caught:
        torch.export.export(fast, (images(2),), strict=strict)
    assert strict or type(caught.value) is PlanError  # dynamo wraps it
    assert fast(images()).shape == (3, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("timm, mixed", "three"),
        ("transformers, a head", "evo_vit"),
        ("transformers, DINOv3", "ats, padded"),
    ],
)
def test_onnx(name: str, plan: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fast = build_lean(name, plan)
    expected = fast(images())
    program = torch.onnx.export(fast, (images(2),), dynamo=True, dynamic_shapes=dynamic_batch(name), verbose=False)
    assert program is not None
    program.save(tmp_path / "lean.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "lean.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    assert_close([torch.from_numpy(one) for one in found], expected)
    assert_close(fast(images()), expected, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, "three") for name in ("timm", "timm, mixed", "transformers, a head")),
        *(("transformers, DINOv3", plan) for plan in PLANS if plan not in ("three", "ats")),
    ],
)
def test_compiled_without_a_break_and_once(name: str, plan: str) -> None:
    """The second batch size makes the dimension dynamic; nothing is compiled again after it."""
    torch._dynamo.reset()
    fast = build_lean(name, plan)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(seeded(compiled, images(3)), seeded(fast, images(3)))
        assert_close(seeded(compiled, images(2)), seeded(fast, images(2)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (2, 3, 5, 8):
                assert_close(seeded(compiled, images(batch)), seeded(fast, images(batch)))
    assert_close(fast.restore()(images()), build(name)(images()), 0)


@pytest.mark.slow
def test_compiled_where_images_decide_the_length() -> None:
    """With a break at the number that is read, and the same output."""
    torch._dynamo.reset()
    fast = build_lean("timm", "ats")
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        for batch in (2, 3):
            assert_close(compiled(images(batch)), fast(images(batch)))


@every_plan
@every_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(name: str, dtype: torch.dtype, plan: str) -> None:
    fast = build_lean(name, plan)
    with torch.autocast("cpu", dtype), torch.no_grad():
        output = fast(images())
    assert all(one.isfinite().all() for one in tree_leaves(output))
    half = copy.deepcopy(fast).to(dtype)
    with torch.no_grad():
        output = half(images().to(dtype))
    assert all(one.dtype == dtype and one.isfinite().all() for one in tree_leaves(output))
    if not fast.depends_on_data:
        assert lean(build(name).to(dtype), *fast.methods).gmacs() == fast.gmacs()


@every_plan
@every_host
def test_gradients_reach_the_host_s_weights(name: str, plan: str) -> None:
    fast = build_lean(name, plan).train()
    tree_leaves(fast(images()))[0].square().sum().backward()
    missing = [key for key, parameter in fast.restore().named_parameters() if parameter.grad is None]
    assert all(key.endswith("mask_token") for key in missing), missing


def _train(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after two steps on two processes, and what one process makes of the same four images."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    found = []
    for wrapped in (True, False):
        fast = build_lean(name).train()
        net = nn.parallel.DistributedDataParallel(fast, find_unused_parameters=True) if wrapped else fast
        optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
        for step in range(2):
            torch.manual_seed(step)
            batch = torch.randn(4, 3, SIDE, SIDE)
            output = tree_leaves(net(batch[2 * rank : 2 * rank + 2] if wrapped else batch))[0]
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        found.append([parameter.detach() for parameter in fast.restore().parameters()])
    return found[0], found[1]


def _train_in_a_group(name: str) -> tuple[list[Tensor], list[Tensor]]:
    torch.distributed.init_process_group("gloo")
    try:
        return _train(name)
    finally:
        torch.distributed.destroy_process_group()


@some_hosts
def test_two_processes_train_as_one(name: str) -> None:
    ended = run_forked(functools.partial(_train_in_a_group, name), torchrun_variables(2), timeout_s=240)
    for one in ended:
        assert one.status == 0, one.output
        for together, alone in zip(*one.result, strict=True):
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
