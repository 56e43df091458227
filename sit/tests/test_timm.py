"""Students of timm's networks: as LV-ViT and as formulas compute them, trained, exported, opened again, or refused."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit
from common.hosts import NotAHost, PlanError
from common.run.checkpoint import CheckpointError, load_safely
from common.run.errors import UsageError
from common.tests.reference import fill_
from sit import export, main, strip, visualize
from sit.models import LVViT
from sit.models.slim import Slim
from sit.models.timm_vit import Recovering, Teacher, deployed, make_plain, slim
from sit.tests.tools import miniature_imagenet

STAGES = {"test_vit": (3, 1, 1, 1), "test_vit2": (4, 2, 1, 1)}
"""Class token; register, average pool and LayerScale. The stages are the default ones."""


def draw_images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def make_student(kind: str = "test_vit", **options: Any) -> Any:
    """Deterministic weights in float64, in evaluation mode: 64 patches become 32, 16 and 8."""
    student = slim(make_plain(kind, img_size=32, patch_size=4, num_classes=5), **options)
    return fill_(student.double(), 3).eval()


def test_a_student_of_a_plain_network_is_the_published_one() -> None:
    """The same file in our LV-ViT gives the same logits and recovered tokens, trained and evaluated."""
    norm, size = partial(nn.LayerNorm, eps=1e-6), {"embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 3.0}
    published = LVViT(
        img_size=32, patch_size=4, num_classes=5, qkv_bias=True, p_emb="naive", norm_layer=norm,
        stage_blocks=STAGES["test_vit"], distillation_type="frd", **size,
    ).double()  # fmt: skip
    student = make_student()
    published.load_state_dict(student.state_dict() | {f"aux_head.{key}": value for key, value in
                                                      published.aux_head.state_dict().items()})  # fmt: skip
    images = draw_images(2)
    expected, found = published.train()(images), Recovering(student).train()(images)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    for one, other in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)
    assert found[1] is found[0]
    sum(value.square().mean() for value in (found[0], *found[2])).backward()
    assert not [name for name, value in student.named_parameters() if value.grad is None]
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(images), published.eval()(images)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", STAGES)
def test_composed_by_hand(kind: str) -> None:
    """Logits, and features on the full grid again: by the last reverse module, or by shares where the head pools."""
    student, images = make_student(kind), draw_images(2)
    dense: Any = student.restore()
    assert student.methods[0].layers == tuple(sum(STAGES[kind][: index + 1]) for index in range(3))
    prefix, pooled, back = dense.num_prefix_tokens, kind == "test_vit2", []
    with torch.no_grad():
        x = dense.norm_pre(dense._pos_embed(dense.patch_embed(images)))
        for index, block in enumerate(dense.blocks):
            if index in student.methods[0].layers:
                module, patches = student.tsm[student.methods[0].layers.index(index)], x[:, prefix:]
                norm, fc1, act, fc2 = module.weight
                shares = (module.scale * fc2(act(fc1(norm(patches))))).softmax(1)  # (B, N, M)
                back.append(shares / shares.sum(2, keepdim=True))
                x = torch.cat([x[:, :prefix], shares.mT @ patches], 1)
            x = block(x)
        assert x.shape[1] == prefix + 8
        patches = x[:, prefix:]
        if pooled:
            for shares in reversed(back):
                patches = shares @ patches
        else:
            patches = student.rtsm[-1](patches)
        full = dense.norm(torch.cat([x[:, :prefix], patches], 1))
        expected = full[:, prefix:].mT.unflatten(2, (8, 8))
        torch.testing.assert_close(student.features(images), expected, rtol=1e-11, atol=1e-11)
        logits = dense.forward_head(full)
        torch.testing.assert_close(student(images), logits, rtol=1e-11, atol=1e-11)
        tokens = student.run(images)
        torch.testing.assert_close(tokens.membership().sum(1), torch.ones(2, prefix + 64, dtype=torch.float64))


@pytest.mark.parametrize("kind", STAGES)
def test_without_slimming_a_student_is_its_host(kind: str) -> None:
    net = fill_(make_plain(kind, img_size=32, patch_size=4, num_classes=5).double(), 3).eval()
    plain = timm.create_model(kind, img_size=32, patch_size=4, num_classes=5).double().eval()
    plain.load_state_dict(net.state_dict())
    images = draw_images(2)
    student = slim(net, stage_blocks=[sum(STAGES[kind])])
    with torch.no_grad():
        expected = plain(images)
        torch.testing.assert_close(student(images), expected, rtol=1e-12, atol=1e-12)
        logits, tokens = Teacher(net, 3)(images)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert [tuple(each.shape) for each in tokens] == [(2, 64, 64)] * 3
    assert Teacher(net, 2 * len(net.blocks)).chosen == [index // 2 for index in range(2 * len(net.blocks))]


def test_the_cost_is_what_is_executed() -> None:
    student = make_student(keeping_ratio=0.7)
    assert student.tokens_per_layer() == [65, 65, 65, 45, 32, 22, 22]
    width, hidden = 64, 192
    expected = 64 * width * 3 * 4 * 4 + 5 * width
    for n in student.tokens_per_layer()[:-1]:
        expected += 4 * n * width**2 + 2 * n * n * width + 2 * n * width * hidden
    for before, after in ((64, 44), (44, 31), (31, 21)):
        expected += before * width * width // 2 + before * after * width // 2 + before * after * width
    assert round(student.gmacs() * 1e9) == expected


def test_a_file_holds_what_was_learned(tmp_path: Path) -> None:
    student, images = deployed(make_student().float()), draw_images(2).float()
    path = leanvit.save(student, tmp_path / "own")
    assert {key.split(".")[1] for key in load_safely(path) if key.startswith("rtsm.")} == {"5"}
    fast = leanvit.load(path)
    with torch.no_grad():
        assert torch.equal(fast(images), student(images))
        assert torch.equal(fast.features(images), student.features(images))
        assert fast.methods == student.methods
        again = pickle.loads(pickle.dumps(fast))
        assert torch.equal(again(images), student(images))
        assert again.methods[0].weights["tsm"] is again.tsm
        compiled: Any = torch.compile(fast, fullgraph=True, backend="eager")
        assert torch.equal(compiled(images), student(images))
        plain = fast.restore()
        assert "tsm.0.scale" not in plain.state_dict()
        both = leanvit.lean(plain, *fast.methods, leanvit.ToMe(r=[0, 0, 0, 2, 2, 2]))
        assert both.tokens_per_layer() == [65, 65, 65, 33, 17, 9, 7]
        assert both.features(images).shape == (2, 64, 8, 8)
        with pytest.raises(PlanError, match="tome at layer 0 breaks the grid that slim needs at layer 3"):
            leanvit.lean(plain, *fast.methods, leanvit.ToMe(r=2))
        larger = timm.create_model("test_vit", img_size=48, patch_size=4, num_classes=5)
        with pytest.raises(PlanError, match="recovers 64 patches, VisionTransformer has 144: take restore 'mixing'"):
            leanvit.lean(larger, *fast.methods)
        method = leanvit.Slim(fast.methods[0].layers, "mixing").with_weights(fast.methods[0].weights)
        assert leanvit.lean(larger, method)(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    method = leanvit.Slim((1, 2)).with_weights(fast.methods[0].weights)
    with pytest.raises(PlanError, match=r"layers must be 3, ascending, one for each learned module, got \(1, 2\)"):
        leanvit.lean(plain, method)
    wide = timm.create_model("test_vit3", img_size=32, patch_size=4)
    with pytest.raises(PlanError, match="its modules are of width 64, VisionTransformer is of width 96"):
        leanvit.lean(wide, *fast.methods)
    with pytest.raises(PlanError, match="slim has modules that must be learned"):
        leanvit.lean(plain, "slim", layers=(1,))
    with pytest.raises(KeyError, match=r"tsm\.0\.weight\.0\.weight"):
        Slim.build_weights({"tsm.0.scale": torch.ones(1, 1, 1)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature_imagenet(tmp_path_factory.mktemp("timm"))


COMMON = ["--model", "timm:test_vit", "--input-size", "32", "--patch-size", "8"]
TRAIN = ["--batch-size", "4", "--workers", "0", "--device", "cpu", "--no-repeated-aug", "--print-freq", "0",
         "--epochs", "1", "--cooldown-epochs", "0", "--aa=", "--lr", "1e-2"]  # fmt: skip


def test_from_own_weights_to_an_exported_student(folder: Path, tmp_path: Path, capfd: Any) -> None:
    data = ["--data-path", str(folder), *TRAIN]
    own = timm.create_model("test_vit", img_size=64, num_classes=7)  # its patches, positions and head are changed
    torch.save(own.state_dict(), tmp_path / "own.pth")
    teacher, student = tmp_path / "teacher" / "checkpoint.pth", tmp_path / "student" / "checkpoint.pth"
    words = [*COMMON, *data, "--distillation-type", "none", "--output_dir", str(teacher.parent)]
    main.main([*words, "--weights", str(tmp_path / "own.pth")])
    said = capfd.readouterr().err
    assert "own.pth: head.weight is for 7 classes, the network has 3" in said
    assert "the data set has 3 classes" in said
    words = [*COMMON, *data, "--keeping-ratio", "0.7", "--finetune", str(teacher), "--teacher-path", str(teacher)]
    words += ["--output_dir", str(student.parent)]
    row = main.main(words)
    assert min(row[f"train_loss_{name}"] for name in ("cls", "token", "logits")) > 0
    again = main.main([*words, "--epochs", "2", "--resume", "auto"])
    assert again["epoch"] == 1
    tested = main.main([*COMMON, *data, "--eval", "--finetune", str(student)])
    assert tested["loss"] == pytest.approx(again["test_loss"], rel=1e-5)
    plain, slimmed = (torch.load(file, weights_only=True)["model"] for file in (teacher, student))
    assert slimmed.keys() - plain.keys() == {key for key in slimmed if key.startswith(("tsm.", "rtsm."))}
    stripped = tmp_path / "stripped.pth"
    strip.main([str(student), str(stripped)])
    assert main.main([*COMMON, *data, "--eval", "--finetune", str(stripped)])["loss"] == tested["loss"]
    for name in ("own.onnx", "own.safetensors"):
        assert export.main([*COMMON, "--weights", str(student), "--output", str(tmp_path / name)]) < 1e-4
    with pytest.raises(UsageError, match=r"its patches are of 8 pixels: give --patch-size 8"):
        export.main([*COMMON[:4], "--weights", str(student), "--output", str(tmp_path / "other.safetensors")])
    fast = leanvit.load(tmp_path / "own.safetensors")
    assert fast.tokens_per_layer() == [17, 17, 17, 12, 8, 6, 6]
    assert {key: value for key, value in fast.state_dict().items() if "rtsm" not in key}.keys() == {
        key for key in slimmed if not key.startswith("rtsm.")
    }
    assert all(torch.equal(value, slimmed[key]) for key, value in fast.state_dict().items())
    for words, message in (
        ([*COMMON, *data, "--eval", "--finetune", str(teacher)], r"it holds no slimming modules \(tsm\.\*\)"),
        (
            [*COMMON, *data, "--eval", "--finetune", str(student), "--distillation-type", "none"],
            "distillation-type frd",
        ),
        ([*COMMON, *data, "--finetune", str(student), "--teacher-path", str(teacher)], "another --keeping-ratio"),
    ):
        with pytest.raises(CheckpointError, match=message):
            main.main(words)
    more = ["--eval", "--finetune", str(student), "--stage-blocks", "4", "2"]
    with pytest.raises(UsageError, match="the file has 3 slimming modules, and 2 stages have 1 between them"):
        main.main([*COMMON, *data, *more])
    seven = ["--teacher-path", str(tmp_path / "own.pth")]
    with pytest.raises(UsageError, match=r"head is for 7 classes, the data has 3.*--lambda-logits 0"):
        main.main([*COMMON, *data, *seven])
    row = main.main([*COMMON, *data, *seven, "--teacher-model", "timm:test_vit", "--lambda-logits", "0"])
    assert row["train_loss_logits"] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer cannot be slimmed"),
        ("eva02_tiny_patch14_224", "Eva cannot be slimmed"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled cannot be slimmed: head_dist"),
        ("vit_base_patch16_rpn_224", r"blocks\.0 is a ResPostBlock"),
    ],
)
def test_what_cannot_be_slimmed_is_refused(name: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(NotAHost, match=message):
        make_plain(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "timm:tst_vit"], "timm has no network 'tst_vit'; near are test_vit"),
        (["--input-size", "34"], "patches of 8 pixels do not fill 34 pixels; give a multiple, such as 32"),
        (["--patch-size", "16"], "--model timm:test_vit: a token slimming module must keep at least one token, got 0"),
        (["--stage-blocks", "4", "1"], "--stage-blocks 4 1 has 5 blocks, VisionTransformer has 6"),
        (["--teacher-model", "timm:test_vit3"], "--teacher-model has 96 for width, --model has 64"),
        (["--teacher-model", "sit_lvvit_tiny"], "are of two kinds"),
        (["--extra-teacher-model", "resnet10t"], "--extra-teacher-model belongs to LV-ViT"),
        (["--token-label-data", "x", "--distillation-type", "none"], "--token-label-data belongs to LV-ViT"),
    ],
)
def test_wrong_flags_say_what_to_do(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main.main([*COMMON, *TRAIN, "--data-path", str(folder), "--teacher-path", __file__, *words])


def test_programs_for_lvvit_alone_say_so(capsys: Any) -> None:
    for parse, words in (
        (export.parse_args, ["--output", "x.safetensors"]), (visualize.parse_args, ["digit-1", "--model", "timm:x"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            parse(words)
    said = capsys.readouterr().err
    assert "leanvit.load opens networks of timm:NAME, which --model sit_lvvit_tiny is not" in said
    assert "only slimmed tokens of LV-ViT are drawn here" in said
