"""Networks of transformers as hosts: random weights, no network. What code for the host does keeps working."""

import copy
import inspect
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.hosts import Lean, NotAHost, PlanError, lean
from common.hosts.network import find_host
from common.run.files import ROOT
from common.tests.small_methods import Drop, Halve, Replace

transformers = pytest.importorskip("transformers", reason="pip install -e .[huggingface]")

SIDE = 32
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
MLP = {"intermediate_size": 64}
LABELS = {"num_labels": 5}
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    # class: configuration, its values, prefix tokens
    "ViTModel": ("ViTConfig", {**SHAPE, **MLP}, 1),
    "ViTForImageClassification": ("ViTConfig", {**SHAPE, **MLP, **LABELS}, 1),
    "ViTForMaskedImageModeling": ("ViTConfig", {**SHAPE, **MLP, "encoder_stride": 8}, 1),
    "DeiTModel": ("DeiTConfig", {**SHAPE, **MLP}, 2),
    "DeiTForImageClassification": ("DeiTConfig", {**SHAPE, **MLP, **LABELS}, 2),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", {**SHAPE, **MLP, **LABELS}, 2),
    "Dinov2Model": ("Dinov2Config", {**SHAPE, "use_swiglu_ffn": True}, 1),
    "Dinov2ForImageClassification": ("Dinov2Config", {**SHAPE, **LABELS}, 1),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {**SHAPE, "num_register_tokens": 3}, 4),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegistersConfig", {**SHAPE, **LABELS}, 5),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {**SHAPE, **MLP, "num_register_tokens": 3, "use_gated_mlp": True}, 4),
    "CLIPVisionModel": ("CLIPVisionConfig", {**SHAPE, **MLP}, 1),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {**SHAPE, **MLP, "projection_dim": 16}, 1),
    "CLIPForImageClassification": ("CLIPConfig", {"vision_config": {**SHAPE, **MLP}, **LABELS}, 1),
    "SiglipVisionModel": ("SiglipVisionConfig", {**SHAPE, **MLP}, 0),
    "SiglipForImageClassification": ("SiglipConfig", {"vision_config": {**SHAPE, **MLP}, **LABELS}, 0),
}
FAMILIES = [name for name in NETWORKS if name.endswith("Model") and not name.startswith("SiglipText")]


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    config, values, _ = NETWORKS[name]
    net = getattr(transformers, name)(getattr(transformers, config)(**values | options)).to(dtype).eval()
    for parameter in net.parameters():  # away from zeros and ones, so that no part of it is invisible
        nn.init.normal_(parameter, 0.05 if parameter.dim() > 1 else 0.3, 0.1)
    return net


def images(rows: int = SIDE, columns: int = SIDE, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, rows, columns, dtype=dtype)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Of the same class, with the same keys and values."""
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_reduced_is_the_network(name: str, dtype: torch.dtype, tolerance: float) -> None:
    net, batch = build(name, dtype), images(dtype=dtype)
    assert_same(lean(net)(batch), net(batch), tolerance)
    assert_same(lean(net, Replace())(pixel_values=batch), net(pixel_values=batch), tolerance)


REDUCE = ("tome", "hourglass", "evit", "ats")
CARRY = ("evo_vit", "act", "smyrf")
"""Methods at whose end there are all tokens."""
RANK = ("evo_vit", "ats")
"""Methods that need a class token."""


def seeded(call: Any, *args: Any) -> Any:
    """Methods that hash draw projections in every pass."""
    torch.manual_seed(2)
    return call(*args)


@pytest.mark.parametrize("method", [*REDUCE, *CARRY])
@pytest.mark.parametrize("name", NETWORKS)
def test_methods_run_on_every_network(name: str, method: str) -> None:
    net, batch, prefix = build(name), images(), NETWORKS[name][2]
    if prefix == 0 and method in RANK:
        with pytest.raises(PlanError, match=f"{method} needs a class token, which transformers' {name} has not"):
            lean(net, method)
        return
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fast = lean(net, method)
    lengths = fast.tokens_per_layer(batch)
    assert lengths[0] <= prefix + 16
    assert lengths[-1] == prefix + 16 if method in CARRY else prefix < lengths[-1] < prefix + 16
    output, dense = seeded(fast, batch), net(batch)
    assert {key: value.shape for key, value in output.items()} == {key: value.shape for key, value in dense.items()}
    assert not any(torch.equal(output[key], dense[key]) for key in dense if dense[key] is not None)
    features = seeded(fast.features, batch)
    assert features.shape == (2, 32, 4, 4)
    if "last_hidden_state" in output:
        patches = output.last_hidden_state[:, prefix:].mT.unflatten(2, (4, 4))
        torch.testing.assert_close(features, patches, rtol=0, atol=1e-12)
    assert fast.restore() is net
    assert list(fast.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        seeded(fast, batch[:1])
    found = seeded(fast.gmacs, batch[:1] if fast.depends_on_data else None)
    assert round(found * 1e9) == counter.get_total_flops() // 2  # torch's counter, two per multiply-accumulate


@pytest.mark.parametrize("name", FAMILIES)
def test_other_sizes(name: str) -> None:
    """Larger and not square; without a word about positions the host refuses, and so does the lean network."""
    net = build(name)
    batch = images(48, 40)
    interpolates = "interpolate_pos_encoding" in inspect.signature(net.forward).parameters
    options = {"interpolate_pos_encoding": True} if interpolates else {}
    assert_same(lean(net, Replace())(batch, **options), net(batch, **options))
    for method in (*REDUCE, *CARRY):
        if method in RANK and NETWORKS[name][2] == 0:
            continue
        fast = lean(net, method)
        assert fast(batch, **options).last_hidden_state.shape == net(batch, **options).last_hidden_state.shape
        assert fast.features(batch).shape == (2, 32, 6, 5)
    if interpolates:
        with pytest.raises((ValueError, RuntimeError), match="size"):
            lean(net)(batch)


@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification", "Dinov2Model", "SiglipVisionModel"])
def test_tuples(name: str) -> None:
    net, batch = build(name), images()
    found, expected = lean(net, Replace())(batch, return_dict=False), net(batch, return_dict=False)
    assert type(found) is tuple
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_tuples_asked_for_by_the_configuration() -> None:
    net = build("ViTModel")
    net.config.return_dict = False  # transformers' own heads fail then
    assert type(lean(net, Halve())(images())) is type(net(images())) is tuple


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.endswith("ImageClassification")])
def test_losses_and_gradients(name: str) -> None:
    net, batch, labels = build(name), images(), torch.tensor([1, 3])
    assert_same(lean(net, Replace())(batch, labels=labels), net(batch, labels=labels))
    fast = lean(net, Halve())
    fast(batch, labels=labels).loss.backward()
    missing = {key for key, parameter in net.named_parameters() if parameter.grad is None}
    assert all(key.endswith("mask_token") or ".head." in key or "post_layernorm" in key for key in missing), missing


@pytest.mark.parametrize("name", ["ViTForMaskedImageModeling", "Dinov2Model", "DINOv3ViTModel"])
def test_masked_patches(name: str) -> None:
    net, mask = build(name), torch.arange(32).reshape(2, 16) % 3 == 0
    assert_same(lean(net, Replace())(images(), bool_masked_pos=mask), net(images(), bool_masked_pos=mask))
    by_position = lean(net, Replace())(images(), mask)
    assert_same(by_position, net(images(), mask))


def test_a_network_without_a_pooler() -> None:
    torch.manual_seed(0)
    net = transformers.ViTModel(transformers.ViTConfig(**SHAPE, **MLP), add_pooling_layer=False).double().eval()
    assert_same(lean(net, Replace())(images()), net(images()))
    net = build("SiglipVisionModel", vision_use_head=False)
    assert_same(lean(net, Replace())(images()), net(images()))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"output_hidden_states": True}, "output_hidden_states: features between the blocks are not restored"),
        ({"output_attentions": True}, "output_attentions: methods change"),
        ({"attention_mask": torch.ones(2, 17)}, "attention_mask: a mask does not go"),
        ({"pixel_values": None}, "pixel_values are missing"),
    ],
)
@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification", "Dinov2ForImageClassification"])
def test_what_a_plan_cannot_give_is_refused(name: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lean(build(name), Halve())(**{"pixel_values": images(), **asked})


def test_hidden_states_asked_for_by_the_configuration_are_refused() -> None:
    net = build("CLIPVisionModel")
    fast = lean(net, Halve())
    net.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states"):
        fast(images())
    with pytest.raises(ValueError, match="the batch is empty"):
        fast(images()[:0], output_hidden_states=False)


def test_recording_hidden_states_of_the_dense_network_before_and_after() -> None:
    net = build("Dinov2ForImageClassification")
    expected = net(images(), output_hidden_states=True).hidden_states
    fast = lean(net, Halve())
    fast(images())
    found = fast.restore()(images(), output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 5
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class OwnForward:
    """A trunk whose forward does something else."""

    def __new__(cls) -> Any:
        class Other(transformers.ViTModel):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        return Other(transformers.ViTConfig(**SHAPE, **MLP))


def hooked() -> Any:
    net = build("ViTForImageClassification")
    net.vit.layers[2].attention.register_forward_hook(lambda *_: None)
    return net


def wrapped() -> Any:
    """As libraries that move weights around do."""
    net = build("DINOv3ViTModel")
    net.model.layer[1].forward = lambda *args, **kwargs: None
    return net


def checkpointing() -> Any:
    net = build("Dinov2Model")
    net.gradient_checkpointing_enable()
    return net


def other_attention() -> Any:
    net = build("CLIPVisionModel")
    net.encoder.layers[3].self_attn = nn.MultiheadAttention(32, 2)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OwnForward, "Other has a forward of its own"),
        (hooked, "layers.2.attention has hooks"),
        (wrapped, "model.layer.1 has a forward of its own"),
        (checkpointing, "gradient checkpointing is on"),
        (other_attention, "encoder.layers.3.self_attn is a MultiheadAttention, which does not work like CLIPAttention"),
        (lambda: lean(build("ViTModel"), Halve()), "has token methods already"),
        (
            lambda: transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1])),
            "transformers' SwinModel is not a host; known are ViTModel",
        ),
        (
            lambda: transformers.Dinov2Backbone(transformers.Dinov2Config(**SHAPE)),
            "transformers' Dinov2Backbone is not a host",
        ),
        (
            lambda: transformers.SiglipModel(transformers.SiglipConfig(vision_config={**SHAPE, **MLP})),
            r"takes more than images: give it a lean part, net.vision_model = leanvit.lean\(net.vision_model",
        ),
    ],
)
def test_what_cannot_be_shown_rightly_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(NotAHost, match=message):
        lean(make(), Halve())


def test_a_lean_part_of_a_larger_network() -> None:
    """As the refusal of networks that take text as well says."""
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, **MLP}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(vision_config={**SHAPE, **MLP}, text_config=text, projection_dim=16)
    net = transformers.CLIPModel(config).double().eval()
    given = {"input_ids": torch.tensor([[0, 3, 1]]), "pixel_values": images()}
    dense = net(**given).logits_per_image
    net.vision_model = lean(net.vision_model, Replace())
    torch.testing.assert_close(net(**given).logits_per_image, dense, rtol=0, atol=1e-12)
    net.vision_model = lean(net.vision_model.restore(), "tome")
    assert not torch.equal(net(**given).logits_per_image, dense)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DINOv3ViTModel", "CLIPVisionModelWithProjection"])
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    net, batch = build(name), images()
    fast = lean(net, "evit")
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert type(other) is type(fast)
        assert_same(other(batch), fast(batch), 0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.1
        assert not torch.equal(other.features(batch), fast.features(batch))
        restored = dict(other.restore().named_parameters())
        assert all(parameter is restored[key] for key, parameter in other.named_parameters())
    fast.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.architectures == [name]
    assert_same(again(batch), net(batch), 1e-9)  # angles are float32 before, float64 after


def test_what_code_for_the_host_asks_of_it() -> None:
    net = build("ViTForImageClassification")
    fast = lean(net, Halve())
    assert isinstance(fast, transformers.ViTForImageClassification)
    assert isinstance(fast.vit, Lean)
    assert type(fast).__name__ == "ViTForImageClassification"  # pipelines know networks by it
    assert inspect.signature(fast.forward) == inspect.signature(net.forward)  # Trainer picks columns by it
    assert fast.vit(images()).last_hidden_state.shape == (2, 17, 32)
    assert fast.base_model is fast.vit
    assert fast.vit.restore() is net.vit
    assert fast.config is net.config
    fast.classifier = nn.Linear(32, 3).double()
    assert fast(images()).logits.shape == (2, 3)
    assert net(images()).logits.shape == (2, 5)
    with pytest.raises(ValueError, match="would be silent"):
        fast.gradient_checkpointing_enable()
    with pytest.raises(PlanError, match="there is no method"):
        lean(net, "toome")


def test_half_precision_images_become_what_the_network_is() -> None:
    net = build("ViTModel", torch.float32)
    assert_same(lean(net, Replace())(images().half()), net(images().half()), 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forms_of_attention(attention: str) -> None:
    net = build("CLIPForImageClassification", torch.float32)
    net.set_attn_implementation(attention)
    batch = images(dtype=torch.float32)
    assert_same(lean(net, Replace())(batch), net(batch), 1e-5)


def test_stochastic_parts_of_training_are_honoured() -> None:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.5}
    fast, batch = lean(build("Dinov2Model", **rates), Halve()).train(), images()
    torch.manual_seed(0)
    first = fast.features(batch)
    torch.manual_seed(0)
    assert torch.equal(fast.features(batch), first)
    assert not torch.equal(fast.features(batch), first)


def test_dropped_patches_take_their_rotation_along() -> None:
    net, batch = build("DINOv3ViTModel"), images()
    x = net.embeddings(batch)
    cosine, sine = net.rope_embeddings(batch)
    left = [*range(4), *range(4, x.shape[1], 2)]
    for index, layer in enumerate(net.model.layer):
        x = layer(x, None, position_embeddings=(cosine, sine))
        if index == 1:
            x, cosine, sine = x[:, left], cosine[::2], sine[::2]
    found = lean(net, Drop())(batch).last_hidden_state[:, 4:]
    torch.testing.assert_close(found, net.norm(x)[:, 4:].repeat_interleave(2, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(2, 3), (4, 4), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_rotation_of_merged_patches_is_that_of_their_mean_coordinate(
    grid: tuple[int, int], dtype: torch.dtype
) -> None:
    """Also where neighbours differ by more than half a turn: coordinates are -1 to 1, and the fastest angle is 2 pi."""
    net = build("DINOv3ViTModel", torch.float32).to(dtype)
    rotation = find_host(net).embed(net, images(8 * grid[0], 8 * grid[1], dtype)).rotation
    assert rotation is not None
    places = torch.tensor([[[0.5, 1.0], [grid[0] - 1, 1.75]]])
    sine, cosine = rotation.at(places).of(3)[0, 0].double().chunk(2, dim=-1)
    centres = 2 * (places[0].double() + 0.5) / torch.tensor(grid) - 1
    angles = 2 * torch.pi * centres[:, :, None] * net.rope_embeddings.inv_freq.double()
    angles = angles.flatten(1).repeat(1, 2)
    tolerance = 1e-5 if dtype is torch.float64 else 0.03
    torch.testing.assert_close(sine, angles.sin(), rtol=0, atol=tolerance)
    torch.testing.assert_close(cosine, angles.cos(), rtol=0, atol=tolerance)
    torch.testing.assert_close(rotation.take(torch.tensor([[1, 0]])).of(0)[0, 0], rotation.of(0)[:2].flip(0))


def test_nothing_imports_transformers_before_there_is_such_a_network() -> None:
    code = """
import sys
sys.modules["transformers"] = None  # as where it is not installed
import timm, leanvit
leanvit.lean(timm.create_model("test_vit"), "tome")
try:
    leanvit.lean(__import__("torch").nn.Linear(1, 1))
except leanvit.NotAHost as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Linear is not a host; known are" in done.stdout
