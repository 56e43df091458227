"""Packed checkpoints, early exit on a data set, and the figures: from trained weights to what is printed and drawn."""

import csv
import json

import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from common.data.loaders import DataError
from common.run.checkpoint import CheckpointError, read_checkpoint, save_atomic
from common.run.engine import check_labels
from dvt import benchmark, cifar, drawing, inference, models, pack, visualize
from dvt.costs import exit_gflops
from dvt.evaluation import ImageSource, Scores, collect_scores, draw_search_set
from dvt.exits import EVERYBODY, evaluate_thresholds, find_thresholds, published_shares
from dvt.loading import PACKED_KEYS
from dvt.models import create_model
from dvt.tests.tiny import SMALL_GRIDS, filled, small_cascade
from dvt.throughput import FULL, choose_settings, measure_dynamic

CPU = torch.device("cpu")
TINY = models.Entry("deit", {"img_size": 24, "embed_dim": 16, "depth": 1, "num_heads": 2}, tuple(SMALL_GRIDS))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A packed checkpoint of a tiny cascade on digits, and the words that made it."""
    folder = tmp_path_factory.mktemp("pack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "DVT_desk", TINY)
        model = filled(create_model("DVT_desk", num_classes=10), 3, torch.float32)
        averaged = {f"module.{name}": value for name, value in model.state_dict().items()}
        raw = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        save_atomic({"state_dict": raw, "state_dict_ema": averaged}, folder / "training.pth.tar")
        words = ["--model", "DVT_desk", "--dataset", "digits", "-j", "0", "-b", "180", "--device", "cpu",
                 "--search-images", "200", "--checkpoint", str(folder / "training.pth.tar")]  # fmt: skip
        pack.main([*words, "--output", str(folder / "packed.pth.tar")])
    return model, folder, words


@pytest.fixture
def tiny_desk(monkeypatch):
    monkeypatch.setitem(models.MODELS, "DVT_desk", TINY)


def test_the_five_entries(trained):
    model, folder, _ = trained
    content = torch.load(folder / "packed.pth.tar", weights_only=True)
    assert tuple(content) == PACKED_KEYS
    model.load_state_dict(content["model_state_dict"])  # strict: the average, not the zeros beside it
    assert content["flops"] == exit_gflops(model)
    search = ImageSource("digits", None, 24, 180).search(count=200)
    found = find_thresholds(
        collect_scores(model, search, device=CPU, title="", show=False).confidence, published_shares()
    )
    assert content["dynamic_threshold"].dtype == torch.float32
    assert torch.equal(content["dynamic_threshold"], found)
    held_out = collect_scores(model, ImageSource("digits", None, 24, 360).held_out(), device=CPU, title="", show=False)
    assert content["anytime_classification"] == pytest.approx(held_out.anytime)
    curve = evaluate_thresholds(held_out.confidence, held_out.correct, content["flops"], found)
    assert content["budgeted_batch_classification"][0] == pytest.approx(curve.gmacs.tolist(), rel=0.02)
    assert [len(part) for part in content["budgeted_batch_classification"]] == [59, 59]


def test_packing_again_gives_the_same_and_a_packed_file_can_be_packed(trained, tiny_desk, tmp_path, capsys):
    _, folder, words = trained
    again = pack.main([*words[:-1], str(folder / "packed.pth.tar"), "--output", str(tmp_path / "again.pth.tar")])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("exit1 ")
    before = torch.load(folder / "packed.pth.tar", weights_only=True)
    assert torch.equal(again["dynamic_threshold"], before["dynamic_threshold"])
    assert again["budgeted_batch_classification"] == before["budgeted_batch_classification"]


def test_the_search_set_is_drawn_once_and_cropped_alike():
    images = ImageSource("digits", None, 24).open("train", augment=True)
    first, same, other = (draw_search_set(images, count=50, seed=seed).indices for seed in (1, 1, 2))
    assert len(first) == len(set(first)) == 50
    assert first == same != other
    assert len(draw_search_set(images)) == 1437
    batches = [next(iter(ImageSource("digits", None, 24, 8).search(count=8, seed=5)))[0] for _ in range(2)]
    assert torch.equal(*batches)
    plain = next(iter(ImageSource("digits", None, 24, 8).search(count=8, seed=5, augment=False)))[0]
    assert not torch.equal(plain, batches[0])


def test_images_are_those_of_the_training():
    def first(**more):
        return next(iter(ImageSource("digits", None, 32, 1, **more).held_out()))[0]

    by_name, as_cifar = first(), first(transforms="cifar")
    assert torch.equal(by_name, first(transforms="imagenet"))
    pixels = as_cifar * torch.tensor(cifar.STD).view(1, 3, 1, 1) + torch.tensor(cifar.MEAN).view(1, 3, 1, 1)
    assert pixels.min() == pytest.approx(0, abs=1e-5)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(pixels, by_name * std + mean, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one of imagenet, cifar"):
        first(transforms="digits")


def test_bad_input_of_the_evaluation():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(DataError, match="a stream cannot give"):
        draw_search_set(Stream())
    with pytest.raises(ValueError, match="label 9, the model only 5 classes"):
        check_labels(torch.tensor([1, 9]), 5)
    with pytest.raises(ValueError, match="no image could be read"):
        collect_scores(small_cascade(), [], device=CPU, title="validation images", show=False)
    with pytest.raises(ValueError, match="no image could be read"):
        measure_dynamic(small_cascade(), {"a": [0.5] * 3}, [], [1, 2, 3], device=CPU, show=False)


class Clock:
    """Advances by what is asked for: the full cascade takes 4 seconds a batch, early exit 1."""

    def __init__(self, *steps):
        self.steps, self.now, self.calls = steps, 0.0, 0

    def __call__(self):
        if self.calls % 2:  # at the end of a pass
            self.now += self.steps[self.calls // 2 % len(self.steps)]
        self.calls += 1
        return self.now


def test_early_exit_on_a_data_set_agrees_with_the_simulation():
    model = small_cascade(3, torch.float32)
    batches = list(ImageSource("digits", None, 24, 120).held_out())
    held_out = collect_scores(model, batches, device=CPU, title="", show=False)
    gflops = exit_gflops(model)
    stored = find_thresholds(held_out.confidence) * (1 - 1e-5)
    settings = choose_settings(gflops, budgets=[gflops[1]], search=held_out, stored=stored)
    settings |= {"p = 20": stored[19], "first": torch.tensor([EVERYBODY] * 3)}
    # turns: (full, budget, p, first), then rotated by one, then by two
    clock = Clock(4, 1, 2, 1, 1, 2, 1, 4, 2, 1, 4, 1)
    results = {
        result.name: result
        for result in measure_dynamic(model, settings, batches, gflops, device=CPU, show=False, clock=clock)
    }
    assert list(results) == [FULL, *settings]
    full = results[FULL]
    assert full.top1_percent == pytest.approx(held_out.anytime[2])
    assert (full.speedup, full.flops_ratio, full.exit_percent) == (1.0, 1.0, [0, 0, 100])
    assert full.throughput_ips == pytest.approx(360 / 12)
    for name, thresholds in settings.items():
        expected = evaluate_thresholds(held_out.confidence, held_out.correct, gflops, thresholds)
        result = results[name]
        assert result.top1_percent == pytest.approx(expected.top1_percent.item(), abs=0.6)  # two images near a tie
        assert result.gmacs == pytest.approx(expected.gmacs.item(), rel=0.01)
        assert result.flops_ratio == pytest.approx(gflops[2] / result.gmacs)
        assert result.realised == pytest.approx(result.speedup / result.flops_ratio)
    assert [results[name].speedup for name in settings] == pytest.approx([4, 2, 4])


def test_what_a_command_line_can_ask_for():
    gflops, stored = [1.0, 2.0, 4.0], torch.rand(59, 3)
    assert list(choose_settings(gflops, stored=stored)) == [f"p = {p}" for p in (1, 5, 10, 15, 20, 30, 40, 50, 59)]
    chosen = choose_settings(gflops, thresholds=[0.75, 0.5])
    assert chosen["thresholds 0.75 0.5"].tolist() == [0.75, 0.5, EVERYBODY]
    costs = [1 + p / 20 for p in range(59)]
    assert torch.equal(
        choose_settings(gflops, budgets=[1.52], stored=stored, stored_costs=costs)["budget 1.52"], stored[10]
    )
    for asked, message in (
        ({"thresholds": [0.5]}, "first 2 exits"),
        ({"budgets": [0.5], "stored": stored, "stored_costs": costs}, "first exit costs 1, the last 4"),
        ({"budgets": [2.0]}, "--budget needs thresholds"),
        ({}, "--dynamic needs"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_settings(gflops, **asked)


def test_figures(trained, tiny_desk, tmp_path, capsys):
    _, folder, _ = trained
    packed = str(folder / "packed.pth.tar")
    words = ["--model", "DVT_desk", "--checkpoint_path", packed, "--dataset", "digits", "--workers", "0", "--device",
             "cpu"]  # fmt: skip
    early = ["--dynamic", "--threshold", "0.5", "0.5", "--output", str(tmp_path / "dynamic.json"), "-b", "180"]
    inference.main([*words, *early])
    assert "speed-up" in capsys.readouterr().out
    record = json.loads((tmp_path / "dynamic.json").read_text())
    assert [row["name"] for row in record["rows"]] == [FULL, "thresholds 0.5 0.5"]
    assert record["device"]["type"] == "cpu"
    drawn = visualize.main(["curves", packed, str(tmp_path / "dynamic.json"), "--output", str(tmp_path)])
    assert [path.name for path in drawn] == ["dvt-gflops.png", "dvt-throughput.png"]
    assert all(Image.open(path).width > 500 for path in drawn)
    words = ["images", *words, "--p", "20", "--output", str(tmp_path)]
    table, grid, exits = visualize.main([*words, "--classes", "3", "7"])
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 360
    assert {row["exit"] for row in rows} == {"1", "2", "3"}
    assert Image.open(grid).size == (8 + 4 * 168, 2 * 26 + 8 + 3 * 168)
    assert Image.open(exits).size == (8 + 9 * 112, 2 * 26 + 8 + 3 * 112)
    with pytest.raises(ValueError, match="no such class"):
        visualize.main([*words, "--classes", "cockatoo"])
    with pytest.raises(CheckpointError, match="lacks dynamic_threshold"):
        visualize.main([*words[:4], str(folder / "training.pth.tar"), *words[5:]])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: expected what"):
        visualize.main(["curves", str(tmp_path / "other.json"), "--output", str(tmp_path)])


def test_easy_and_hard_images():
    confidence = torch.tensor([[0.9, 0.8, 0.95, 0.2, 0.1, 0.9], [0.5] * 6, [0.5] * 6])
    correct = torch.tensor([[True, True, False, True, True, True]] * 3)
    exits = torch.tensor([0, 0, 0, 2, 2, 0])
    easy, hard = drawing.choose_images(exits, Scores(confidence, correct), [1, 1, 1, 1, 1, 0], 1)
    assert (easy, hard) == ([0, 1], [4, 3])


def test_reading_a_packed_file_runs_nothing(trained):
    _, folder, _ = trained
    assert set(read_checkpoint(folder / "packed.pth.tar")) == set(PACKED_KEYS)


def test_benchmark_reports_what_leaves_and_what_it_saves(tmp_path, capsys):
    words = ["--model", "DVT_desk", "-b", "8", "--p", "20", "40", "--rounds", "1", "--device", "cpu"]
    rows = benchmark.main([*words, "--output", str(tmp_path / "rows.json")])
    assert [row["name"] for row in rows] == ["full", "p = 20", "p = 40"]
    assert rows[0]["left"] == [0, 0, 8]
    assert all(sum(row["left"]) == 8 for row in rows)
    assert rows[1]["left"] == [2, 2, 4]  # floor(8 / 3) of the most confident at either exit
    assert rows[1]["flops_ratio"] > rows[2]["flops_ratio"] > 1
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["rows"] == rows
    assert record["device"]["type"] == "cpu"
    assert capsys.readouterr().out.splitlines()[-1].startswith("realised ")
    with pytest.raises(SystemExit):
        benchmark.parse_args(["--p", "60"])
    assert "must be from 1 to 59" in capsys.readouterr().err
