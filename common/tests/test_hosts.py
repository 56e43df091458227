"""Hosts, plan and runner, with timm's networks and small methods of this file; methods of papers are tested there."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from common.hosts import Lean, NotAHost, Plan, PlanError, explain, families, lean
from common.hosts.network import find_host
from common.run.files import ROOT
from common.tests.small_methods import Drop, Halve, Replace

SIDE = 32
TINY = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers, layer scale, no class position": {"reg_tokens": 4, "init_values": 0.1, "no_embed_class": True},
    "pre-norm": {"pre_norm": True},
    "qk-norm, scaled norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "average pool": {"global_pool": "avg", "class_token": False, "fc_norm": True},
    "attention pool": {"global_pool": "map", "class_token": False},
    "dynamic size": {"dynamic_img_size": True},
    "rectangular": {"img_size": (32, 48)},
    "SwiGLU": {"mlp_layer": SwiGLUPacked},
    "features": {"num_classes": 0},
}


def build(name: str = "plain", **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    net = VisionTransformer(**TINY | FAMILIES[name] | options).double().eval()
    for parameter in net.parameters():  # away from zeros and ones, so that no part of it is invisible
        nn.init.normal_(parameter, 0.05 if parameter.dim() > 1 else 0.3, 0.1)
    return net


def images_for(net: VisionTransformer, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, *net.patch_embed.img_size, dtype=torch.float64)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_reduced_is_the_network(name: str) -> None:
    net = build(name)
    images = images_for(net)
    fast = lean(net)
    plan = Plan(find_host(net), (), opened=True)
    host = plan.host
    opened = host.finish(net, host.normalize(net, plan.run(host.embed(net, images)).x))
    torch.testing.assert_close(opened, net(images), rtol=0, atol=1e-12)
    assert torch.equal(fast(images), net(images))
    assert torch.equal(fast.forward_features(images), net.forward_features(images))
    torch.testing.assert_close(lean(net, Replace())(images), net(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("hook", ["before", "between", "after"])
def test_tokens_are_reduced_and_restored(name: str, hook: str) -> None:
    net = build(name)
    images, prefix = images_for(net), net.num_prefix_tokens
    rows, columns = net.patch_embed.grid_size
    fast = lean(net, Halve(hook=hook), Halve(layer=2, hook="between"))
    full, half, quarter = (prefix + rows * columns // share for share in (1, 2, 4))
    assert fast.tokens_per_layer() == [full, half if hook == "before" else full, half, quarter, quarter]
    assert fast(images).shape == net(images).shape
    assert fast.forward_features(images).shape == net.forward_features(images).shape
    features = fast.features(images)
    assert features.shape == (2, 32, rows, columns)
    groups = features.flatten(2).unflatten(2, (-1, 4))
    assert torch.equal(groups, groups[..., :1].expand_as(groups))


def test_an_average_pool_weighs_merged_tokens_by_their_size() -> None:
    """Equal patches merge without a trace, and the mean over the restored grid counts each patch once."""
    net = build("average pool", pos_embed="none")
    images = images_for(net)
    images = images[..., ::8].repeat_interleave(8, 3)  # the columns of patches still differ
    images = images[..., [*range(8), *range(8), *range(16, 24), *range(16, 24)]]  # pairs of equal patches
    torch.testing.assert_close(lean(net, Halve())(images), net(images), rtol=0, atol=1e-12)


def test_what_is_called_on_a_timm_network_works_as_before() -> None:
    net = build()
    images = images_for(net)
    fast = lean(net, Halve())
    assert isinstance(fast, VisionTransformer)
    assert isinstance(fast, Lean)
    assert fast.num_classes == 5
    assert fast.num_features == 32
    torch.testing.assert_close(fast.forward_head(fast.forward_features(images)), fast(images))
    assert list(fast.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), net.state_dict().values(), strict=True))
    assert fast.restore() is net
    before = net(images)
    fast.reset_classifier(3)
    assert fast(images).shape == (2, 3)
    assert torch.equal(net(images), before)
    with pytest.raises(ValueError, match="not restored"):
        fast.forward_intermediates(images)
    with pytest.raises(ValueError, match="attn_mask"):
        fast(images, attn_mask=torch.zeros(17, 17))


EVA = {
    "EVA-02": {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False},
    "DINOv3": {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "rope_type": "dinov3",
        "init_values": 0.1,
        "num_reg_tokens": 4,
        "rope_rotate_half": True,
        "attn_type": "rope",
        "global_pool": "avg",
    },
    "RoPE-ViT, mixed": {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "rope_type": "mixed",
        "rope_grid_indexing": "xy",
        "rope_temperature": 10.0,
        "attn_type": "rope",
        "init_values": 0.1,
        "class_token": True,
        "img_size": (32, 48),
    },
    "mixed, by row and column": {"use_rot_pos_emb": True, "rope_type": "mixed", "qkv_fused": False},
    "EVA, no rotation": {"use_abs_pos_emb": True},
    "rectangular": {"use_rot_pos_emb": True, "img_size": (32, 48), "qk_norm": True},
}


def build_eva(name: str) -> Eva:
    torch.manual_seed(0)
    shape = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    net = Eva(**shape | EVA[name]).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.05 if parameter.dim() > 1 else 0.3, 0.1)
    return net


@pytest.mark.parametrize("name", EVA)
def test_eva_networks(name: str) -> None:
    net = build_eva(name)
    images = images_for(net)
    assert torch.equal(lean(net)(images), net(images))
    torch.testing.assert_close(lean(net, Replace())(images), net(images), rtol=0, atol=1e-12)
    features = lean(net, Drop()).features(images)
    assert features.shape == (2, 32, *net.patch_embed.grid_size)
    patches = net.patch_embed.num_patches
    assert lean(net, Drop()).tokens_per_layer()[-1] == net.num_prefix_tokens + patches // 2


@pytest.mark.parametrize("name", ["DINOv3", "RoPE-ViT, mixed"])
def test_a_dropped_patch_takes_its_rotation_with_it(name: str) -> None:
    net = build_eva(name)
    images, prefix = images_for(net), net.num_prefix_tokens
    x, rope = net._pos_embed(net.patch_embed(images))
    left = [*range(prefix), *range(prefix, x.shape[1], 2)]
    for index, block in enumerate(net.blocks):
        x = block(x, rope=rope[index] if net.rope_mixed else rope)
        if index == 1:
            x, rope = x[:, left], rope[..., ::2, :]
    restored = net.norm(x)[:, prefix:].repeat_interleave(2, 1)
    torch.testing.assert_close(lean(net, Drop()).forward_features(images)[:, prefix:], restored, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["RoPE-ViT, mixed", "mixed, by row and column"])
def test_learned_rotations_of_every_layer_and_head(name: str) -> None:
    """Merged, then dropped: the angles of every layer are its own frequencies times the mean coordinate."""
    net = build_eva(name)
    rotation = find_host(net).embed(net, images_for(net)).rotation
    assert rotation is not None
    places = torch.tensor([[[0.5, 1.75], [2.0, 0.25]], [[1.5, 3.0], [0.0, 0.0]]])  # row, column
    moved = rotation.at(places)
    taken = moved.take(torch.tensor([[1], [0]]))
    across, down = net.rope.freqs if net.rope.grid_indexing == "xy" else net.rope.freqs.flip(0)
    for layer in range(4):
        rows, columns = (places[:, None, :, axis, None] for axis in (0, 1))  # (B, 1, K, 1)
        angles = (rows * down[layer, :, None] + columns * across[layer, :, None]).repeat_interleave(2, -1)
        expected = torch.cat([angles.sin(), angles.cos()], -1)
        torch.testing.assert_close(moved.of(layer), expected, rtol=0, atol=1e-6, check_dtype=False)
        assert torch.equal(taken.of(layer)[0], moved.of(layer)[0, :, 1:])
        assert torch.equal(rotation.take(torch.tensor([[3, 0], [1, 2]])).of(layer)[1], rotation.of(layer)[:, 1:3])
    at_grid = rotation.at(rotation.coordinates.expand(2, -1, -1))
    torch.testing.assert_close(at_grid.of(3)[0], rotation.of(3), rtol=0, atol=1e-5)
    with torch.random.fork_rng():
        fast = lean(net, "tome", r=2)
        fast(images_for(net)).square().sum().backward()
    assert net.rope.freqs.grad is not None
    assert (net.rope.freqs.grad.abs().amax((0, 2, 3)) > 0).all()  # every layer's, also behind merged tokens


def test_the_rotation_between_two_patches_is_the_mean_angle() -> None:
    net = build_eva("EVA-02")
    rotation = find_host(net).embed(net, images_for(net)).rotation
    assert rotation is not None
    table = rotation.of(0)
    at_grid = rotation.at(rotation.coordinates).of(0)[0, 0]
    torch.testing.assert_close(at_grid, table, rtol=0, atol=1e-5, check_dtype=False)
    between = rotation.at(torch.tensor([[[0.5, 2.0], [1.0, 2.5]]])).of(0)[0, 0]
    sine, cosine = between.chunk(2, dim=1)
    torch.testing.assert_close(sine.square() + cosine.square(), torch.ones_like(sine), rtol=0, atol=1e-6)
    s, c = table.unflatten(0, (4, 4)).chunk(2, dim=2)
    for place, (a, b) in enumerate((((0, 2), (1, 2)), ((1, 2), (1, 3)))):
        doubled = torch.stack([s[a] * c[b] + c[a] * s[b], c[a] * c[b] - s[a] * s[b]])  # of the sum of both angles
        found = torch.stack([2 * sine[place] * cosine[place], cosine[place].square() - sine[place].square()])
        torch.testing.assert_close(found, doubled, rtol=0, atol=1e-5, check_dtype=False)


def test_rotations_that_cannot_be_continued_are_refused() -> None:
    net = build_eva("EVA-02")
    net.rope.in_pixels = True
    with pytest.raises(NotAHost, match="more than half a turn"):
        lean(net, Drop())
    mixed = build_eva("RoPE-ViT, mixed")
    mixed.rope.aug_active = True
    with pytest.raises(NotAHost, match="rope moves its coordinates at random"):
        lean(mixed, Drop())
    net.rope = nn.Identity()
    with pytest.raises(NotAHost, match=r"rope \(Identity\) rotates in a way that is not known here"):
        lean(net, Drop())


def test_torchvision_networks() -> None:
    torch.manual_seed(0)
    net = TorchvisionViT(SIDE, 8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.05 if parameter.dim() > 1 else 0.3, 0.1)
    images = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    torch.testing.assert_close(lean(net, Replace())(images), net(images), rtol=0, atol=1e-12)
    fast = lean(net, Halve())
    assert fast(images).shape == (2, 5)
    assert fast.features(images).shape == (2, 32, 4, 4)
    assert fast.tokens_per_layer() == [17, 17, 9, 9, 9]
    assert list(fast.state_dict()) == list(net.state_dict())
    assert torch.equal(copy.deepcopy(fast)(images), fast(images))
    net.encoder.layers[1].self_attention = nn.MultiheadAttention(32, 2, batch_first=False)
    with pytest.raises(NotAHost, match=r"encoder.layers.encoder_layer_1.self_attention is not a MultiheadAttention"):
        lean(net, Halve())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_live_on_their_own(way: str) -> None:
    net = build()
    images = images_for(net)
    fast = lean(net, Halve())
    if way == "deepcopy":
        other = copy.deepcopy(fast)
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(images), fast(images))
    assert type(other) is type(fast)
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight.zero_()
    assert not torch.equal(other(images), fast(images))
    assert torch.equal(other.restore()(images), other.restore()(images))
    assert next(other.restore().parameters()) is next(other.parameters())


def test_gradients_reach_the_host_s_weights() -> None:
    net = build()
    fast = lean(net, Halve())
    fast(images_for(net)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_exported_and_compiled_networks_compute_the_same() -> None:
    net = build().float()
    images = images_for(net).float()
    fast = lean(net, Halve())
    expected = fast(images)
    exported = torch.export.export(fast, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(images.repeat(2, 1, 1, 1)), expected.repeat(2, 1), rtol=0, atol=1e-5)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected, rtol=0, atol=1e-5)
    assert torch.equal(fast(images), expected)


def test_methods_are_checked_together() -> None:
    net = build()
    with pytest.raises(PlanError, match="halve at layer 1 breaks the grid that halve needs at layer 2"):
        lean(net, Halve(), Halve(layer=2, hook="before"))
    with pytest.raises(PlanError, match="replace and replace both take the place of the attention of layer 1"):
        lean(net, Replace(), Replace())


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (("tom",), {}, "there is no method 'tom', did you mean 'tome'\\?; the methods are tome, "),
        (("tome",), {"rr": 3}, "tome has no setting 'rr', did you mean 'r'\\?; it has r, prop_attn"),
        (("tome", "evit"), {"r": 3}, "settings as keywords belong to one method"),
    ],
)
def test_unknown_names_are_refused(words: tuple[str, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        lean(build(), *words, **settings)


class OwnPath(VisionTransformer):
    def forward_features(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward_features(*args, **kwargs)


class Sneaky(nn.Module):
    """Looks like an attention's projection, and does more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.1


def hooked() -> nn.Module:
    net = build()
    net.blocks[2].attn.register_forward_hook(lambda *_: None)
    return net


def checkpointing() -> nn.Module:
    net = build()
    net.set_grad_checkpointing()
    return net


def with_adapter() -> nn.Module:
    net = build()
    net.blocks[1].adapter = nn.Linear(2, 2)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(block_fn=ResPostBlock), "blocks.0 is a ResPostBlock"),
        (lambda: build(block_fn=ParallelScalingBlock), "blocks.0 is a ParallelScalingBlock"),
        (lambda: OwnPath(**TINY), "OwnPath has a forward_features of its own"),
        (hooked, "blocks.2.attn has hooks"),
        (checkpointing, "gradient checkpointing is on"),
        (with_adapter, "blocks.1.adapter is a part that Block has not"),
        (lambda: build(patch_drop_rate=0.5), "patch_drop"),
        (lambda: nn.Linear(2, 2), "torch.nn.modules.linear.Linear is not a host"),
        (lambda: timm.create_model("test_vit3"), None),
        (lambda: lean(build(), Halve()), "has token methods already"),
    ],
)
def test_what_cannot_be_shown_rightly_is_refused_by_name(make: Any, message: str | None) -> None:
    if message is None:
        lean(make().eval(), Halve(layer=0, hook="after", proportional=True))
        return
    with pytest.raises(NotAHost, match=message):
        lean(make(), Halve())


def test_a_host_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.hosts.timm_vit import TimmBlock

    monkeypatch.setattr(TimmBlock, "mlp", lambda self, x: 1.001 * self.module.mlp(self.module.norm2(x)))
    with pytest.raises(NotAHost, match="the outputs differ by"):
        lean(build("plain", init_values=None), Halve())


def test_stochastic_parts_of_training_are_honoured() -> None:
    net = build("plain", drop_path_rate=0.5, attn_drop_rate=0.2, proj_drop_rate=0.1)
    images = images_for(net)
    fast = lean(net, Halve()).train()
    torch.manual_seed(0)
    first = fast(images)
    torch.manual_seed(0)
    assert torch.equal(fast(images), first)
    assert not torch.equal(fast(images), first)


def test_an_image_does_not_depend_on_the_others() -> None:
    net = build()
    images = images_for(net, 3)
    fast = lean(net, Halve())
    expected = fast(images)
    torch.testing.assert_close(fast(images[1:2]), expected[1:2], rtol=0, atol=1e-12)
    images[0] = torch.nan
    torch.testing.assert_close(fast(images)[1:], expected[1:], rtol=0, atol=1e-12)


def test_explain_tells_what_is_possible() -> None:
    answers = explain(build())
    assert set(answers) >= {"tome", "hourglass", "evit"}
    assert "must be learned" in answers.pop("slim")
    assert all(answer.startswith("possible: ") for answer in answers.values())


def test_the_documented_module(tmp_path: Path) -> None:
    """As typed in a folder that is not the checkout, with the checkout on the path."""
    code = "import leanvit; print(leanvit.lean.__name__, leanvit.ToMe(r=16).r, hasattr(leanvit, 'Nothing'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lean", "16", "False"]


def test_every_family_of_timm_is_a_host_or_refused_by_name() -> None:
    """One network of each family, and the page in the docs says the same of it."""
    page = families.PAGE.read_text(encoding="utf-8")
    chosen = families.one_of_each(families.names())
    assert len(chosen) > 60
    for name in chosen:
        good, why = families.verdict(name)
        assert good or why, name
        row = f"| `{families.module_of(name)}` | {'yes' if good else 'no'} | {why} |"
        assert row in page, f"{name}: {row} is not in docs/hosts.md; python -m common.hosts.families renders it"


class Adapter(nn.Module):
    """A projection with something of its own."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.extra = inner, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.extra


def test_what_wraps_a_projection_is_called() -> None:
    for net in (build(), build_eva("DINOv3")):
        for block in net.blocks:
            block.attn.qkv = Adapter(block.attn.qkv)
        fast, images = lean(net, Replace()), images_for(net)
        before = fast(images)
        with torch.no_grad():
            for block in net.blocks:
                block.attn.qkv.extra += 1.0
        assert not torch.allclose(fast(images), before)
        torch.testing.assert_close(fast(images), net(images), rtol=0, atol=1e-12)


def test_rotation_at_another_size_under_autocast_and_compiled() -> None:
    EVA["dynamic"] = {**EVA["DINOv3"], "dynamic_img_size": True, "img_size": 64}
    net = build_eva("dynamic").float()
    del EVA["dynamic"]
    images = torch.randn(2, 3, 48, 80)
    fast = lean(net, Halve(layer=3, hook="after"))
    with torch.autocast("cpu", torch.bfloat16):
        assert lean(net, Drop())(images).isfinite().all()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), fast(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["blocks", "blocks.1", "blocks.1.attn"])
def test_a_hook_put_on_an_opened_module_later_is_refused(where: str) -> None:
    """It would be silent; one on a block that runs as it is, is called."""
    net, calls = build(), []
    batch = images_for(net)
    fast = lean(net, Halve(layer=1, proportional=False))
    expected = fast(batch)
    module = net.get_submodule(where)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *_: None)
        for call in (fast, fast.features, fast.forward_features, fast.run):
            with pytest.raises(NotAHost, match=f"^{where} has hooks, which would not be called: remove them first"):
                call(batch)
        handle.remove()
    module.forward = lambda *_: None
    with pytest.raises(NotAHost, match=f"^{where} has a forward of its own"):
        fast(batch)
    del module.forward
    net.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(fast(batch), expected)
    assert calls == [1]


def test_other_channels_and_a_host_that_changes() -> None:
    net = build(in_chans=1)
    assert lean(net, Halve()).gmacs() < lean(net).gmacs()
    for call in ("set_input_size", "prune_intermediate_layers", "set_grad_checkpointing"):
        with pytest.raises(ValueError, match="call lean on it again"):
            getattr(lean(net, Halve()), call)(1)


def test_a_lean_network_has_hooks_of_its_own() -> None:
    net = build()
    fast = lean(net, Halve())
    fast.register_forward_hook(lambda *_: None)
    assert not net._forward_hooks
    fast.train()
    assert fast.restore() is net
    assert net.training


def test_a_head_of_zeros_does_not_hide_what_the_blocks_compute() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(super().forward(x))

    net = TorchvisionViT(32, 8, 2, 2, 32, 64, num_classes=5).eval()
    assert not net.heads.head.weight.any()
    assert lean(net)(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    net.encoder.layers.__class__ = Twice
    with pytest.raises(NotAHost, match="computes something else than its blocks say"):
        lean(net)
