"""Checkpoints: both layouts of the published weights, another resolution, and files that do not fit."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from common.run.checkpoint import CheckpointError
from common.tests.reference import array, build, fill_, image
from hourglass_swag import models
from hourglass_swag.models import weights
from hourglass_swag.models.vision_transformer import SIZES, Size, VisionTransformer
from hourglass_swag.tests.counting import make

VECTORS = Path(__file__).parent / "vectors"
TINY = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}


def tiny(seed: int = 1, **options) -> VisionTransformer:
    return build(VisionTransformer, seed, dtype=torch.float32, **(TINY | {"num_classes": 4} | options))  # pyright: ignore[reportReturnType]


@pytest.fixture
def tiny_registry(monkeypatch, tmp_path):
    """A registered network small enough to have its weights in a temporary torch.hub cache, and nothing to download."""
    shape = {key: value for key, value in TINY.items() if key != "image_size"}
    monkeypatch.setitem(SIZES, "l16", Size(**shape))
    small = models.Entry("l16", "vit_l16_in1k.torch", 4, defaults={"image_size": 32})
    monkeypatch.setitem(models.REGISTRY, "vit_l16_in1k", small)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "SWAG_FOLDER", f"file://{tmp_path}/server/")
    (tmp_path / "server").mkdir()
    (tmp_path / "home" / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path


def old_spelling(state: dict) -> dict:
    """torchvision's MLP names of before its version 0.13, in which the SWAG files were written."""
    return {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
        for key, value in state.items()
    }


@pytest.mark.parametrize("size", ["b16", "l16", "h14"])
@pytest.mark.parametrize("spelling", [dict, old_spelling])
def test_torchvision_names(size, spelling):
    keymap = json.loads((VECTORS / f"torchvision_keymap_vit_{size}.json").read_text())["map"]
    theirs = spelling({name: torch.empty(1, 9, 4, device="meta") for name in keymap.values()})
    ours = weights.convert_torchvision(theirs)
    assert list(ours) == list(keymap)
    assert ours["encoder.pos_embedding"].shape == (9, 1, 4)
    with torch.device("meta"):
        own = VisionTransformer(SIZES[size].patch_size, **SIZES[size].kwargs(), num_classes=1000)
    assert list(own.state_dict()) == list(keymap)


@pytest.mark.parametrize("spelling", [dict, old_spelling])
def test_torchvision_network_gives_the_same_logits(spelling):
    theirs = torchvision.models.VisionTransformer(
        **TINY,
        num_classes=4,  # pyright: ignore[reportArgumentType]
    )
    fill_(theirs.double().eval(), 5)
    ours = VisionTransformer(**TINY, num_classes=4).double().eval()
    report = ours.load_state_dict(spelling(theirs.state_dict()))
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(ours(image(2, 32)), theirs(image(2, 32)))


def test_resize_keeps_the_corners_the_class_token_and_the_file():
    state = tiny().state_dict()
    before = {key: value.clone() for key, value in state.items()}
    larger = VisionTransformer(**(TINY | {"image_size": 56}), num_classes=4)
    larger.load_state_dict(state)
    old, new = state["encoder.pos_embedding"][:, 0], larger.encoder.pos_embedding[:, 0]
    assert torch.equal(new[0], old[0])
    for ours, theirs in ((1, 1), (7, 4), (43, 13), (49, 16)):
        torch.testing.assert_close(new[ours], old[theirs])
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_what_no_resize_can_mend():
    model = tiny()
    state = model.state_dict()
    with pytest.raises(KeyError, match=r"encoder\.pos_embedding is missing: not a ViT checkpoint"):
        model.load_state_dict({"fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"must have shape \(N, 1, 16\), got \(17, 1, 8\)"):
        model.load_state_dict(state | {"encoder.pos_embedding": torch.zeros(17, 1, 8)})
    with pytest.raises(ValueError, match="of 15 patches cannot become one of 16"):
        model.load_state_dict(state | {"encoder.pos_embedding": torch.zeros(16, 1, 16)})
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*layer_1.ln_2.bias"):
        model.load_state_dict({key: value for key, value in state.items() if "layer_1.ln_2.bias" not in key})


@pytest.mark.parametrize("wrapped", ["flat", "model", "torchvision"])
def test_a_file_of_any_layout(tmp_path, wrapped):
    source = tiny()
    state = dict(source.state_dict())
    if wrapped == "torchvision":
        state = {
            key.replace("layer_", "encoder_layer_").replace("head.layers.", "heads."): value
            for key, value in state.items()
        }
        state["encoder.pos_embedding"] = state["encoder.pos_embedding"].transpose(0, 1)
    torch.save({"model": state, "epoch": 3} if wrapped == "model" else state, tmp_path / "file.torch")
    with torch.device("meta"):
        model = make("hourglass_vit", **TINY, num_classes=4, clustering_location=-1).eval()
    weights.load_weights(model, tmp_path / "file.torch")
    with torch.no_grad():
        torch.testing.assert_close(model(image(2, 32).float()), source(image(2, 32).float()))


def test_half_precision_files_give_float32_networks(tmp_path):
    torch.save({key: value.half() for key, value in tiny().state_dict().items()}, tmp_path / "half.torch")
    model = tiny(seed=2)
    weights.load_weights(model, tmp_path / "half.torch")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_difference_is_listed(tmp_path):
    state = tiny(num_classes=7).state_dict()
    del state["encoder.ln.bias"]
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "other.torch")
    with pytest.raises(CheckpointError) as caught:
        weights.load_weights(tiny(), tmp_path / "other.torch")
    for part in ("other.torch", "encoder.ln.bias", "extra", "head.layers.head.weight", "[4, 16]", "[7, 16]"):
        assert part in str(caught.value)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "regnet.torch")
    with pytest.raises(CheckpointError, match=r"regnet.torch does not fit VisionTransformer: .*not a ViT checkpoint"):
        weights.load_weights(tiny(), tmp_path / "regnet.torch")


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda value: value.to(torch.int64), "kind of numbers \\(1\\):\n  class_token: model float32, file int64"),
        (lambda value: value.to(torch.complex64), "no weights: class_token \\(complex64\\)"),
        (lambda value: value.to_sparse(), "no weights: class_token \\(sparse_coo\\)"),
        (lambda value: value.to("meta"), "no weights: class_token \\(without data\\)"),
        (lambda value: value / 0, "no weights: class_token \\(not finite\\)"),
    ],
)
def test_tensors_that_are_no_weights_are_named(tmp_path, change, finding):
    state = tiny().state_dict()
    state["class_token"] = change(state["class_token"])
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth [^$]*{finding}"):
        weights.load_weights(tiny(2), tmp_path / "odd.pth")


def test_published_file_is_fetched_once_and_weights_win(tiny_registry):
    served = tiny_registry / "server" / "vit_l16_in1k.torch"
    torch.save(tiny(seed=1).state_dict(), served)
    first = models.vit_l16_in1k()
    served.unlink()
    again = models.vit_l16_in1k(image_size=48)  # from the cache, resized
    assert torch.equal(first.class_token, again.class_token)
    assert again.encoder.pos_embedding.shape[0] == 37
    torch.save(tiny(seed=2).state_dict(), tiny_registry / "mine.torch")
    mine = models.vit_l16_in1k(weights=tiny_registry / "mine.torch")
    expected = torch.from_numpy(array("class_token", (1, 1, 16), 2) / 2).float()
    torch.testing.assert_close(mine.class_token.detach(), expected)


def test_a_cached_file_of_torchvision_serves_and_is_checked(tiny_registry):
    cached = tiny_registry / "home" / "hub" / "checkpoints" / weights.TORCHVISION_FILES["vit_l16_in1k.torch"]
    torch.save(tiny().state_dict(), cached)
    with pytest.raises(CheckpointError, match="SHA-256 does not begin with 4f3808c9"):
        models.vit_l16_in1k()


def test_without_a_connection_the_message_says_which_file_where_and_which_flag(tiny_registry):
    with pytest.raises(CheckpointError) as caught:
        models.vit_l16_in1k()
    text = str(caught.value)
    for part in ("vit_l16_in1k.torch", "server", "--weights FILE", "--no-pretrained", "vit_l_16_swag-4f3808c9.pth"):
        assert part in text
    assert str(tiny_registry / "home" / "hub" / "checkpoints") in text


def test_networks_without_published_weights_say_so(tmp_path):
    with pytest.raises(
        CheckpointError, match="vit_desk has no published weights; train it and name them with --weights"
    ):
        models.FACTORIES["vit_desk"]()
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "nowhere.torch"))):
        models.create("vit_desk", weights=tmp_path / "nowhere.torch")


def test_arguments_are_checked_before_any_download(tiny_registry):
    with pytest.raises(TypeError, match="fuse"):
        models.vit_l16_in1k(fuse=True)


def test_loading_leaves_nothing_on_the_meta_device(tmp_path):
    stem = [(3, 2, 6), (3, 4, 8)]
    source = build(VisionTransformer, 3, dtype=torch.float32, **TINY, conv_stem_layers=stem)
    torch.save(source.state_dict(), tmp_path / "stem.torch")
    with torch.device("meta"):
        model = VisionTransformer(**TINY, conv_stem_layers=stem)
    weights.load_weights(model, tmp_path / "stem.torch")
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert isinstance(model.conv_proj, nn.Sequential)
