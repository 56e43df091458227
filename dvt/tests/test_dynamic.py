"""Early exit that happens: the answers of the full cascade, from no more work than the exits taken need."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dvt.dynamic import DynamicClassifier, bucket
from dvt.exits import EVERYBODY, NOBODY, confidence_and_prediction, find_thresholds, first_exit
from dvt.models.cascade import Cascade
from dvt.tests.tiny import small_cascade, t2t_cascade
from dvt.throughput import choose_settings

SHARES = [(0.4, 0.3, 0.3), (0.1, 0.1, 0.8), (0.0, 0.6, 0.4), (0.6, 0.4, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)]


def draw_images(count: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count), dtype=dtype)


@torch.no_grad()
def run_all(cascade: Cascade, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and confidences of all exits, (3, B, C) and (3, B)."""
    logits = torch.stack(cascade(images))
    return logits, confidence_and_prediction(logits)[0]


def between(confidence: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Thresholds for these shares that lie between two confidences, so that rounding cannot change an exit."""
    return find_thresholds(confidence, torch.tensor(shares)) * (1 - 1e-5)


def check(classifier: DynamicClassifier, images: Tensor, logits: Tensor, confidence: Tensor, tolerance: float) -> None:
    """The classifier's answers are those that the full cascade gives under the same thresholds."""
    output = classifier(images)
    chosen = first_exit(confidence, torch.tensor(classifier.thresholds))
    assert output.exits.tolist() == chosen.tolist()
    picked = torch.arange(len(images))
    torch.testing.assert_close(output.logits, logits[chosen, picked], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output.confidence, confidence[chosen, picked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reuse", [(True, True), (True, False), (False, True), (False, False)])
def test_equals_the_full_cascade_image_by_image(reuse):
    cascade = small_cascade(1, depth=2, feature_reuse=reuse[0], relation_reuse=reuse[1])
    for count in (1, 2, 3, 23):
        images = draw_images(count, 24)
        logits, confidence = run_all(cascade, images)
        for shares in SHARES:
            check(DynamicClassifier(cascade, between(confidence, shares)), images, logits, confidence, 1e-10)


def test_equals_the_full_cascade_at_the_published_grids():
    cascade, images = t2t_cascade(2), draw_images(7, 224)
    logits, confidence = run_all(cascade, images)
    for shares in SHARES[:3]:
        check(DynamicClassifier(cascade, between(confidence, shares)), images, logits, confidence, 1e-10)


def test_later_exits_see_only_the_images_that_are_left(monkeypatch):
    cascade, images = small_cascade(3), draw_images(40, 24)
    _, confidence = run_all(cascade, images)
    seen: dict[int, int] = {}
    for k, stage in enumerate(cascade.stages):
        run = stage.run
        monkeypatch.setattr(
            stage, "run", lambda x, *rest, k=k, run=run, **more: (seen.__setitem__(k, len(x)), run(x, *rest, **more))[1]
        )
    for shares, expected in (((0.5, 0.25, 0.25), {0: 40, 1: 20, 2: 10}), ((1.0, 0.0, 0.0), {0: 40})):
        seen.clear()
        exits = DynamicClassifier(cascade, between(confidence, shares))(images).exits
        assert seen == expected
        assert len(exits) == 40


def test_extreme_thresholds_and_an_empty_batch():
    cascade, images = small_cascade(4), draw_images(5, 24)
    logits, _ = run_all(cascade, images)
    for thresholds, k in (([EVERYBODY] * 3, 0), ([NOBODY, EVERYBODY, EVERYBODY], 1), ([NOBODY] * 3, 2)):
        output = DynamicClassifier(cascade, thresholds)(images)
        assert output.exits.tolist() == [k] * 5
        torch.testing.assert_close(output.logits, logits[k])
    for compiled in (False, True):
        output = DynamicClassifier(cascade, [0.5] * 3, compiled=compiled)(images[:0])
        assert [tuple(value.shape) for value in output] == [(0, 10), (0,), (0,)]


def test_what_is_not_a_number_is_not_confident():
    cascade, images = small_cascade(4), draw_images(3, 24)
    images[1] = torch.nan
    assert DynamicClassifier(cascade, [EVERYBODY] * 3)(images).exits.tolist() == [0, 2, 0]


def test_under_autocast():
    cascade, images = small_cascade(5, torch.float32), draw_images(6, 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, confidence = run_all(cascade, images)
        check(DynamicClassifier(cascade, between(confidence, (0.5, 0.3, 0.2))), images, logits, confidence, 2e-2)


def test_bad_use_is_refused():
    cascade = small_cascade(6)
    with pytest.raises(ValueError, match="expected 3 thresholds, one per exit, got 2"):
        DynamicClassifier(cascade, [0.5, 0.5])
    classifier = DynamicClassifier(cascade.train(), [0.5] * 3)
    with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
        classifier(draw_images(2, 24))


def test_buckets_grow_by_at_most_a_half_and_then_by_eight():
    assert [bucket(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 128)] == [1, 2, 4, 8, 8, 16, 16, 24, 128]
    assert all(n <= bucket(n) < n + 8 for n in range(1, 300))


def test_compiled_exits_answer_alike_and_are_not_compiled_again():
    cascade, images = small_cascade(7, torch.float32), draw_images(24, 24, torch.float32)
    logits, confidence = run_all(cascade, images)
    counter = CompileCounterWithBackend("eager")
    classifier = DynamicClassifier(cascade, [0.5] * 3, compiled=True, backend=counter)
    classifier.warm_up(images)
    compiled = counter.frame_count
    assert compiled >= 6  # each exit, for one image and for more
    for count in (1, 2, 3, 7, 9, 15, 16, 17, 24):
        for shares in SHARES[:3]:
            classifier.set_thresholds(between(confidence[:, :count], shares))
            check(classifier, images[:count], logits[:, :count], confidence[:, :count], 1e-4)
    assert counter.frame_count == compiled


@pytest.mark.gpu
def test_on_a_gpu_compiled_and_not():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cascade, images = small_cascade(8, torch.float32).cuda(), draw_images(24, 24, torch.float32).cuda()
    logits, confidence = (value.cpu() for value in run_all(cascade, images))
    for compiled in (False, True):
        classifier = DynamicClassifier(cascade, between(confidence, (0.4, 0.3, 0.3)), compiled=compiled)
        output = classifier(images)
        chosen = first_exit(confidence, torch.tensor(classifier.thresholds))
        assert output.exits.tolist() == chosen.tolist()
        torch.testing.assert_close(output.logits.cpu(), logits[chosen, torch.arange(24)], rtol=1e-3, atol=1e-3)


def test_a_threshold_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="nan is not a confidence"):
        choose_settings([1.0, 2.0, 4.0], thresholds=[float("nan"), 0.5])
