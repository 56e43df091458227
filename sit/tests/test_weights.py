"""Files of weights: what is taken, what is left out by name, and what is refused with a way out."""

import logging
from pathlib import Path

import pytest
import torch
from timm.models._factory import create_model

from common.run.checkpoint import CheckpointError, resize_pos_embed
from common.run.checkpoint.loading import summarise
from common.tests.reference import fill_
from sit.loading import (
    WeightsFile,
    check_fits,
    load_for_evaluation,
    load_for_training,
    read_weights,
    strip,
)
from sit.models import LVViT

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 3.0, "p_emb": "4c", "num_classes": 5}
SMALL |= {"stage_blocks": (1, 1, 2)}


def make(kind: str | None, **options) -> LVViT:
    model = LVViT(**{**SMALL, **options, "distillation_type": kind})
    fill_(model, 3)
    return model.eval()


def file_of(model: torch.nn.Module, **changes) -> WeightsFile:
    return WeightsFile({key: value.clone() for key, value in model.state_dict().items()} | changes, "some.pth")


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sit"), "propagate", True)
    caplog.set_level(logging.INFO, "sit")
    return caplog


def test_a_student_starts_from_its_teacher_and_says_what_is_new(log):
    teacher, student = make(None), make("frd")
    fill_(student, 4)
    missing = load_for_training(student, file_of(teacher))
    own = student.state_dict()
    assert all(torch.equal(own[key], value) for key, value in teacher.state_dict().items())
    assert {key.split(".")[0] for key in missing} == {"tsm", "rtsm"}
    assert "rtsm.0 to rtsm.3 (48 keys), tsm.0 to tsm.1 (14 keys)" in log.text


def test_heads_of_other_classes_are_left_out_aux_head_too(log):
    student = make("frd", num_classes=7)
    before = student.aux_head.weight.clone()
    missing = load_for_training(student, file_of(make(None)))
    assert {"head.weight", "head.bias", "aux_head.weight", "aux_head.bias"} <= set(missing)
    assert torch.equal(student.aux_head.weight, before)
    assert "Removing key aux_head.bias from pretrained checkpoint" in log.text


def test_a_distillation_token_the_model_has_not_is_left_out_and_one_it_has_starts_new():
    load_for_training(make("frd"), file_of(make("frd", conv_distillation=True)))
    missing = load_for_training(make("frd", conv_distillation=True), file_of(make("frd")))
    assert set(missing) == {"dist_token", "dist_pos_embed", "head_dist.weight", "head_dist.bias"}


def test_evaluation_is_strict_and_wants_the_reverse_modules():
    model = make("frd")
    load_for_evaluation(make("frd"), file_of(model))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(("rtsm", "aux_head"))}
    bare = WeightsFile(state, "bare.pth")
    with pytest.raises(CheckpointError, match=r"bare\.pth: it holds no reverse modules .*--allow-stripped"):
        load_for_evaluation(make("frd"), bare)
    load_for_evaluation(make("frd"), bare, allow_stripped=True)
    with pytest.raises(CheckpointError, match=r"looks like a teacher.*--distillation-type none"):
        load_for_evaluation(make("frd"), file_of(make(None)))
    with pytest.raises(CheckpointError, match="expected an unslimmed one"):
        load_for_evaluation(make(None), file_of(model))
    with pytest.raises(CheckpointError, match=r"head\.weight: model \[5, 32\], file \[7, 32\]"):
        load_for_evaluation(make(None), file_of(make(None, num_classes=7)))


def test_a_stripped_file_says_so_and_gives_the_same_logits(tmp_path: Path):
    model = make("frd")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    report = strip(read_weights(tmp_path / "checkpoint.pth"), tmp_path / "small.pth")
    small = read_weights(tmp_path / "small.pth")
    assert small.stripped
    assert not small.recovers
    assert len(report["removed"]) == 50
    assert report["bytes"] < (tmp_path / "checkpoint.pth").stat().st_size
    again = make("frd")
    fill_(again, 9)
    load_for_evaluation(again, small)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images)[0], model(images)[0])
    with pytest.raises(CheckpointError, match="nothing to remove"):
        strip(small, tmp_path / "smaller.pth")
    strip(read_weights(tmp_path / "checkpoint.pth"), tmp_path / "half.pth", half=True)
    assert read_weights(tmp_path / "half.pth").state["pos_embed"].dtype == torch.float16
    file = read_weights(tmp_path / "checkpoint.pth")
    file.state["pos_embed"] = file.state["pos_embed"].clone().fill_(1e5)
    with pytest.raises(CheckpointError, match="pos_embed has values that are too large for float16"):
        strip(file, tmp_path / "large.pth", half=True)
    assert not (tmp_path / "large.pth").exists()
    half = make("frd")
    load_for_evaluation(half, read_weights(tmp_path / "half.pth"))
    assert torch.allclose(half(images)[0], model(images)[0], atol=0.05)


def test_the_public_lvvit_is_refused_with_an_explanation():
    """Its stem: a 7x7 convolution, two 3x3 ones, and a projection of 8x8."""
    public = {key: value for key, value in make(None).state_dict().items() if not key.startswith("patch_embed")}
    public |= {
        "patch_embed.conv1.weight": torch.zeros(64, 3, 7, 7),
        "patch_embed.proj.weight": torch.zeros(32, 64, 8, 8),
    }
    for load, model in (
        (load_for_training, make("frd")),
        (load_for_evaluation, make(None)),
    ):
        with pytest.raises(
            CheckpointError, match="the public LV-ViT of the token-labeling repository, another network"
        ):
            load(model, WeightsFile(public, "lvvit_s-26M-224-83.3.pth.tar"))


def test_another_size_is_named():
    with pytest.raises(CheckpointError, match="of width 64 with 4 blocks, the model of width 32 with 4"):
        load_for_evaluation(make(None), file_of(make(None, embed_dim=64)))
    with pytest.raises(CheckpointError, match=r"put out \[8, 4\] tokens, those of the model \[11, 7\]"):
        load_for_training(make("frd", keeping_ratio=0.7), file_of(make("frd")))
    with pytest.raises(CheckpointError, match="no LV-ViT weights"):
        load_for_evaluation(make(None), WeightsFile({"fc.weight": torch.zeros(2, 2)}, "resnet.pth"))
    check_fits(make("frd"), file_of(make("frd")), evaluates=True)


def test_positions_are_resized_where_that_is_legal(log):
    teacher = make(None)
    larger = make("frd", img_size=96)
    load_for_training(larger, file_of(teacher))
    assert "resized from 16 to 36 patches" in log.text
    assert torch.equal(larger.pos_embed[:, 0], teacher.pos_embed[:, 0])
    slimmed = make("frd")
    with pytest.raises(CheckpointError, match="widths of the reverse modules depend on that number"):
        load_for_training(make("frd", img_size=96, keeped_patches=(8, 4)), file_of(slimmed))
    other = make("frd", img_size=96, keeped_patches=(8, 4), logits_only=True)
    load_for_evaluation(other, file_of(slimmed))
    assert other(torch.randn(2, 3, 96, 96)).shape == (2, 5)


def test_resize_keeps_what_it_need_not_change():
    grid = torch.linspace(0, 1, 8)[:, None, None] + torch.linspace(0, 2, 8)[None, :, None]
    embedding = torch.cat((torch.ones(1, 1, 3), grid.expand(8, 8, 3).reshape(1, 64, 3)), 1)
    assert torch.allclose(resize_pos_embed(embedding, (8, 8)), embedding, atol=1e-6)
    assert resize_pos_embed(embedding, (16, 16)).shape == (1, 257, 3)
    middle = resize_pos_embed(embedding, (4, 4))[0, 1:, 0].view(4, 4)
    assert (middle.diff(dim=0) > 0).all()
    assert (middle.diff(dim=1) > 0).all()
    wide = resize_pos_embed(embedding, (4, 12))[0, 1:, 0].view(4, 12)  # rows run along the height
    assert torch.allclose(wide.mean(1), middle.mean(1), atol=0.02)
    with pytest.raises(CheckpointError, match="positions of 60 patches cannot be resized to 8x8"):
        resize_pos_embed(embedding[:, :61], (8, 8))


def test_files_that_hold_no_weights_are_named(tmp_path: Path):
    torch.save({"model": make(None).state_dict()}, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"plain\.pth: holds no weights under 'model_ema'; was it trained with"):
        read_weights(tmp_path / "plain.pth", key="model_ema")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(CheckpointError, match="found a web page"):
        read_weights(tmp_path / "page.pth")


def test_summary_names_modules():
    assert summarise(["rtsm.3.a", "rtsm.12.b", "tsm.0.scale", "head.weight", "dist_token"]) == (
        "rtsm.3 to rtsm.12 (2 keys), tsm.0 (1 key), head (1 key), dist_token (1 key)"
    )


def test_the_registry_s_own_arguments_are_dropped():
    model = create_model("sit_lvvit_desk", pretrained=False, pretrained_cfg_overlay={"x": 1}, cache_dir="nowhere")
    assert model.default_cfg["classifier"] == "head"
