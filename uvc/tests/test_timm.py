"""Any plain Vision Transformer of timm: pruned, counted, trained from a checkpoint, composed; or refused by name."""

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, Mlp, QuickGELU, SwiGLU  # pyright: ignore[reportPrivateImportUsage]
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import leanvit
from common.hosts.export import export_torch
from common.measure.flops import count_operations
from common.run.checkpoint import CheckpointError, load_safely
from common.run.errors import UsageError
from common.tests.reference import fill_
from uvc import compress as command
from uvc import joint_train, post_train
from uvc.compact_files import load_compact
from uvc.cost_model import CostModel
from uvc.loading import load_masked
from uvc.models import create
from uvc.models.gates import apply_masks_, register_masks
from uvc.models.timm_vit import GatedTimm, gate_blocks, ungated
from uvc.pruning import group_scores, update_masks_
from uvc.removal import compress, prune
from uvc.structure import Structure
from uvc.tests.random_structures import make_stale_, random_numbers

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dinov2": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True, "dynamic_img_size": True},
    "average": {"qk_norm": True, "global_pool": "avg", "class_token": False, "qkv_bias": False},
    "siglip": {"global_pool": "map", "class_token": False},
    "clip": {"pre_norm": True, "act_layer": QuickGELU},
    "distilled": {"img_size": (16, 24)},
}


def network(kind: str = "plain", **options: Any) -> VisionTransformer:
    """A small network of timm with filled float64 weights."""
    make = VisionTransformerDistilled if kind == "distilled" else VisionTransformer
    net = make(**SIZES | KINDS[kind] | options)
    fill_(net.double().eval(), 3)
    return net


def images(net: Any, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, *net.patch_embed.img_size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def masked(net: VisionTransformer, seed: int) -> GatedTimm:
    """A gated copy whose masks and gates switch off a random part: block 2 is skipped, in block 1 fc1 is stale."""
    model = gate_blocks(deepcopy(net))
    register_masks(model)
    update_masks_(model, *random_numbers(model, torch.Generator().manual_seed(seed)))
    make_stale_(model, seed)
    model.block_skip_gating[2] = torch.tensor([1.0, -1.0])
    return model


@torch.no_grad()
def zeroed(net: VisionTransformer, structure: Structure) -> VisionTransformer:
    """What pruning must equal: of the same sizes, zeros for all that goes, without the blocks that are skipped."""
    made, d = deepcopy(net), structure.head_dim
    for block, kept in zip(made.blocks, structure.blocks, strict=True):
        attn: Any = block.attn
        mlp: Any = block.mlp
        columns = torch.ones(structure.embed_dim)
        columns[list(kept.value_channels(d))] = 0
        attn.proj.weight[:, columns.bool()] = 0
        heads = torch.ones(structure.num_heads)
        heads[list(kept.heads)] = 0
        attn.qkv.weight.unflatten(0, (3, -1, d))[:, heads.bool()] = 0
        if attn.qkv.bias is not None:
            attn.qkv.bias.unflatten(0, (3, -1, d))[:, heads.bool()] = 0
        neurons = torch.ones(structure.hidden_dim)
        neurons[[*kept.neurons, *kept.constant_neurons]] = 0
        mlp.fc2.weight[:, neurons.bool()] = 0
        mlp.fc1.weight[list(kept.constant_neurons)] = 0
    made.blocks = nn.Sequential(*(made.blocks[index] for index in structure.running))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_is_exact_and_costs_what_the_model_of_the_cost_says(kind):
    net = network(kind)
    for seed in range(3):
        model = masked(net, seed)
        structure, x = Structure.from_model(model), images(net)
        small = leanvit.prune(net, structure)
        assert type(small) is type(net)
        assert {type(block.attn) for block in small.blocks} | {type(block.mlp) for block in small.blocks} == {
            Attention,
            Mlp,
        }
        with torch.no_grad():
            want = zeroed(net, structure)(x)
            assert (small(x) - want).abs().max() < 1e-12 * want.abs().max()
            assert (compress(model).network(x) - want).abs().max() < 1e-12 * want.abs().max()
            apply_masks_(model)
            assert (model(x) - want).abs().max() < 1e-12 * want.abs().max()
        cost = CostModel(model)
        assert count_operations(small, x[:1]).executed.macs == round(cost.of_structure(structure) * float(cost.full))
        assert count_operations(net, x[:1]).executed.macs == cost.full
        wide = prune(net, structure, multiple=16)
        assert all(block.mlp.fc1.out_features % 16 == 0 for block in wide.blocks)
        assert (wide(x) - small(x)).abs().max() < 1e-12


def test_the_cost_that_is_learned_is_that_of_the_structure_it_leads_to():
    model = gate_blocks(network("dinov2"))
    register_masks(model)
    s, r = random_numbers(model, torch.Generator().manual_seed(1))
    for numbers in (s, r):
        numbers.requires_grad_()
    cost, run = CostModel(model), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    ratio = cost.ratio(s, r, group_scores(model).heads, run)
    with torch.no_grad():
        model.block_skip_gating[2] = torch.tensor([1.0, -1.0])
        update_masks_(model, s, r)
    small = compress(model).network
    assert count_operations(small, images(small, 1)).executed.macs == pytest.approx(
        float(ratio.detach() * cost.full), rel=1e-12
    )
    assert torch.autograd.grad(ratio, r, allow_unused=True, retain_graph=True) == (
        None,
    )  # no dimension saves by itself
    assert bool((torch.autograd.grad(ratio, s)[0][[0, 1, 3]] < 0).all())


def test_a_branch_of_which_nothing_is_left_is_one_head_and_one_neuron_of_zeros():
    net = network("dinov2")
    model = gate_blocks(deepcopy(net))
    register_masks(model)
    with torch.no_grad():
        model.blocks[0].attn.proj.mask.zero_()
        model.blocks[1].mlp.fc2.mask.zero_()
        small, x = compress(model).network, images(net)
        apply_masks_(model)
        assert (small(x) - model(x)).abs().max() < 1e-12
    structure, cost = Structure.from_model(model), CostModel(model)
    assert count_operations(small, x[:1]).executed.macs == round(cost.of_structure(structure) * float(cost.full))


def test_gates_and_masks_come_and_go():
    net = network("distilled")
    names, kept = list(net.state_dict()), set(vars(net))
    model = register_masks(gate_blocks(deepcopy(net)))
    x = images(net)
    one, other = model.train()(x)
    assert not torch.equal(one, other)  # each head learns from its own teacher
    again = ungated(model)
    assert list(again.state_dict()) == names
    assert set(vars(again)) == kept
    assert torch.equal(again.eval()(x), net(x))


def test_a_pruned_network_takes_token_methods_as_the_zeroed_one_does(tmp_path):
    """Removed heads have no keys; ToMe compares tokens by the direction of their mean key."""
    net = network(img_size=32)
    structure = Structure.from_model(masked(net, 4))
    small, x = leanvit.prune(net, structure), images(net)
    with torch.no_grad():
        fast, want = leanvit.lean(small, "tome", r=6), leanvit.lean(zeroed(net, structure), "tome", r=6)
        assert fast.tokens_per_layer() == [65, 59, 53, 47]
        assert (fast(x) - want(x)).abs().max() < 1e-12 * want(x).abs().max()
        assert (fast.features(x) - want.features(x)).abs().max() < 1e-11
    assert fast.gmacs() < leanvit.lean(small).gmacs()
    assert export_torch(fast, tmp_path / "fast.pt2") < 1e-4
    with pytest.raises(UsageError, match=r"prune fast\.restore\(\)"):
        leanvit.prune(fast, structure)


class GatedAttention(Attention):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, gated=True, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mlp_layer": SwiGLU}, r"blocks\.0\.mlp is a SwiGLU: only neurons of timm's Mlp"),
        ({"attn_layer": GatedAttention}, r"blocks\.0\.attn\.gate reads every channel"),
        ({"scale_attn_norm": True}, r"blocks\.0\.attn\.norm normalises over all heads"),
        ({"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm normalises"),
        ({"proj_bias": False}, r"blocks\.0\.attn\.proj has no bias"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, r"blocks\.0 is a ParallelScalingBlock"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_the_name_of_the_module(options, words):
    with pytest.raises(UsageError, match=words):
        gate_blocks(VisionTransformer(**SIZES | options))


def test_structures_and_networks_that_do_not_fit():
    net = network()
    structure = Structure.from_model(masked(net, 1))
    small = prune(net, structure)
    with pytest.raises(UsageError, match=r"blocks\.\d"):
        prune(small, structure)  # again
    with pytest.raises(
        UsageError, match="embed_dim 32 instead of 64, num_heads 4 instead of 2, hidden_dim 128 instead"
    ):
        prune(timm.create_model("test_vit"), structure)
    with pytest.raises(ValueError, match="no structure"):
        prune(net, {"blocks": []})
    with pytest.raises(UsageError, match="Linear cannot be pruned"):
        prune(nn.Linear(3, 3), structure)
    with pytest.raises(UsageError, match="expected a Structure or the dict of a file"):
        prune(net, "structure.json")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="multiple: expected a whole number of at least 1, got 0"):
        prune(net, structure, multiple=0)
    with pytest.raises(UsageError, match="timm has no network 'test_vit9'; near are"):
        create("timm:test_vit9")
    with pytest.raises(UsageError, match="Eva cannot be pruned"), torch.device("meta"):
        create("timm:eva02_tiny_patch14_224")
    net.blocks[1] = net.blocks[0]
    with pytest.raises(UsageError, match=r"blocks\.1\.norm1\.weight is blocks\.0\.norm1\.weight, shared"):
        prune(net, structure)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": [0, 9]}, r"blocks\[0\]\.heads: expected whole numbers from 0 to 3, ascending"),
        ({"heads": [-1, 1]}, "heads"),
        ({"heads": [1, 1]}, "heads"),
        ({"dims": [[0, 8], [1]]}, "dims of head 0: expected whole numbers from 0 to 7"),
        ({"dims": [[0]]}, "expected those of each of 2 heads, got 1"),
        ({"neurons": [3, 3]}, "neurons"),
        ({"neurons": [-2]}, "neurons"),
        ({"constant_neurons": [200]}, "constant_neurons: expected whole numbers from 0 to 127"),
        ({"constant_neurons": [5]}, "neuron 5 is among neurons and constant_neurons"),
        ({"runs": "no"}, "runs: expected true or false"),
    ],
)
def test_indices_that_a_block_has_not_are_named(change, words):
    block = {"runs": True, "heads": [0, 1], "dims": [[0], [1]], "neurons": [5, 7], "constant_neurons": []}
    content = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 128, "num_patches": 16, "num_prefix_tokens": 1}
    assert Structure.from_dict(content | {"blocks": [block] * 4}).blocks[0].num_values == 2
    with pytest.raises(ValueError, match=words):
        Structure.from_dict(content | {"blocks": [block | change] + [block] * 3})


# The programs

MODEL = ["--model_type", "timm:test_vit2"]
RUN = ["--num_workers", "0", "--device", "cpu", "--train_batch_size", "8", "--mixup", "0", "--cutmix", "0"]


def test_from_a_checkpoint_of_ones_own_to_an_exported_smaller_network(material, tmp_path, caplog):
    torch.manual_seed(0)
    own = timm.create_model("test_vit2", img_size=48, num_classes=5)  # of another size, for other classes
    torch.save(own.state_dict(), tmp_path / "own.pth")
    words = [*MODEL, "--img_size", "32", "--data_dir", material.data, *RUN, "--output_dir", str(tmp_path)]
    learning = ["--budget", "0.6", "--num_epochs", "1", "--warmup_epochs", "0", "--learning_rate", "1e-12"]
    learning += ["--soptim", "adam", "--slr", "20", "--distillation-type", "none", "--glr", "0"]
    words1 = [*words, *learning, "--model_path", str(tmp_path / "own.pth"), "--name", "one"]
    first = joint_train.main(words1)
    assert "head.weight is for 5 classes, the network has 2" in caplog.text
    file = tmp_path / "one" / "timm-test_vit2_1.pth.tar"
    state = load_safely(file)["model"]
    torch.testing.assert_close(state["blocks.0.attn.qkv.weight"], own.state_dict()["blocks.0.attn.qkv.weight"])
    again = ["--checkpoint_dir", str(file), *words[2:], "--name", "two", "--epochs", "1", "--warmup-epochs", "0"]
    second = post_train.main([*again, "--model_path", str(file)])
    assert first["remaining_cost_percent"] == pytest.approx(second["remaining_cost_percent"])
    best = tmp_path / "two" / "timm-test_vit2.pth.tar"
    facts = command.main(["--checkpoint", str(best), "--output", str(tmp_path / "small"), "--timm",
                          "--benchmark", "--rounds", "1", "--device", "cpu"])  # fmt: skip
    assert facts["real_gmacs"] == pytest.approx(facts["counted_gmacs"])
    assert facts["remaining_percent"] == pytest.approx(second["remaining_cost_percent"])
    assert facts["remaining_percent"] < 99
    x = torch.randn(2, 3, 32, 32)
    plain = in_timm_alone(str(tmp_path / "small.safetensors"))
    with torch.no_grad():
        want = load_masked(best).model(x)
        assert (plain(x) - want).abs().max() < 1e-5
        assert torch.equal(load_compact(tmp_path / "small.safetensors").network(x), plain(x))


def in_timm_alone(file: str) -> nn.Module:
    """The way that the README shows, without a line of ours."""
    from safetensors.torch import load_file

    state = load_file(file)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    net: Any = timm.create_model("test_vit2", img_size=32, num_classes=len(state["head.weight"]))
    net.blocks = net.blocks[:depth]
    for index, block in enumerate(net.blocks):
        inner = len(state[f"blocks.{index}.attn.qkv.weight"]) // 3
        size = block.attn.head_dim
        block.attn = Attention(net.embed_dim, inner // size, attn_head_dim=size, qkv_bias=True)
        block.mlp = Mlp(net.embed_dim, len(state[f"blocks.{index}.mlp.fc1.weight"]))
    net.load_state_dict(state)
    return net.eval()


def test_flags_and_files_that_do_not_fit_a_network_of_timm(material, tmp_path):
    words = [*MODEL, "--data_dir", material.data, *RUN, "--pretrained", "0", "--distillation-type", "none"]
    args = joint_train.parse_args(words)
    assert args.enable_patch_gating == 0
    for flag in ("--enable_patch_gating", "--enable_jumping"):
        with pytest.raises(UsageError, match=f"{flag}: a plain network of timm has no place"):
            joint_train.parse_args([*words, flag, "1"])
    with pytest.raises(UsageError, match="--img_size 40: patches of 16 pixels do not fill it"):
        joint_train.main([*words, "--img_size", "40", "--output_dir", ""])
    with pytest.raises(UsageError, match=r"blocks\.0\.attn is a DiffAttention"):
        joint_train.main([*words, "--model_type", "timm:vit_dwee_patch16_reg1_gap_256", "--output_dir", ""])
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"no 'head\.weight' in it, so it is not of timm's test_vit2"):
        load_masked(tmp_path / "x.pth", "timm:test_vit2")
