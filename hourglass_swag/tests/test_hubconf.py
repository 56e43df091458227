"""torch.hub names, from a checkout that is not installed and from an installed package."""

import subprocess
import sys
from pathlib import Path

import torch

from common.tests.reference import fill_
from hourglass_swag import hubconf, models

FOLDER = Path(__file__).resolve().parents[1]

# The editable install is hidden first: neither its path nor its import hook may help.
NOT_INSTALLED = f"""
import sys
checkout = {str(FOLDER.parent)!r}
sys.path = [path for path in sys.path if path not in ("", checkout)]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
try:
    import hourglass_swag
except ImportError:
    pass
else:
    raise SystemExit(f"still importable from {{hourglass_swag.__file__}}")
import torch
with torch.device("meta"):
    model = torch.hub.load({str(FOLDER)!r}, "hourglass_vit_l16_in1k", source="local", pretrained=False,
                           image_size=512, clustering_location=12, num_cluster=529)
print(type(model).__name__, model.methods[0].layer, model.methods[0].clusters)
"""


def test_a_checkout_that_is_not_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "LeanVisionTransformer 12 (23, 23)"


def test_every_name_is_an_entry_point_with_a_description():
    entries = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert entries == set(models.names())
    assert hubconf.dependencies == ["torch"]
    assert "1000 classes" in hubconf.vit_h14_in1k.__doc__  # pyright: ignore[reportAttributeAccessIssue]


def test_weights_reach_the_network(tmp_path):
    options = {"source": "local", "image_size": 16}
    made = torch.hub.load(str(FOLDER), "vit_desk", pretrained=False, **options)
    fill_(made)
    torch.save(made.state_dict(), tmp_path / "desk.pth")
    loaded = torch.hub.load(str(FOLDER), "hourglass_vit_desk", weights=tmp_path / "desk.pth", num_cluster=4, **options)
    assert torch.equal(loaded.encoder.ln.weight, made.encoder.ln.weight)
    assert torch.equal(loaded.class_token, made.class_token)
