"""The live page: what its sliders mean, what it shows; where gradio and a browser are installed, the page itself."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.hosts.network import METHODS, lean, make_method
from common.hosts.opening import open_model
from common.hosts.serve import HOST, Live, controls, serve
from common.run.errors import UsageError
from common.run.files import ROOT

NETWORK = '''
import timm

def small():
    """A network for this test."""
    return timm.create_model("vit_tiny_patch16_224", img_size=96, patch_size=8, embed_dim=48, depth=4, num_heads=3)

def without_class_token():
    """Another."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    return timm.create_model("vit_base_patch16_siglip_224", **sizes)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks") / "networks.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture(scope="module")
def live(file: Path) -> Live:
    return Live(open_model(f"{file}:small"), rounds=1)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(np.array(load_sample_image("flower.jpg")))


def test_every_place_of_every_slider_is_a_setting(live: Live) -> None:
    assert list(live.controls) == list(METHODS)
    for name, control in controls(live.dense.plan.host.facts).items():
        for at in range(len(control.sliders)):
            for end in ("low", "high", "value"):
                values = [getattr(each, end if place == at else "value") for place, each in enumerate(control.sliders)]
                lean(live.model.net, make_method(name, control.settings(*values)), verify=False)


def test_what_is_shown(live: Live, photo: Image.Image) -> None:
    for name, control in live.controls.items():
        tokens, features, dense, text = live.show(photo, name, *(each.value for each in control.sliders))
        assert features.size == dense.size == (96, 96)
        assert tokens is None or tokens.size == (96, 96)
        assert "GMACs of" in text
    *_, text = live.show(photo, "tome", 20)
    assert "145 tokens enter, 65 leave" in text
    *_, nothing = live.show(photo, "tome", 0)
    assert "145 tokens enter, 145 leave" in nothing
    assert "cosine of the features 1.0000" in nothing


def test_methods_that_cannot_work_are_told(file: Path) -> None:
    other = Live(open_model(f"{file}:without_class_token"), rounds=1)
    assert "tome" in other.controls
    assert "needs a class token" in other.refused["ats"]


def test_the_command_says_its_flags_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from common.hosts.__main__ import main; main(['serve', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--port" in done.stdout


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UsageError, match=r"the live page needs gradio: pip install 'leanvit\[serve\]'"):
        serve(["vit_tiny_patch16_224"])


def test_a_port_that_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))  # which is not reached
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, message in ((str(port), f"--port {port} cannot be opened .*: expected a free one"),
                               ("65536", "--port 65536 cannot be opened")):  # fmt: skip
            with pytest.raises(UsageError, match=message):
                serve(["no network", "--port", words])


@pytest.fixture
def page(file: Path) -> Iterator[Any]:
    pytest.importorskip("gradio", reason="pip install -e .[serve]")
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    made = serve([f"{file}:small", "--port", str(port), "--device", "cpu"], block=False)
    yield made
    made.close()


@pytest.mark.slow
def test_the_page_is_of_this_machine_alone_and_answers(page: Any, photo: Image.Image, tmp_path: Path) -> None:
    client = pytest.importorskip("gradio_client")
    assert page.local_url.startswith(f"http://{HOST}:")
    assert page.share_url is None
    photo.save(tmp_path / "photo.png")
    asks = client.Client(page.local_url, verbose=False)
    values = [each.value for control in controls_of(page) for each in control.sliders]
    values[0] = 20
    *images, text = asks.predict(client.handle_file(tmp_path / "photo.png"), "tome", *values, api_name="/show")
    assert [Image.open(image).size for image in images] == [(384, 384)] * 3
    assert "145 tokens enter, 65 leave" in text


def controls_of(page: Any) -> list[Any]:
    """Of the small network."""
    from common.hosts.host import Facts

    return list(controls(Facts("", 4, 1, True, (12, 12), 48, 3, (96, 96))).values())


@pytest.mark.slow
def test_in_a_browser(page: Any, photo: Image.Image, tmp_path: Path) -> None:
    """Drop an image, choose a method, move its slider: the text follows."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium")
    photo.save(tmp_path / "photo.png")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(page.local_url)
        tab.set_input_files("input[type=file]", tmp_path / "photo.png")
        tab.get_by_text("tokens enter").wait_for(timeout=60_000)
        assert "145 tokens enter, 73 leave" in tab.inner_text("body")
        tab.get_by_label("method").click()
        tab.get_by_role("option", name="hourglass").click()
        tab.get_by_text("145 tokens enter, 65 leave").wait_for(timeout=60_000)
        rows = tab.get_by_label("number input for hourglass: rows of clusters")
        rows.fill("6")
        rows.press("Tab")
        tab.get_by_text("145 tokens enter, 37 leave").wait_for(timeout=60_000)
        assert tab.locator("img").count() >= 4
        browser.close()
