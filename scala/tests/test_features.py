"""Distillation of features: losses by hand, which entries learn, teachers from files, and a run of the program."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.run.checkpoint import CheckpointError, save_atomic
from common.run.engine import Optimization
from scala import export, feature_training, main_dinov2
from scala.engine_scala import ScaleCoordination
from scala.features import (
    FeatureLosses,
    FeatureStudent,
    FeatureTeacher,
    FeatureWeights,
    build_student,
    feature_loss,
    load_teacher,
)
from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala
from scala.slicing import make_grid

SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "num_heads": 2}
ALL = FeatureWeights(1.0, 2.0, 3.0, 0.5)


def make_teacher(classes: int = 0, registers: int = 0) -> FeatureTeacher:
    torch.manual_seed(5)
    return FeatureTeacher(
        VisionTransformer(**SHAPE, embed_dim=12, depth=1, num_classes=classes, reg_tokens=registers, init_values=1.0)
    )


def make_student(masked: bool = False, classes: int = 0, **options: Any) -> FeatureStudent:
    torch.manual_seed(6)
    backbone = VisionTransformer_scala(**SHAPE, embed_dim=16, depth=2, num_classes=classes, **options)
    return FeatureStudent(backbone, 12, masked=masked, logits=classes > 0)


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def test_losses_are_those_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    features, target = (torch.randn(4, 17, 12, generator=generator) for _ in range(2))
    patches, logits, taught = (torch.randn(*s, generator=generator) for s in ((2, 16, 12), (4, 3), (4, 3)))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :8] = mask[1, 8:] = True
    terms = feature_loss((features, patches, mask, logits), target, taught, ALL)
    squares = (features - target).numpy() ** 2
    assert terms["token"].item() == pytest.approx(squares[:, 0].mean(), rel=1e-5)
    assert terms["feature"].item() == pytest.approx(2 * squares.mean(), rel=1e-5)
    hidden = np.concatenate([(patches[0, :8] - target[0, 1:9]).numpy(), (patches[1, 8:] - target[1, 9:]).numpy()])
    assert terms["patch"].item() == pytest.approx(3 * (hidden**2).mean(), rel=1e-5)
    p, q = taught.softmax(1), logits.softmax(1)
    assert terms["logit"].item() == pytest.approx(0.5 * (p * (p / q).log()).sum().item() / 4, rel=1e-5)
    only = feature_loss((features,), target, None, FeatureWeights(token=0))
    assert list(only) == ["feature"]


def test_targets_are_the_teachers_tokens_and_the_wider_widths_projections() -> None:
    teacher, student = make_teacher(registers=2), make_student()
    losses = FeatureLosses(teacher, FeatureWeights())
    images = pictures()
    with torch.no_grad():
        tokens = teacher.network.forward_features(images)
        wanted = torch.cat([tokens[:, :1], tokens[:, 3:]], dim=1)  # without the two registers
        full, slim = student(images, 1.0), student(images, 0.5)
        expected = F.mse_loss(full[0][:, 0], wanted[:, 0]) + F.mse_loss(full[0], wanted)
        torch.testing.assert_close(losses.full(images, full, images), expected)
        expected = F.mse_loss(slim[0][:, 0], full[0][:, 0]) + F.mse_loss(slim[0], full[0])
        transfer, ce = losses.slim(slim, full, None, images)
    torch.testing.assert_close(transfer, expected)
    assert ce == 0


@pytest.mark.parametrize("masked", [False, True])
def test_smallest_and_half_width_share_the_output_biases_only(masked: bool) -> None:
    """Isolation holds for projections and mask token too: only the bias of P, in the teacher's space, is common."""
    student = make_student(masked=masked, classes=3)
    touched = {}
    for ratio in (0.25, 0.5):
        student.zero_grad()
        torch.stack([part.float().square().mean() for part in student(pictures(), ratio)]).sum().backward()
        touched[ratio] = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
    shared = {name for name, grad in touched[0.25].items() if bool(((grad != 0) & (touched[0.5][name] != 0)).any())}
    projections = ["project_token", "project_patches"] + ["project_masked"] * masked
    assert shared == {"backbone.head.bias", *(f"{name}.linear.bias" for name in projections)}
    rows = touched[0.5]["project_token.linear.weight"].abs().sum(0)
    assert (rows[:8] == 0).all()
    assert (rows[8:] > 0).all()


def test_half_of_half_the_pictures_is_masked() -> None:
    student = make_student(masked=True)
    _, patches, mask = student(pictures(6), 0.5)
    assert patches.shape == (3, 16, 12)
    assert mask.sum(dim=1).tolist() == [8, 8, 8]
    assert torch.equal(student(pictures(6), 0.5)[0], student(pictures(6), 0.5)[0])
    assert not torch.equal(mask, student(pictures(6), 0.5)[2])


@pytest.mark.parametrize("weights", [FeatureWeights(), ALL])
def test_every_width_comes_closer_to_the_teacher(weights: FeatureWeights) -> None:
    teacher = make_teacher(classes=3)
    student = make_student(masked=weights.patch > 0, classes=3 if weights.logit else 0)
    step = ScaleCoordination(
        student, FeatureLosses(teacher, weights), make_grid(0.25, 1.0, 0.25), lambda: 0, full_warm_epoch=0
    )
    optimization = Optimization(torch.optim.AdamW(student.parameters(), lr=1e-2))
    widths, rows = (0.25, 0.5, 0.75, 1.0), []

    def against_teacher() -> list[float]:
        with torch.no_grad():
            return [float(step.losses.full(pictures(), student(pictures(), ratio), pictures())) for ratio in widths]

    before = against_teacher()
    for _ in range(40):
        optimization.zero_grad()
        rows.append(step((pictures(), torch.zeros(4, dtype=torch.long)), optimization))
        optimization.step()
    fractions = [after / start for after, start in zip(against_teacher(), before, strict=True)]
    assert fractions[-1] < 0.5
    assert all(fraction < 0.9 for fraction in fractions), fractions  # slim widths never saw the teacher itself
    assert all(row["loss_1q_ce"] == 0 for row in rows)
    assert all(value.grad is None for value in teacher.parameters())


def test_teacher_is_read_from_a_file_of_another_image_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    big = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5)
    save_atomic(big.state_dict(), tmp_path / "teacher.pth")
    same = load_teacher("vit_tiny_patch16_224", str(tmp_path / "teacher.pth"), img_size=64, num_classes=5)
    images = torch.randn(2, 3, 64, 64)
    features, logits = same(images)
    with torch.no_grad():
        torch.testing.assert_close(features, big.eval().forward_features(images))
        torch.testing.assert_close(logits, big(images))
    small = load_teacher("vit_tiny_patch16_224", str(tmp_path / "teacher.pth"), img_size=32, num_classes=0)
    assert small(images[:, :, :32, :32])[0].shape == (2, 5, 192)
    with pytest.raises(CheckpointError, match="not a network of timm"):
        load_teacher("dinov9", "", img_size=32)
    with pytest.raises(CheckpointError, match="ResNet"):
        load_teacher("resnet18", str(tmp_path / "teacher.pth"), img_size=32)


def test_students_that_cannot_learn_are_refused() -> None:
    teacher = make_teacher()
    with pytest.raises(ValueError, match="needs a teacher with a classifier"):
        build_student("deit_small_patch14_224_scala", teacher, FeatureWeights(logit=1.0))
    with pytest.raises(ValueError, match="no sliceable network"):
        build_student("resnet18", teacher, FeatureWeights())
    with pytest.raises(TypeError, match="plain sliced ViT"):
        FeatureStudent(DistilledVisionTransformer_scala(**SHAPE, embed_dim=16, depth=1), 12)
    with pytest.raises(ValueError, match="would never train"):
        FeatureStudent(VisionTransformer_scala(**SHAPE, embed_dim=16, depth=1), 12)
    with pytest.raises(ValueError, match="lambda_token -1"):
        FeatureWeights(token=-1.0)
    with pytest.raises(ValueError, match="at least one of"):
        FeatureWeights(0, 0, 0, 0)
    with pytest.raises(ValueError, match="same grid of patches"):
        feature_loss((torch.zeros(1, 5, 4),), torch.zeros(1, 17, 4), None, FeatureWeights())


def test_patch14_students_stand_on_dinov2s_grid() -> None:
    with torch.device("meta"):
        student = timm.create_model("deit_base_patch14_224_scala", num_classes=0)
        teacher = timm.create_model("vit_base_patch14_dinov2", img_size=224)
    assert student.patch_embed.num_patches == teacher.patch_embed.num_patches == 256
    assert (student.embed_dim, student.num_heads, len(student.blocks)) == (768, 12, 12)
    with pytest.raises(ValueError, match="no weights"):
        timm.create_model("deit_small_patch14_224_scala", pretrained=True)


def test_program_trains_resumes_and_its_student_can_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in "ab":
            folder = tmp_path / "data" / split / kind
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    save_atomic(timm.create_model(name, img_size=48, num_classes=0).state_dict(), tmp_path / "teacher.pth")
    words = [
        "--data-path", str(tmp_path / "data"), "--model", "deit_so_tiny_patch16_224_scala", "--teacher-model", name,
        "--teacher-path", str(tmp_path / "teacher.pth"), "--teacher-classes", "0", "--input-size", "48",
        "--batch-size", "4", "--workers", "0", "--device", "cpu", "--full_warm_epoch", "1", "--warmup-epochs", "0",
        "--lambda_patch", "1", "--layer-scale", "1", "--cutmix", "1.0",
    ]  # fmt: skip
    straight = main_dinov2.main([*words, "--epochs", "3", "--output-dir", str(tmp_path / "one")])
    assert straight["loss"] > 0
    stopped = [*words, "--epochs", "3", "--output-dir", str(tmp_path / "two"), "--save-every-steps", "1"]
    measure = feature_training.held_out_losses

    def stop_in_the_second_epoch(*args: Any) -> dict[str, float]:
        if (tmp_path / "two" / "best.pth").exists():
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(feature_training, "held_out_losses", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        main_dinov2.main(stopped)
    monkeypatch.setattr(feature_training, "held_out_losses", measure)
    assert not (tmp_path / "two" / "weights.pth").exists()
    assert main_dinov2.main([*stopped, "--resume", "auto"])["loss"] == straight["loss"]
    one, two = (torch.load(tmp_path / name / "weights.pth")["model"] for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    rows = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert [row["train_loss_1q"] > 0 for row in epochs] == [False, True, True]
    assert all(row["test_loss_0.25"] > 0 for row in epochs)
    result = export.main(
        ["--checkpoint", str(tmp_path / "one" / "weights.pth"), "--ratio", "0.5", "--output", str(tmp_path / "half")]
    )
    assert result["half.safetensors"] < 1e-4
