"""What the visualisation tells of each method, against what the tokens themselves show, and the tool as a user runs it.

Where the halves of every layer add nothing (``silence``), a token keeps the value of its patch, or has the mean of the
patches merged into it, so that the tokens that come out say which patches they are.
"""

import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.images import load_image
from common.run.errors import DataError
from hourglass_swag import visualize
from hourglass_swag.models import create
from hourglass_swag.models.act_vision_transformer import attentions
from hourglass_swag.models.ops.cluster import TokenClusteringBlock
from hourglass_swag.tests.counting import tokens_per_layer
from hourglass_swag.tools.drawing import count_columns, draw_groups, draw_selection, draw_sheet, patch_side
from hourglass_swag.tools.tracing import DROPPED, GONE, KEPT, Grouping, NothingToShowError, Selection, trace

DESK = {
    "hourglass_vit_desk": ["-l", "3", "-n", "16"],
    "tome_vit_desk": ["--tome_r", "6"],
    "e_vit_desk": ["--drop_loc", "2", "4", "6"],
    "ats_vit_desk": ["--ats_blocks_indexes", "3", "5", "--ats_drop_tokens"],
    "act_vit_desk": ["--act_q_hashes", "4"],
    "evo_vit_desk": ["--evo_prune_location", "5"],
}
PANELS = {"hourglass_vit_desk": 1, "tome_vit_desk": 4, "e_vit_desk": 3, "ats_vit_desk": 2, "act_vit_desk": 4}
PANELS["evo_vit_desk"] = 3


def build(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return create(name, **options).eval()


def silence(model):
    """Let every layer pass its tokens on as they are; who attends to whom is still decided by the weights."""
    for layer in model.encoder.layers:
        for last in (layer.self_attention.out_proj, layer.mlp.linear_2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
        torch.nn.init.normal_(layer.self_attention.in_proj_weight, std=0.5)
    return model


def outcome(model, image, **options):
    """Stages, tokens that enter the first layer (N, C), and tokens that leave the last one (U, C)."""
    seen = {}
    first = model.encoder.dropout.register_forward_hook(lambda _, i, out: seen.setdefault("first", out))
    last = model.encoder.ln.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("last", inputs[0]))
    stages = trace(model, image, **options)
    first.remove()
    last.remove()
    # sequence first here, batch first there
    return stages, seen["first"][:, 0], seen["last"][0]


@pytest.fixture
def image():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def where(tokens, origin):
    """Position in ``origin`` (N, C) of each of the ``tokens`` (U, C)."""
    distance = (tokens[:, None] - origin).abs().amax(2)
    assert float(distance.amin(1).max()) < 1e-5
    return distance.argmin(1)


def check_selections(stages, kept):
    """States follow from the stage before, and the last one keeps the tokens ``kept`` (class token: 0)."""
    before = torch.zeros(64, dtype=torch.long)
    for stage in stages:
        assert isinstance(stage, Selection)
        assert torch.equal(stage.states == GONE, before != KEPT)
        before = stage.states
    assert torch.equal((stages[-1].states == KEPT).nonzero()[:, 0] + 1, kept[kept > 0].sort().values)


@pytest.mark.parametrize("fuse_token", [False, True])
@pytest.mark.parametrize("score", ["mean", "cls"])
def test_evit_shows_the_patches_it_keeps(image, fuse_token, score):
    model = silence(build("e_vit_desk", drop_loc=(1, 4, 6), fuse_token=fuse_token, score=score))
    stages, first, last = outcome(model, image)
    patches = last[: len(last) - fuse_token]  # a fused token that is kept again is no patch either
    distance = (patches[:, None] - first).abs().amax(2)
    is_patch = distance.amin(1) < 1e-5
    assert int((~is_patch).sum()) <= (2 if fuse_token else 0)
    kept = distance.argmin(1)[is_patch]
    check_selections(stages, kept)
    assert [stage.layer for stage in stages] == [1, 4, 6]
    counts = tokens_per_layer(model)
    for stage in stages:
        assert stage.caption.startswith(f"{counts[stage.layer]} to {counts[stage.layer + 1]} tokens")
        assert ("fused" in stage.caption) == fuse_token


@pytest.mark.parametrize("drop_tokens", [False, True])
def test_ats_shows_the_patches_it_samples(image, drop_tokens):
    model = silence(build("ats_vit_desk", ats_blocks=(2, 5), drop_tokens=drop_tokens, residual="input"))
    stages, first, last = outcome(model, image)
    assert [stage.layer for stage in stages] == [2, 5]
    tokens = last[last.abs().amax(1) > 0]  # padding is zero
    check_selections(stages, where(tokens, first))
    survivors = int((stages[-1].states == KEPT).sum())
    assert 0 < survivors < 63
    assert stages[-1].caption.endswith(f" to {1 + survivors} tokens")
    if drop_tokens:
        assert len(last) == 1 + survivors


def test_evo_vit_shows_the_patches_that_go_through(image):
    model = silence(build("evo_vit_desk", prune_ratio=0.4, prune_location=3))
    stages, first, last = outcome(model, image)
    assert [stage.layer for stage in stages] == [3, 4, 5, 6, 7]
    assert {stage.caption for stage in stages} == {"26 of 65 tokens go through"}
    through = where(last, first)[1:26] - 1
    states = torch.full((64,), DROPPED).scatter(0, through, KEPT)
    assert isinstance(stages[-1], Selection)
    assert torch.equal(stages[-1].states, states)


def test_tome_shows_groups_whose_mean_is_the_token(image):
    model = silence(build("tome_vit_desk", tome_r=9))
    stages, first, last = outcome(model, image)
    assert [stage.caption for stage in stages][:2] == ["65 to 56 tokens", "56 to 47 tokens"]
    stage = stages[-1]
    assert isinstance(stage, Grouping)
    assert len(last) == int(stage.caption.split()[2])
    for group in stage.labels.unique():
        mean = first[1:][stage.labels == group].mean(0)
        torch.testing.assert_close(last[group], mean, atol=1e-5, rtol=1e-4)
    assert model._tome_info["trace_source"] is False


def test_hourglass_shows_the_nearest_centroids(image):
    model = build("hourglass_vit_desk", clustering_location=3, num_cluster=16)
    seen = {}
    block = next(module for module in model.modules() if isinstance(module, TokenClusteringBlock))
    handle = block.register_forward_hook(
        lambda _, inputs, output: seen.update(tokens=inputs[0].flatten(2)[0].T, centroids=output[0][0])
    )
    (stage,) = trace(model, image)
    handle.remove()
    assert (stage.layer, stage.caption) == (3, "64 patches to 16 clusters, before it")
    assert isinstance(stage, Grouping)
    assert torch.equal(stage.labels, torch.cdist(seen["tokens"], seen["centroids"]).argmin(1))


@pytest.mark.parametrize("head", [0, 3])
def test_act_shows_queries_that_get_one_result(image, head):
    model = build("act_vit_desk", act_plug_in_index=2, act_plug_out_index=5, act_q_hashes=4)
    for layer in model.encoder.layers:
        torch.nn.init.normal_(layer.self_attention.in_proj_weight, std=0.5)  # queries that fill more than one bucket
    results = []
    handles = [a.register_forward_hook(lambda _, i, out: results.append(out[0, head])) for a in attentions(model)]
    stages = trace(model, image, head=head)
    for handle in handles:
        handle.remove()
    assert [stage.layer for stage in stages] == [2, 3, 4]
    for stage, result in zip(stages, results, strict=True):
        assert isinstance(stage, Grouping)
        together = stage.labels[:, None] == stage.labels
        assert 64 < int(together.sum()) < 64**2
        same = (result[1:, None] == result[1:]).all(2)
        assert torch.equal(same, together)
        assert re.fullmatch(rf"head {head}: 65 queries in \d+ groups", stage.caption)
    assert not any("cluster" in vars(attention) for attention in attentions(model))


def test_act_with_clustered_keys_alone(image):
    model = build("act_vit_desk", act_group_q=False, act_group_k=True, act_k_hashes=4)
    stages = trace(model, image)
    assert len(stages) == 8
    assert all(" keys in " in stage.caption for stage in stages)


@pytest.mark.parametrize(("name", "words"), DESK.items())
def test_tracing_changes_nothing(image, name, words):
    args = visualize.parse_args(["a.png", "-m", name, *words, "--no-pretrained", "--device", "cpu"])
    model = visualize.build_model(args)
    torch.nn.init.normal_(model.head.layers.head.weight)
    torch.manual_seed(3)
    with torch.no_grad():
        before = model(image)
        trace(model, image)
        torch.manual_seed(3)
        assert torch.equal(model(image), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_desk", {}, "dense network"),
        ("smyrf_vit_desk", {}, "SMYRF keeps every token"),
        ("hourglass_vit_desk", {"clustering_location": -1, "num_cluster": 16}, "a layer (-l) and a number (-n)"),
        ("tome_vit_desk", {}, "a --tome_r above 0"),
        ("e_vit_desk", {"base_keep_rate": 1.0}, "a --base_keep_rate below 1"),
        ("ats_vit_desk", {}, "layers (--ats_blocks_indexes)"),
        ("act_vit_desk", {"act_group_q": False}, "--act_group_q True"),
        ("evo_vit_desk", {}, "an --evo_prune_ratio below 1"),
    ],
)
def test_networks_without_anything_to_show(image, name, options, reason):
    with pytest.raises(NothingToShowError, match=r"^nothing to show: .*" + re.escape(reason)):
        trace(build(name, **options), image)


def test_convolutional_networks_have_no_tokens(image):
    with pytest.raises(NothingToShowError, match="Conv2d is a convolutional network"):
        trace(torch.nn.Conv2d(3, 8, 3), image)


def test_selections_keep_pixels_and_tint_the_rest():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    drawn = np.asarray(draw_selection(Image.fromarray(pixels), torch.tensor([KEPT, DROPPED, GONE, KEPT])))
    assert (drawn[:6, :6] == pixels[:6, :6]).all()
    assert (drawn[6:, 6:] == pixels[6:, 6:]).all()
    red, grey = drawn[:6, 6:].astype(int), drawn[6:, :6].astype(int)
    assert (red[..., 0] > red[..., 1] + 60).all()
    assert (np.ptp(grey, axis=2) < 12).all()


def test_groups_have_their_mean_colour_inside():
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:20, :20], pixels[:20, 20:] = 100, 200
    drawn = np.asarray(draw_groups(Image.fromarray(pixels), torch.tensor([1, 1, 0, 2])))
    assert (drawn[5:15, 5:35] == 150).all()
    assert (drawn[25:35, 5:15] == 0).all()
    with pytest.raises(ValueError, match="9 patches do not fill an image of 40 x 40 pixels"):
        draw_groups(Image.fromarray(pixels), torch.zeros(9, dtype=torch.long))


def test_sheets_hold_all_panels():
    assert [count_columns(number) for number in (1, 5, 6, 9, 17)] == [1, 5, 3, 4, 6]
    panel = Image.new("RGB", (50, 50), (255, 0, 0))
    for number in (2, 7):
        sheet = np.asarray(draw_sheet("A title that is wider than the panels", ["note"], [(panel, "a", "b")] * number))
        assert int((sheet == (255, 0, 0)).all(2).sum()) == number * 2500
    assert [patch_side(grid) for grid in (8, 14, 32, 37)] == [56, 32, 20, 20]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.parametrize("name", DESK)
def test_one_file_per_image(name, photo, tmp_path, capsys):
    words = ["-m", name, *DESK[name], str(photo), str(photo), "--no-pretrained", "--output", str(tmp_path)]
    files = visualize.main([*words, "--device", "cpu"])
    assert [file.name for file in files] == [f"photo_{name}.png", f"photo_{name}_2.png"]
    captured = capsys.readouterr()
    assert "the weights are random" in captured.err
    assert captured.out.splitlines()[-1] == f"written to {files[1]}"
    assert captured.out.count(": layer ") == 2 * PANELS[name]
    with Image.open(files[0]) as one, Image.open(files[1]) as two:
        assert one.tobytes() == two.tobytes()
        assert one.width > 448 * min(PANELS[name] + 1, 5)


def test_chosen_layers_and_trained_weights(photo, tmp_path, capsys):
    torch.save(build("tome_vit_desk").state_dict(), tmp_path / "weights.pth")
    words = ["-m", "tome_vit_desk", "--weights", str(tmp_path / "weights.pth"), "--tome_r", "6", "--device", "cpu"]
    visualize.main([*words, "--output", str(tmp_path), "--layers", "6", "0", str(photo)])
    captured = capsys.readouterr()
    assert re.findall(r"layer (\d+): (\d+ to \d+) tokens", captured.out) == [("0", "65 to 59"), ("6", "29 to 23")]
    assert "random" not in captured.err


def test_without_a_resolution_it_is_that_of_training():
    found = [visualize.parse_args(["a.png", "-m", name]).resolution for name in ("e_vit_l16_in1k", "e_vit_desk")]
    assert found == [512, 32]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "e_vit_desk", "-r", "30", "--drop_loc", "2"], "e_vit_desk at -r 30: image_size must be a multiple"),
        (["-m", "e_vit_desk", "-r", "0", "--drop_loc", "2"], "e_vit_desk at -r 0: image_size must be a multiple"),
        (["-m", "act_vit_desk", "--head", "4"], "--head must be 0 to 3, got 4"),
        (["-m", "evo_vit_desk", "--layers", "2", "4"], "nothing happens to the tokens in [2]; it does in [4, 5, 6, 7]"),
        (["-m", "vit_desk"], "nothing to show: this is a dense network"),
        (["-m", "vit_desk", "--tome_r", "4"], "--tome_r 4: a flag of another method"),
    ],
)
def test_wrong_flags_are_named(photo, tmp_path, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        visualize.main([str(photo), *words, "--no-pretrained", "--device", "cpu", "--output", str(tmp_path)])


def test_wrong_images_end_with_one_line(photo, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:700])
    for name, message in (
        ("text.jpg", "not in a format that Pillow knows"),
        ("cut.jpg", "truncated"),
        ("missing.jpg", "No such file"),
    ):
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            load_image(tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["visualize.py", "-m", "e_vit_desk", str(tmp_path / "text.jpg")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(visualize.__file__, run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: cannot decode image {tmp_path / 'text.jpg'} (not in a format that Pillow knows); replace it\n"
    )
