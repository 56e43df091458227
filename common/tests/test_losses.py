"""DeiT's distillation loss against its formulas."""

import pytest
import torch
from torch import nn

from common.losses import DistillationLoss, distillation_term, divergence, label_criterion
from common.run.errors import UsageError
from common.tests.reference import array

STUDENT, TEACHER, CLASS = (torch.from_numpy(array(name, (4, 5), 3)) for name in ("student", "teacher", "class"))
TARGETS = torch.tensor([0, 1, 2, 4])


def test_terms_are_those_of_the_formulas() -> None:
    p, q = (TEACHER / 3).softmax(1), (STUDENT / 3).softmax(1)
    soft = 9 * (p * (p / q).log()).sum() / 4
    torch.testing.assert_close(divergence(STUDENT, TEACHER, 3.0), soft)
    torch.testing.assert_close(distillation_term(STUDENT, TEACHER, "soft", 3.0), soft / 5)
    hard = -STUDENT.log_softmax(1)[torch.arange(4), TEACHER.argmax(1)].mean()
    torch.testing.assert_close(distillation_term(STUDENT, TEACHER, "hard"), hard)
    loss = DistillationLoss(nn.CrossEntropyLoss(), lambda images: TEACHER, "hard", 0.3)
    base = nn.functional.cross_entropy(CLASS, TARGETS)
    torch.testing.assert_close(loss(torch.zeros(1), (CLASS, STUDENT), TARGETS), 0.7 * base + 0.3 * hard)
    found = loss.terms(CLASS, STUDENT, TARGETS, TEACHER)
    torch.testing.assert_close((found["base"], found["distillation"]), (base, hard))
    torch.testing.assert_close(DistillationLoss(nn.CrossEntropyLoss())(torch.zeros(1), CLASS, TARGETS), base)


def test_the_teacher_is_asked_without_gradient_and_is_no_part() -> None:
    teacher = nn.Linear(5, 5, dtype=torch.float64)
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft")
    taught = loss.teach(STUDENT)
    assert taught is not None
    assert not taught.requires_grad
    assert not list(loss.parameters())
    assert DistillationLoss(nn.CrossEntropyLoss(), teacher).teach(STUDENT) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "warm"}, "must be one of none, soft, hard"),
        ({"kind": "soft", "teacher": None}, "needs a teacher"),
        ({"alpha": 2.0}, "from 0 to 1"),
        ({"tau": 0.0}, "must be positive"),
    ],
)
def test_what_cannot_be_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationLoss(nn.CrossEntropyLoss(), **options)
    with pytest.raises(ValueError, match="network with a distillation head"):
        DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), "hard")(torch.zeros(1), CLASS, TARGETS)


def test_smoothing_leaves_something_of_the_labels() -> None:
    with pytest.raises(UsageError, match="--smoothing must be from 0 to below 1, got 1"):
        label_criterion(mixed=False, smoothing=1.0)
