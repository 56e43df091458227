"""A lean network in a file: the same numbers again from every library, and one clear error for what is not right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer as TorchvisionViT

import leanvit
from common.hosts.files import KEY
from common.hosts.network import METHODS, make_method
from common.run.errors import CheckpointError, LaunchError, UsageError
from common.tests.small_methods import Halve
from hourglass_swag.models import create

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def of_transformers(name: str, config: str, *, bare: bool = False, **values: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="pip install -e .[huggingface]")
    options = {"add_pooling_layer": False} if bare else {}
    return getattr(transformers, name)(getattr(transformers, config)(**SHAPE, **values), **options)


def resized() -> nn.Module:
    net: Any = timm.create_model("vit_tiny_patch16_224", **SMALL | {"img_size": 64})
    net.set_input_size(img_size=32)
    net.reset_classifier(3)
    return net


def with_a_new_head() -> nn.Module:
    net: Any = timm.create_model("vit_tiny_patch16_224", **SMALL)
    net.head = nn.Linear(32, 7)
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True, drop_path_rate=0.1),
    "timm, called by its function": lambda: timm.models.vit_tiny_patch16_224(img_size=48, num_classes=5),  # pyright: ignore
    "timm, changed": resized,
    "timm, a new head": with_a_new_head,
    "timm, no class token": lambda: timm.create_model("vit_base_patch16_siglip_224", **SMALL | {"num_classes": 0}),
    "timm, distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL),
    "timm, rotation": lambda: timm.create_model("vit_small_patch16_dinov3", **SMALL),
    "torchvision": lambda: TorchvisionViT(32, 8, 4, 2, 32, 64, num_classes=5, dropout=0.1),
    "transformers": lambda: of_transformers("ViTForImageClassification", "ViTConfig", num_labels=5),
    "transformers, bare": lambda: of_transformers("ViTModel", "ViTConfig", bare=True),
    "transformers, rotation": lambda: of_transformers("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2),
    "SWAG": lambda: create("vit_desk"),
}


def build(name: str = "timm", *methods: Any) -> Any:
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.05 if parameter.dim() > 1 else 0.3, 0.1)
    return leanvit.lean(net, *(methods or (leanvit.Hourglass(layer=1, clusters=(3, 3)), leanvit.ToMe(r=[0, 0, 2, 1]))))


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 32, 32), generator=torch.Generator().manual_seed(1))


def outputs(fast: Any, *shape: int) -> list[Tensor]:
    torch.manual_seed(2)  # ACT and SMYRF draw
    shape = shape or (2, 3, *fast.plan.host.facts.image_size)
    with torch.no_grad():
        return [*tree_leaves(fast(images(*shape))), fast.features(images(*shape))]


def assert_same(fast: Any, other: Any, *shape: int) -> None:
    for one, two in zip(outputs(fast, *shape), outputs(other, *shape), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_numbers_and_the_same_network_again(name: str, tmp_path: Path) -> None:
    fast = build(name)
    path = leanvit.save(fast, tmp_path / "fast")
    assert path == tmp_path / "fast.safetensors"
    assert list(tmp_path.iterdir()) == [path]
    before = torch.get_rng_state()
    again = leanvit.load(path)
    assert torch.equal(torch.get_rng_state(), before)  # building one draws no number of others
    assert type(again) is type(fast)
    assert again.methods == fast.methods
    assert not again.training
    assert_same(fast, again)
    assert list(again.restore().state_dict()) == list(fast.restore().state_dict())
    if name == "timm":
        assert_same(fast, again, 1, 3, 48, 40)
        assert again.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
        data = timm.data.resolve_model_data_config  # pyright: ignore[reportAttributeAccessIssue]
        assert data(again) == data(fast)


@pytest.mark.parametrize("method", [*METHODS, "evit, settings", "tome, a schedule"])
def test_every_method_with_its_settings(method: str, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "evit, settings": {"keep": (0.9, 0.6), "layers": (1, 2), "fuse": True, "restore": "frozen"},
        "tome, a schedule": {"r": (2, -1.0), "prop_attn": False},
    }
    fast = build("timm", make_method(method.partition(",")[0], settings.get(method, {})))
    assert_same(fast, leanvit.load(leanvit.save(fast, tmp_path / "fast")))


def test_precision_and_trained_weights(tmp_path: Path) -> None:
    """What is written are the weights of the lean network as they are now."""
    fast = build().double()
    fast.reset_classifier(4)
    nn.init.normal_(fast.head.weight)
    again = leanvit.load(leanvit.save(fast, tmp_path / "fast"))
    assert again.head.weight.dtype == torch.float64
    assert torch.equal(again(images().double()), fast(images().double()))
    half = build().bfloat16()
    again = leanvit.load(leanvit.save(half, tmp_path / "half"))
    assert torch.equal(again(images().bfloat16()), half(images().bfloat16()))


def test_a_network_made_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast = leanvit.lean(VisionTransformer(**SMALL).eval(), "tome", r=2)
    path = leanvit.save(fast, tmp_path / "fast")
    assert "it was not made by timm.create_model" in caplog.text
    assert "network=net" in caplog.text
    with pytest.raises(CheckpointError, match=r"fast\.safetensors: source: how the timm.*network=net"):
        leanvit.load(path)
    assert_same(fast, leanvit.load(path, network=VisionTransformer(**SMALL)))
    other = VisionTransformer(**SMALL | {"num_heads": 4})  # whose weights have the same shapes
    with pytest.raises(CheckpointError, match=r"fast\.safetensors: facts\.heads: .* 2, .* 4"):
        leanvit.load(path, network=other)
    with pytest.raises(CheckpointError, match=r"fast\.safetensors.*does not fit(.|\n)*missing(.|\n)*blocks\.4"):
        leanvit.load(path, network=VisionTransformer(**SMALL | {"depth": 5}))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda net: setattr(net.blocks[2].norm1, "eps", 1e-3), "built otherwise: blocks.2.norm1.eps is 0.001"),
        (lambda net: setattr(net.blocks[1].mlp, "act", nn.ReLU()), "built otherwise: blocks.1.mlp.act is a ReLU"),
        (lambda net: net.blocks.append(net.blocks[0]), "built otherwise"),
        (lambda net: net._model_args.update(norm_layer=nn.LayerNorm), "cannot be built with its arguments"),
    ],
)
def test_what_was_changed_behind_the_constructor_counts_as_made_by_hand(
    change: Callable[[Any], Any], found: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net: Any = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    change(net)
    path = leanvit.save(leanvit.lean(net, "tome", r=1), tmp_path / "fast")
    assert found in caplog.text
    with pytest.raises(CheckpointError, match="network=net"):
        leanvit.load(path)


def test_what_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a network of leanvit\.lean, got a Linear"):
        leanvit.save(nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(UsageError, match="Halve is none of the methods"):
        leanvit.save(build("timm", Halve()), tmp_path / "x")
    with pytest.raises(UsageError, match=r"a published network.*leanvit\.lean"):
        leanvit.save(create("tome_vit_desk", tome_r=2), tmp_path / "x")
    broken = build()
    broken.head.bias.data[1] = torch.nan
    with pytest.raises(CheckpointError, match=r"head\.bias holds a value that is not finite"):
        leanvit.save(broken, tmp_path / "x")
    mixed = build()
    mixed.head.bfloat16()
    with pytest.raises(CheckpointError, match=r"head\.weight is torch\.bfloat16, expected torch\.float32"):
        leanvit.save(mixed, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leanvit.save(build(), tmp_path_factory.mktemp("file") / "fast")


def rewrite(
    source: Path, path: Path, header: Callable[[dict], Any] = dict, weights: Callable[[dict], Any] = dict
) -> Path:
    """A copy of a file with its header or weights changed in place."""
    with safe_open(source, "pt") as file:
        content = json.loads(file.metadata()[KEY])
    state = load_file(source)
    header(content)
    weights(state)
    save_file(state, path, metadata={KEY: json.dumps(content)})
    return path


HEADERS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "format": (lambda c: c.update(format="leanvit lean network 2"), "format: expected 'leanvit lean network 1'"),
    "a key more": (lambda c: c.update(extra=1), "extra is not known"),
    "a key less": (lambda c: c.pop("methods"), "methods: expected a list, got None"),
    "precision": (lambda c: c.update(dtype="float8"), "dtype: expected one of float64, .* got 'float8'"),
    "other precision": (lambda c: c.update(dtype="float16"), r"is torch\.float32, expected torch\.float16"),
    "library": (lambda c: c["source"].update(library="os"), r"source\.library: expected one of timm.* got 'os'"),
    "kind of library": (lambda c: c["source"].update(library=[]), r"source\.library: expected one of timm.* got \[\]"),
    "name": (lambda c: c["source"].update(name="no_vit"), "source: timm's no_vit cannot be built: .*no network"),
    "hub": (lambda c: c["source"].update(name="hf-hub:a/b"), "cannot be built: .*no network 'hf-hub:a/b'"),
    "pretrained": (lambda c: c["source"]["arguments"].update(pretrained=True), "pretrained is no argument"),
    "argument": (lambda c: c["source"]["arguments"].update(deep=1), "source: timm's .* cannot be built: .*deep"),
    "source": (lambda c: c["source"].update(more=1), r"source\.more is not known"),
    "heads": (lambda c: c["source"]["arguments"].update(num_heads=4), r"facts\.heads: .* 2, .* 4"),
    "depth": (lambda c: c["source"]["arguments"].update(depth=3), r"does not fit(.|\n)*unexpected(.|\n)*blocks\.3\."),
    "depth without end": (lambda c: c["source"]["arguments"].update(depth=10**9), "1000000000 is larger than"),
    "large depth": (lambda c: c["source"]["arguments"].update(depth=10**5), "describes a network that is far larger"),
    "fact": (lambda c: c["facts"].update(legs=2), r"facts\.legs is not known"),
    "fact less": (lambda c: c["facts"].pop("width"), r"facts\.width: the file was written of None"),
    "method": (lambda c: c["methods"][1].update(name="tom"), r"methods\[1\]: there is no method 'tom'"),
    "setting": (lambda c: c["methods"][1]["settings"].update(q="1"), r"methods\[1\]: tome has no setting 'q'"),
    "value": (lambda c: c["methods"][1]["settings"].update(r="exit()"), r"methods\[1\]: malformed node"),
    "wrong value": (lambda c: c["methods"][0]["settings"].update(layer="9"), "hourglass: layer must be a layer, 0"),
    "method's key": (lambda c: c["methods"][0].update(on=True), r"methods\[0\]\.on is not known"),
    "no method": (lambda c: c["methods"].append("tome"), r"methods\[2\]: expected a name and settings"),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_a_changed_header_is_named(what: str, written: Path, tmp_path: Path) -> None:
    change, message = HEADERS[what]
    path = rewrite(written, tmp_path / "changed.safetensors", header=change)
    with pytest.raises(CheckpointError, match=rf"changed\.safetensors(.|\n)*{message}"):
        leanvit.load(path)


WEIGHTS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "NaN": (lambda s: s["blocks.1.attn.qkv.bias"].fill_(torch.nan), r"blocks\.1\.attn\.qkv\.bias holds a value"),
    "precision": (lambda s: s.update(cls_token=s["cls_token"].half()), r"cls_token is torch\.float16, expected"),
    "name": (lambda s: s.update(tail=s.pop("head.bias")), r"does not fit(.|\n)*head\.bias(.|\n)*tail"),
    "shape": (lambda s: s.update(cls_token=torch.zeros(1, 1, 16)), r"different shape(.|\n)*cls_token"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_changed_weights_are_named(what: str, written: Path, tmp_path: Path) -> None:
    change, message = WEIGHTS[what]
    path = rewrite(written, tmp_path / "changed.safetensors", weights=change)
    with pytest.raises(CheckpointError, match=rf"changed\.safetensors(.|\n)*{message}"):
        leanvit.load(path)


def test_other_versions_are_told_where_something_does_not_fit(written: Path, tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["versions"] |= {"timm": "0.9", "": "1"}

    other = rewrite(written, tmp_path / "other.safetensors", header=change)
    assert_same(leanvit.load(other), leanvit.load(written))
    broken = rewrite(other, tmp_path / "broken.safetensors", weights=lambda state: state.pop("head.bias"))
    with pytest.raises(CheckpointError, match=r"\(written with timm 0\.9, here is 1\..*;  1, here is none\)"):
        leanvit.load(broken)


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        leanvit.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"plain\.safetensors: its header has no 'leanvit'"):
        leanvit.load(tmp_path / "plain.safetensors")
    torch.save(build(), tmp_path / "pickled.pth")
    with pytest.raises(CheckpointError, match=r"pickled\.pth: cannot be read as safetensors"):
        leanvit.load(tmp_path / "pickled.pth")


def test_a_class_of_transformers_that_is_not_on_the_list(tmp_path: Path) -> None:
    path = leanvit.save(build("transformers"), tmp_path / "fast")
    changes: list[tuple[Callable[[dict], Any], str]] = [
        (lambda c: c["source"].update(name="BertModel"), "'BertModel' is none of the classes"),
        (lambda c: c["source"]["arguments"].update(attention="someone/kernel"), "attention must be sdpa or eager"),
        (
            lambda c: c["source"]["arguments"]["config"].update(_attn_implementation="someone/kernel"),
            "must be sdpa or eager",
        ),
        (lambda c: c["source"]["arguments"]["options"].update(more=1), "options.more is not known"),
        (lambda c: c["source"]["arguments"].pop("config"), "cannot be built: no 'config'"),
    ]
    for change, message in changes:
        with pytest.raises(CheckpointError, match=message):
            leanvit.load(rewrite(path, tmp_path / "changed.safetensors", header=change))


def test_what_a_file_is_opened_with_is_checked(written: Path) -> None:
    with pytest.raises(UsageError, match=r"network: expected a network \(torch\.nn\.Module\), got 'test_vit'"):
        leanvit.load(written, network="test_vit")
    with pytest.raises(LaunchError, match="must be auto, cpu, cuda or cuda:N, got 'cdua'"):
        leanvit.load(written, device="cdua")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leanvit.save(build(), tmp_path / "fast")
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        leanvit.save(build("timm", leanvit.EViT()), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("key", ["weights", "pretrained"])
def test_a_network_of_swag_takes_no_weights_from_elsewhere(key: str, tmp_path: Path) -> None:
    path = leanvit.save(build("SWAG"), tmp_path / "fast")
    changed = rewrite(
        path, tmp_path / "changed.safetensors", lambda c: c["source"]["arguments"].update({key: str(path)})
    )
    with pytest.raises(CheckpointError, match=f"cannot be built: {key} is no argument of an architecture"):
        leanvit.load(changed)
