"""The command that compresses, its files, and the checkpoints it takes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from common.run.checkpoint import CheckpointError, load_safely, save_atomic
from common.run.files import ROOT
from uvc import compress as command
from uvc.compact_files import example_images, load_compact, save_compact, to_timm
from uvc.loading import load_masked
from uvc.models.gates import apply_masks_
from uvc.pruning import blocks_of
from uvc.removal import compress
from uvc.tests.random_structures import random_network

SMALL = {"img_size": 16, "depth": 3}


@pytest.fixture
def checkpoint(tmp_path):
    """A bare state dict as the published ones are: patch gates that act softly, masks, gates."""
    model, _, _ = random_network(3, **SMALL, patch="soft")
    path = tmp_path / "deit_desk_31.pth.tar"
    save_atomic({key: value.float() for key, value in model.state_dict().items()}, path)
    return path


def test_from_a_published_file_to_every_format(checkpoint, tmp_path, capsys):
    out = tmp_path / "made" / "small"
    words = ["--checkpoint", str(checkpoint), "--output", str(out), "--round-to", "8"]
    facts = command.main([*words, "--export", f"{out}.pt2", "--onnx", f"{out}.onnx"])
    assert capsys.readouterr().out.splitlines()[-1] == f"remaining {facts['remaining_percent']:.2f} %"
    model = load_masked(checkpoint).model
    apply_masks_(model)
    compact = load_compact(f"{out}.safetensors")
    images = example_images(compact.image_shape)
    with torch.no_grad():
        want = model(images)
        assert (compact.network(images) - want).abs().max() < 1e-5 * want.abs().max()
    assert max(facts["difference"], facts["read_back_difference"]) < 1e-5
    assert facts["real_gmacs"] <= facts["counted_gmacs"] < facts["dense_gmacs"]
    content = json.loads((tmp_path / "made" / "small.json").read_text())
    kept = content["structure"]["blocks"][0]
    columns = blocks_of(model)[0].attn.proj.get_buffer("mask")[0].view(4, 16)
    assert [columns[head].nonzero().flatten().tolist() for head in kept["heads"]] == kept["dims"]
    assert content["costs"]["remaining_percent"] == facts["remaining_percent"]
    assert content["config"]["architecture"] == "deit_desk"
    assert (tmp_path / "made" / "small.pt2").stat().st_size > 0


def test_the_script_in_a_process_of_its_own_with_a_benchmark(checkpoint, tmp_path):
    words = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x"), "--benchmark", "--round-to", "8"]
    words += ["--device", "cpu", "--rounds", "2", "--batch-size", "2", "--processor-time"]
    done = subprocess.run(
        [sys.executable, "uvc/compress.py", *words], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if "realised" in line] == [
        "dense", "compact", "compact, exact sizes", "compact, multiples of 8"
    ]  # fmt: skip
    content = json.loads((tmp_path / "x.json").read_text())
    assert [row["network"] for row in content["costs"]["speeds"]][2:] == [
        "compact, exact sizes",
        "compact, multiples of 8",
    ]
    assert lines[-1].startswith("remaining ")


@pytest.mark.parametrize("distilled", [False, True])
def test_timm_gives_the_same_logits(distilled):
    model, _, _ = random_network(5, **SMALL, distilled=distilled)
    with torch.no_grad():
        blocks_of(model)[0].attn.proj.get_buffer("mask").zero_()
        blocks_of(model)[1].mlp.fc2.get_buffer("mask").zero_()
        compressed = compress(model, multiple=8)
        network, images = compressed.network, example_images(compressed.image_shape).double()
        assert (to_timm(network)(images) - network(images)).abs().max() < 1e-12


def test_a_network_without_pruned_dimensions_is_timm_s_by_its_keys(tmp_path):
    """Skipped blocks alone: timm's own constructor takes the file."""
    model, _, _ = random_network(5, **SMALL)
    with torch.no_grad():
        for name, mask in model.named_buffers():
            if name.endswith("mask"):
                mask.fill_(1)
        model.block_skip_gating.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]))
    compressed = compress(model)
    path, _ = save_compact(compressed, tmp_path / "plain")
    timm = VisionTransformer(img_size=16, patch_size=4, num_classes=10, embed_dim=64, depth=2, num_heads=4).double()
    timm.load_state_dict(load_safely(path))
    images = example_images(compressed.image_shape).double()
    with torch.no_grad():
        assert (timm.eval()(images) - compressed.network(images)).abs().max() < 1e-12


def test_what_timm_cannot_express_is_named():
    for options, words in (({"patch": "remove"}, "soft patch gates.*removed patches"),):
        model, _, _ = random_network(1, **SMALL, **options)
        with pytest.raises(ValueError, match=words):
            to_timm(compress(model).network)


def test_a_dense_checkpoint_keeps_everything_and_ours_say_what_they_are(tmp_path):
    model, _, _ = random_network(1, **SMALL)
    dense = {key: value for key, value in model.state_dict().items() if not key.endswith(("mask", "gating"))}
    save_atomic({"model": dense, "args": {"model_type": "deit_desk"}}, tmp_path / "ours.pth")
    masked = load_masked(tmp_path / "ours.pth")
    assert masked.model_type == "deit_desk"
    compressed = compress(masked.model)
    assert compressed.structure.running == (0, 1, 2)
    assert all(block.num_values == 64 for block in compressed.structure.blocks)


def test_an_exported_program_must_be_loadable_by_its_name(capsys):
    with pytest.raises(SystemExit):
        command.parse_args(["--checkpoint", "a", "--output", "b", "--export", "program.bin"])
    assert "must end in .pt2" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit_are_refused(checkpoint, tmp_path):
    model, _, _ = random_network(1, **SMALL)
    unnamed = tmp_path / "model.pth"
    save_atomic(model.state_dict(), unnamed)
    with pytest.raises(CheckpointError, match="add --model_type NAME"):
        load_masked(unnamed)
    with pytest.raises(CheckpointError, match="its width is 64, that of deit_tiny_patch16_224 is 192"):
        load_masked(unnamed, "deit_tiny_patch16_224")
    with pytest.raises(CheckpointError, match="its width is 64, that of t2t_vit_14 is 384"):
        load_masked(unnamed, "t2t_vit_14")
    with pytest.raises(CheckpointError, match="no patch_gating"):
        load_masked(unnamed, "deit_desk", patch="remove")
    save_atomic({"weight": torch.zeros(2)}, unnamed)
    with pytest.raises(CheckpointError, match=r"there is no 'head\.weight' in it"):
        load_masked(unnamed, "deit_desk")
    save_compact(compress(model), tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"compact network of compress\.py; give the masked checkpoint"):
        load_masked(tmp_path / "small.safetensors", "deit_desk")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_compact(checkpoint)
    with pytest.raises(CheckpointError, match="no such file"):
        load_compact(tmp_path / "nothing.safetensors")


def test_a_safetensors_file_of_another_program_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"this is no file of uvc/compress\.py"):
        load_compact(tmp_path / "other.safetensors")
