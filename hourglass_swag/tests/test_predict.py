"""The classifier of images: its command line, Cog's interface with and without Cog, class names, wrong inputs."""

import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from common.data.loaders import DataError
from common.run.files import ROOT
from common.tests.reference import build
from hourglass_swag import models, predict
from hourglass_swag.evaluation import transform_image
from hourglass_swag.models.vision_transformer import SIZES, Size, VisionTransformer

PHOTOS = load_sample_images().filenames
SHAPE = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}


@pytest.fixture(scope="module")
def desk_weights(tmp_path_factory):
    """Weights of the digits' network that tell images apart."""
    path = tmp_path_factory.mktemp("weights") / "desk.pth"
    torch.save(build(partial(models.create, "vit_desk"), 1, dtype=torch.float32).state_dict(), path)
    return path


@pytest.fixture
def small_classifiers(monkeypatch, tmp_path):
    """Two names of the registry as small networks of 1,000 classes, their published files in torch.hub's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)

    for seed, size in enumerate(("b16", "l16")):
        name = f"vit_{size}_in1k"
        monkeypatch.setitem(SIZES, size, Size(**SHAPE))
        state = build(VisionTransformer, seed, dtype=torch.float32, image_size=32, **SHAPE, num_classes=1000)
        torch.save(state.state_dict(), cache / f"{name}.torch")
    return cache


def test_the_command_names_the_best_classes_of_every_image(desk_weights):
    command = [sys.executable, "hourglass_swag/predict.py", *PHOTOS, "-m", "hourglass_vit_desk", "-l", "2", "-n", "16"]
    done = subprocess.run(
        [*command, "--topk", "3", "--weights", str(desk_weights), "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.rstrip(":") for line in lines[::4]] == PHOTOS
    guesses = [re.fullmatch(r" *([\d.]+) %  (\d)", line) for line in lines if line.startswith(" ")]
    assert len(guesses) == 6
    assert all(guesses)


def test_probabilities_are_those_of_the_network(desk_weights):
    words = [PHOTOS[0], "-m", "vit_desk", "--weights", str(desk_weights), "--topk", "50", "--device", "cpu"]
    (found,) = predict.main(words)
    assert len(found) == 10
    assert sum(share for _, share in found) == pytest.approx(1)
    model = build(partial(models.create, "vit_desk"), 1, dtype=torch.float32)
    with torch.no_grad():
        expected = model(transform_image(Image.open(PHOTOS[0]), 32))[0].softmax(0)
    for name, share in found:
        assert share == pytest.approx(expected[int(name)].item(), rel=1e-4)
    assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)


def test_imagenet_names_are_in_the_order_of_the_synsets():
    names = predict.class_names(1000)
    assert len(set(names)) > 990
    assert names[0].startswith("tench")
    assert names[207].startswith("golden retriever")
    assert names[999].startswith("toilet tissue")


def test_every_classifier_has_a_resolution():
    found = {name: predict.trained_resolution(name) for name in models.names(classifiers=True)}
    assert set(predict.PLAIN) <= set(found)
    assert [found[name] for name in predict.PLAIN] == [518, 512, 384, 384, 384, 384]
    assert found["e_vit_h14_in1k"] == 518


def test_predictor_holds_one_network_and_loads_it_when_asked(small_classifiers):
    predictor = predict.Predictor()
    predictor.setup()
    assert predictor.loaded is None
    names = predictor.predict(PHOTOS[0], "vit_b16_in1k", 3)
    assert len(names) == 3
    assert set(names) <= set(predict.class_names(1000))
    first = predictor.loaded[1]  # pyright: ignore[reportOptionalSubscript]
    assert predictor.predict(PHOTOS[0], "vit_b16_in1k", 10)[:3] == names
    assert predictor.loaded[1] is first  # pyright: ignore[reportOptionalSubscript]
    assert predictor.predict(PHOTOS[0], "vit_l16_in1k", 3) != names
    assert predictor.loaded[0] == "vit_l16_in1k"  # pyright: ignore[reportOptionalSubscript]


def test_predictor_checks_what_cog_would_check():
    with pytest.raises(ValueError, match=r"model_name must be one of vit_h14_in1k, .*, got 'vit_desk'"):
        predict.Predictor().predict(PHOTOS[0], "vit_desk", 5)
    with pytest.raises(ValueError, match="topk must be 1 to 10, got 11"):
        predict.Predictor().predict(PHOTOS[0], "vit_b16_in1k", 11)


def test_with_cog_the_arguments_are_its_own(monkeypatch):
    """A stand-in for Cog's package, of which only these three names are used."""
    cog = ModuleType("cog")
    cog.BasePredictor = type("BasePredictor", (), {})  # type: ignore[attr-defined]
    cog.Input = lambda **options: options  # type: ignore[attr-defined]
    cog.Path = type("Path", (type(pathlib.Path()),), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cog", cog)
    spec = importlib.util.spec_from_file_location("predict_under_cog", predict.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.Predictor, cog.BasePredictor)  # type: ignore[attr-defined]
    signature = inspect.signature(module.Predictor.predict)
    assert signature.parameters["image"].annotation is cog.Path  # type: ignore[attr-defined]
    assert signature.parameters["model_name"].default["choices"] == predict.PLAIN
    assert signature.parameters["topk"].default == {
        "description": "number of classes to name",
        "default": 5,
        "ge": 1,
        "le": 10,
    }
    assert signature.return_annotation == list[str]


def test_cog_yaml_names_this_class_and_the_tested_versions():
    config = yaml.safe_load((ROOT / "hourglass_swag" / "cog.yaml").read_text())
    file, name = config["predict"].split(":")
    assert (ROOT / file).samefile(predict.__file__)
    assert hasattr(predict, name)
    tested = set((ROOT / "constraints.txt").read_text().splitlines())
    assert set(config["build"]["python_packages"]) <= tested


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jpg"], r"cannot read image nowhere\.jpg: No such file"),
        ([__file__], r"cannot decode image .*test_predict\.py \(not in a format that Pillow knows\); replace it$"),
    ],
)
def test_images_that_cannot_be_read(words, message):
    with pytest.raises(DataError, match=message):
        predict.main([*words, "-m", "vit_desk"])


def test_wrong_flags_and_missing_weights(capsys):
    with pytest.raises(SystemExit):
        predict.parse_args([PHOTOS[0], "--topk", "0"])
    assert "--topk must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(models.CheckpointError, match="vit_desk has no published weights"):
        predict.main([PHOTOS[0], "-m", "vit_desk"])
    done = subprocess.run(
        [sys.executable, predict.__file__, "nowhere.jpg"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: cannot read image nowhere.jpg")


def test_outputs_that_are_not_finite_are_an_error(tmp_path):
    model = models.create("vit_desk", image_size=32)
    state = {name: value.fill_(3e38) if name == "class_token" else value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(DataError, match="outputs that are not finite"):
        predict.main([PHOTOS[0], "-m", "vit_desk", "--weights", str(tmp_path / "broken.pth")])


def test_random_weights_are_said(capsys):
    assert len(predict.main([PHOTOS[0], "-m", "vit_desk", "--no-pretrained"])[0]) == 5
    assert "the weights are random" in capsys.readouterr().err
