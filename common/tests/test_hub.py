"""torch.hub from a clone that is not installed: every name, its text, and one network of each paper."""

import subprocess
import sys
from pathlib import Path

from common.run.files import ROOT

PRELUDE = f"""
import sys
checkout = {str(ROOT)!r}
sys.path = [path for path in sys.path if path not in ("", checkout)]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
for name in ("scipy", "sklearn", "matplotlib", "jinja2", "transformers", "onnx", "submitit"):
    sys.modules[name] = None  # what is no dependency of the entries
import torch
def load(name, *args, **options):
    return torch.hub.load(checkout, name, *args, source="local", **options)
"""
ENTRIES = """
module = torch.hub._import_module("hubconf", checkout + "/hubconf.py")  # as list and help do, which know GitHub alone
names = [name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")]
for name in ("lean", "explain", "lean_file", "vit_l16_in1k", "hourglass_vit_l16_in1k", "sit_lvvit_small",
             "deit_small_patch16_224_scala", "DVT_Deit_small", "uvc_deit_small_patch16_224", "uvc_compact"):
    assert name in names, name
for name in names:
    text = getattr(module, name).__doc__
    assert text and ("Args:" in text or "pretrained:" in text or "Raises:" in text), (name, text)
import timm
images = torch.randn(2, 3, 32, 32)
dense = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4).eval()
fast = load("lean", dense, "tome", r=8)
assert fast.tokens_per_layer() == [65, 57, 49, 41, 33]
assert "possible" in load("explain", dense)["tome"]
from common.hosts.files import save
again = load("lean_file", save(fast, sys.argv[1] + "/fast"))
assert torch.equal(again(images), fast(images))
hourglass = load("hourglass_vit_desk", pretrained=False, clustering_location=2, num_cluster=16)
assert hourglass(images).shape == (2, 10)
assert load("sit_lvvit_desk", num_classes=7, deployed=True)(images).shape == (2, 7)
scala = load("deit_tiny_patch16_224_scala", input_size=32, depth=2, patch_size=8, num_classes=4)
assert not scala.training
assert scala(images, 0.5).shape == (2, 4)
assert [logits.shape for logits in load("DVT_desk", num_classes=3)(images)] == [(2, 3)] * 3
assert load("uvc_deit_desk", num_classes=6)(images).shape == (2, 6)
arguments = {"model": "deit_tiny_patch16_224_scala", "input_size": 32, "smallest_ratio": 0.25, "largest_ratio": 1.0,
             "granularity": 0.25, "depth": 2, "patch_size": 8}
torch.save({"model": scala.state_dict(), "args": arguments}, sys.argv[1] + "/scala.pth")
again = load("deit_tiny_patch16_224_scala", weights=sys.argv[1] + "/scala.pth")
assert torch.equal(again(images, 0.5), scala(images, 0.5))
try:
    load("DVT_desk", pretrained=True)
except ValueError as error:
    assert "give weights=FILE" in str(error)
else:
    raise SystemExit("pretrained without weights")
print(len(names), "entries")
"""


def test_a_clone_that_is_not_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + ENTRIES, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("entries\n")
