"""Clips from folders, lists, animations and videos; sliced and separate heads; the program on a miniature UCF101."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from common.data.loaders import BadImageError, DataError
from common.run.checkpoint import save_atomic
from common.run.errors import UsageError
from scala import linear_probe, probing
from scala.models_mobilenet import MobileNetV2_scala
from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala
from scala.probing import FrozenFeatures, ProbeStep, SeparateHeads, SlicedHead, sampled_widths
from scala.slicing import SliceRule, make_grid
from scala.ucf101 import Clips, clip_transform, frame_indices, read_frames

COLOURS = {"Archery": (200, 40, 40), "Bowling": (40, 200, 40), "Crawling": (40, 40, 200)}
NAME = "deit_so_tiny_patch16_224_scala"


def frames_of(kind: str, count: int, seed: int) -> list[Image.Image]:
    """Frames in the colour of their class, a little brighter one after the other."""
    noise = np.random.default_rng(seed).integers(-20, 20, (36, 48, 3))
    pixels = [np.clip(np.array(COLOURS[kind]) + noise + 2 * index, 0, 255) for index in range(count)]
    return [Image.fromarray(picture.astype(np.uint8)) for picture in pixels]


def write_frames(folder: Path, pictures: list[Image.Image]) -> None:
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        picture.save(folder / f"frame{index + 8}.png")  # frame8, frame9, frame10: numbers, not words


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training and one test clip of three classes: frames of one, animations of the others."""
    root = tmp_path_factory.mktemp("ucf101")
    listed: dict[str, list[str]] = {"trainlist01.txt": [], "testlist01.txt": []}
    for label, kind in enumerate(COLOURS, 1):
        for clip in (1, 2, 3):
            name = f"v_{kind}_g{clip:02d}_c01"
            pictures = frames_of(kind, 5, seed=10 * label + clip)
            place = root / "UCF-101" / kind
            if label == 1:
                write_frames(place / name, pictures)
            else:
                place.mkdir(parents=True, exist_ok=True)
                pictures[0].save(place / f"{name}.webp", save_all=True, append_images=pictures[1:], lossless=True)
            train = f"{kind}/{name}.avi {label}"
            listed["trainlist01.txt" if clip < 3 else "testlist01.txt"].append(train if clip < 3 else train[:-2])
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    for name, lines in listed.items():
        (lists / name).write_text("\n".join(lines) + "\n")
    (lists / "classInd.txt").write_text("".join(f"{index} {kind}\n" for index, kind in enumerate(COLOURS, 1)))
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=32, num_classes=5)
    arguments = {"model": NAME, "smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.125, "input_size": 32}
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    save_atomic({"model": model.state_dict(), "args": arguments}, path)
    return path


def test_frames_are_spread_over_the_clip() -> None:
    assert frame_indices(160, 8, random=False) == [10, 30, 50, 70, 90, 110, 130, 150]
    assert frame_indices(3, 8, random=False) == [0, 0, 0, 1, 1, 2, 2, 2]
    torch.manual_seed(0)
    drawn = torch.tensor([frame_indices(160, 8, random=True) for _ in range(200)])
    low = torch.arange(8) * 20
    assert (drawn >= low).all()
    assert (drawn < low + 20).all()
    assert (drawn.amin(0) - low).max() <= 1
    with pytest.raises(ValueError, match="at least one frame"):
        frame_indices(0, 8, random=False)


def test_lists_and_folders_give_the_same_clips(ucf101: Path, tmp_path: Path) -> None:
    train, test = (Clips(ucf101, split, frames=5) for split in ("train", "val"))
    assert list(train.classes) == list(COLOURS)
    assert [label for _, label in train.samples] == [0, 0, 1, 1, 2, 2]
    assert [label for _, label in test.samples] == [0, 1, 2]
    for kind in COLOURS:
        write_frames(tmp_path / "train" / kind / "clip", frames_of(kind, 5, seed=1))
    write_frames(tmp_path / "val" / "Bowling" / "clip", frames_of("Bowling", 5, seed=23))
    folders = Clips(tmp_path, "val", frames=5)
    assert [label for _, label in folders.samples] == [1]
    expected = np.stack([np.asarray(picture) for picture in frames_of("Bowling", 5, seed=23)])
    for clips, index in ((folders, 0), (test, 1)):  # a folder of frames and an animation
        frames, label = clips[index]
        assert label == 1
        np.testing.assert_array_equal(frames.permute(0, 2, 3, 1), expected)


def test_video_files_are_decoded(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed; videos need it")
    with av.open(str(tmp_path / "clip.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for index in range(6):
            picture = np.full((32, 48, 3), 40 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frames = read_frames(tmp_path / "clip.avi", 3, random=False)
    assert frames.shape == (3, 3, 32, 48)
    np.testing.assert_allclose(frames.float().mean((1, 2, 3)), [40, 120, 200], atol=12)
    (tmp_path / "bad.avi").write_bytes(b"no video")
    with pytest.raises(BadImageError, match=r"cannot decode video .*bad\.avi"):
        read_frames(tmp_path / "bad.avi", 3, random=False)


def test_missing_things_are_named(ucf101: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither UCF101's lists"):
        Clips(tmp_path, "train")
    with pytest.raises(DataError, match="does not exist: give --data-path"):
        Clips(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"trainlist02\.txt does not exist: fold 2"):
        Clips(ucf101, "train", fold=2)
    (tmp_path / "trainlist01.txt").write_text("Archery/v_a.avi 1\n")
    (tmp_path / "testlist01.txt").write_text("")
    with pytest.raises(DataError, match=r"no clip 'Archery/v_a.avi' under"):
        Clips(tmp_path, "train")
    (tmp_path / "v_a").mkdir()
    with pytest.raises(DataError, match="holds no frames"):
        _ = Clips(tmp_path, "train")[0]
    write_frames(tmp_path / "mixed", [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))])
    with pytest.raises(BadImageError, match="different sizes"):
        read_frames(tmp_path / "mixed", 2, random=False)
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    with pytest.raises(BadImageError, match=r"broken\.gif"):
        read_frames(tmp_path / "broken.gif", 2, random=False)


def test_all_frames_of_a_clip_are_cut_alike() -> None:
    frame = torch.randint(0, 255, (1, 3, 60, 80), dtype=torch.uint8)
    for train in (True, False):
        clip = clip_transform(32, train=train)(frame.expand(4, -1, -1, -1))
        assert clip.shape == (4, 3, 32, 32)
        assert torch.equal(clip, clip[:1].expand_as(clip))


@pytest.mark.parametrize("tokens", [1, 2])
def test_features_of_a_clip_are_the_mean_over_frames(tokens: int) -> None:
    network = DistilledVisionTransformer_scala if tokens == 2 else VisionTransformer_scala
    model = network(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5)
    features = FrozenFeatures(model)
    features.train()
    clips = torch.randn(2, 3, 3, 16, 16)
    found = features(clips, 0.5)
    assert found.shape == (2, tokens, 16)
    assert not model.training
    each = torch.stack([features(frame, 0.5) for frame in clips.unbind(1)])
    torch.testing.assert_close(found, each.mean(0))
    if tokens == 1:
        torch.testing.assert_close(each[0, :, 0], model.forward_features(clips[:, 0], 0.5)[:, 0])
    else:
        cls, dist = model.forward_features(clips[:, 0], 0.5)
        torch.testing.assert_close(each[0], torch.stack([cls, dist], dim=1))
    assert not found.requires_grad


def test_heads_compute_what_they_say() -> None:
    rule, features = SliceRule(0.25, 1.0), torch.randn(4, 2, 8)
    sliced = SlicedHead(rule, 16, 3, tokens=2)
    for value in sliced.parameters():
        torch.nn.init.normal_(value)
    weights, biases = zip(*[(head.weight, head.bias) for head in sliced.heads], strict=True)
    expected = sum(F.linear(features[:, i], weights[i][:, -8:], biases[i]) for i in range(2)) / 2
    torch.testing.assert_close(sliced([features], [0.5])[0], expected)
    lead = sum(F.linear(features[:, i, :4], weights[i][:, :4], biases[i]) for i in range(2)) / 2
    torch.testing.assert_close(sliced.logits(features[..., :4], 0.25), lead)
    separate = SeparateHeads(16, 3, 1, [0.25, 0.5])
    assert [tuple(value.shape) for value in separate.parameters()] == [(3, 4), (3,), (3, 8), (3,)]
    loss = F.cross_entropy(separate.logits(features[:, :1], 0.5), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert [value.grad is not None for value in separate.parameters()] == [False, False, True, True]


def test_a_step_sums_the_cross_entropy_of_its_widths() -> None:
    model = MobileNetV2_scala(img_size=32, num_classes=5, granularity=0.25)
    features = FrozenFeatures(model)
    head = SlicedHead(model.rule, model.num_features, 3, tokens=1)
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    grid = make_grid(0.25, 1.0, 0.25)
    terms = ProbeStep(features, head, lambda: sampled_widths(grid))((images, targets))
    assert terms["loss"].item() == pytest.approx(4 * np.log(3), rel=1e-5)  # a fresh probe has no opinion
    terms["loss"].backward()
    assert all(value.grad is None for value in model.parameters())
    assert len(sampled_widths(make_grid(0.25, 1.0, 0.0625))) == 4


def test_program_on_a_miniature_ucf101(
    ucf101: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "--data-set", "ucf101", "--data-path", str(ucf101), "--checkpoint", str(checkpoint), "--frames", "2",
        "--batch-size", "3", "--epochs", "6", "--lr", "2", "--workers", "0", "--device", "cpu",
    ]  # fmt: skip
    result = linear_probe.main([*words, "--output-dir", str(tmp_path / "one")])
    assert result["top1_percent"] == 100
    assert [row["ratio"] for row in result["widths"]] == [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
    written = json.loads((tmp_path / "one" / "widths.json").read_text())["widths"]
    assert written == result["widths"]
    assert capsys.readouterr().out.splitlines()[-1] == "100.000"
    model = timm.create_model(NAME, img_size=32, num_classes=5)
    assert written[-1]["gmacs"] == pytest.approx(2 * (model.count_ops(1.0).macs / 1e9), rel=0.1)
    # stopped in the second epoch and resumed, it ends with the same probe
    evaluate, calls = probing.evaluate, []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(probing, "evaluate", stop)
    again = [*words, "--output-dir", str(tmp_path / "two")]
    with pytest.raises(KeyboardInterrupt):
        linear_probe.main(again)
    assert linear_probe.main([*again, "--resume", "auto"])["widths"] == result["widths"]
    one, two = (torch.load(tmp_path / name / "last.pth")["model"] for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    last = str(tmp_path / "one" / "last.pth")
    assert linear_probe.main([*words, "--eval", "--resume", last, "--ratios", "0.5", "1.0"])["top1_percent"] == 100


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for kind in COLOURS:
            write_frames(tmp_path / split / kind, frames_of(kind, count, seed=count))
    return tmp_path


def test_pictures_get_a_head_per_width(checkpoint: Path, pictures: Path) -> None:
    words = ["--data-set", "folder", "--data-path", str(pictures), "--checkpoint", str(checkpoint)]
    words += ["--ratios", "1.0", "0.25", "--epochs", "4", "--batch-size", "4", "--lr", "2", "--workers", "0"]
    rows = linear_probe.main([*words, "--device", "cpu"])["widths"]
    assert [(row["ratio"], row["top1_percent"]) for row in rows] == [(0.25, 100), (1.0, 100)]
    assert rows[0]["gmacs"] < rows[1]["gmacs"] / 10


def test_untrained_widths_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--data-set", "digits", "--device", "cpu", "--workers", "0", "--checkpoint"]
    with pytest.raises(UsageError, match=r"--ratios 0\.3125 was not trained; .*--allow-untrained"):
        linear_probe.main([*words, str(checkpoint), "--ratios", "0.3125"])
    save_atomic(torch.load(checkpoint)["model"], tmp_path / "bare.pth")
    with pytest.raises(UsageError, match="give --granularity or --ratios"):
        linear_probe.main([*words, str(tmp_path / "bare.pth"), "--model", NAME, "--input-size", "32"])
