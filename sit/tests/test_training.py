"""Loss, precision of the teacher, meters, and the published log."""

import json
from functools import partial

import pytest
import torch
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import nn

from common.losses import divergence
from common.run.engine import StepInfo
from common.run.metrics import Record
from common.run.precision import autocast
from sit.engine import adjust_learning_rate, get_param_groups, store_for_autocast
from sit.losses import DistillationLoss, token_loss
from sit.meters import Logs, published_log
from sit.models.lvvit import build_lvvit


def small(kind, **options):
    torch.manual_seed(1)
    return build_lvvit("sit_lvvit_desk", distillation_type=kind, num_classes=5, **options)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 4])


def test_a_student_that_is_its_teacher_loses_nothing():
    tokens = [torch.randn(2, 4, 3) for _ in range(3)]
    assert token_loss(tokens, tokens) == 0
    logits = torch.randn(2, 5)
    assert divergence(logits, logits, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert divergence(logits, logits + 3, 1.0).item() == pytest.approx(0, abs=1e-6)  # softmax ignores a shift


def test_token_loss_is_the_mean_over_blocks_and_elements():
    zeros, ones = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    assert token_loss([zeros, zeros, zeros, zeros], [ones, zeros, 2 * ones, zeros]).item() == pytest.approx(5 / 4)
    with pytest.raises(ValueError, match=r"after block 2 the student has tokens \(2, 3, 3\), the teacher \(2, 4, 3\)"):
        token_loss([zeros, zeros[:, :3]], [zeros, zeros])
    with pytest.raises(ValueError, match="tokens of 1 blocks, the teacher of 2"):
        token_loss([zeros], [zeros, zeros])


class Counted(nn.Module):
    """A teacher that says what it was asked for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def forward_parts(self, images, *, logits, tokens):
        assert not torch.is_grad_enabled()
        self.asked.append((logits, tokens))
        return self.model.forward_parts(images, logits=logits, tokens=tokens)


@pytest.mark.parametrize(("token", "logits"), [(2.0, 2.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_teacher_runs_once_and_only_as_far_as_needed(token, logits):
    teacher, student = Counted(small(None).eval()), small("frd").train()
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, None, "frd", token, logits, 1.0, 1.0)
    losses = criterion(IMAGES, student(IMAGES), LABELS)
    assert teacher.asked == ([(bool(logits), bool(token))] if token or logits else [])
    assert bool(losses.token > 0) is bool(token)
    assert bool(losses.logits > 0) is bool(logits)
    assert torch.allclose(losses.loss, losses.cls + losses.token + losses.logits + losses.cnn)


def test_teachers_are_neither_trained_nor_saved():
    teacher = small(None).eval()
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, None, "frd", 2.0, 2.0, 1.0, 1.0)
    criterion.train()
    assert not teacher.training
    assert list(criterion.parameters()) == []
    assert criterion.state_dict() == {}


def test_the_weight_of_the_cnn_term_counts_only_where_asked():
    logits, tokens = torch.randn(2, 5), [torch.randn(2, 4, 3)]
    base = SoftTargetCrossEntropy()
    found = []
    for weigh in (False, True):
        criterion = DistillationLoss(
            base, lambda images: (logits, tokens), lambda images: logits.flip(0), "frd", 2.0, 2.0, 0.25, 1.0,
            weigh_cnn=weigh,
        )  # fmt: skip
        found.append(criterion(IMAGES, (logits, logits, tokens), logits.softmax(1)).cnn)
    assert torch.allclose(found[1], 0.25 * found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation_type": "soft"}, "must be one of none, frd"),
        ({"teacher_model": None}, "needs a teacher: --teacher-path"),
        ({"tau": 0.0}, "--distillation-tau must be positive"),
    ],
)
def test_wrong_criteria_are_named(options, message):
    given = {
        "base_criterion": nn.CrossEntropyLoss(), "teacher_model": small(None), "cnn_teacher": None,
        "distillation_type": "frd", "lambda_token": 2.0, "lambda_logits": 2.0, "lambda_cnn": 1.0, "tau": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**given | options)


def test_a_teacher_kept_in_autocast_s_precision_gives_the_same_bits():
    teacher = small(None, p_emb="4c", patch_size=16, img_size=32).eval().requires_grad_(False)
    with autocast("bf16", torch.device("cpu")), torch.no_grad():
        expected, tokens = teacher(IMAGES)
        store_for_autocast(teacher, torch.bfloat16)
        found, stored = teacher(IMAGES)
    assert teacher.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16  # pyright: ignore
    assert teacher.norm.weight.dtype == torch.float32
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(tokens, stored, strict=True))


def test_groups_cover_every_trained_parameter_once():
    model = small("frd", conv_distillation=True)
    groups = get_param_groups(model, 0.05)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_a_warm_up_rises_to_the_cosine():
    groups = [{"name": "rtsm"}, {"name": "base_decay"}]
    plain = [adjust_learning_rate(groups, 1e-3, 1e-5, epoch, 20)[0] for epoch in range(6)]
    risen = [adjust_learning_rate(groups, 1e-3, 1e-5, epoch, 20, warmup=3)[0] for epoch in range(6)]
    assert [a / b for a, b in zip(risen, plain, strict=True)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_published_lines_and_log(tmp_path, capsys):
    values = iter([3.0, 1.0, 2.0])

    def step(batch):
        value = torch.tensor(next(values))
        return {"loss": value, "loss_cls": value / 2}

    ticks = iter(float(tick) for tick in range(100))
    logs = Logs(step, batches=3, print_freq=2, clock=lambda: next(ticks))
    for batch in range(3):
        logs.step(None)
        rates = logs.after_step(StepInfo(0, batch, batch + 1, (5e-4, 1e-4, 1e-4)))
    assert rates == {"lr_backbone": 1e-4, "lr_rtsm": 5e-4}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # the first and every second step, here also the last
    assert lines[0].startswith("Epoch: [0]  [0/3]  eta: 0:00:0")
    assert "lr: 0.000100  loss: 2.0000 (2.0000)  loss_cls: 1.0000 (1.0000)  time: " in lines[1]
    Record(tmp_path / "log.jsonl", published=("log.txt", partial(published_log, n_parameters=123))).write(
        "epoch", {"epoch": 0, "step": 3, "train_lr": 5e-4, "train_lr_backbone": 1e-4, "test_acc1": 9.0}
    )
    assert json.loads((tmp_path / "log.txt").read_text()) == {
        "train_lr": 1e-4, "test_acc1": 9.0, "epoch": 0, "n_parameters": 123,
    }  # fmt: skip
