"""Reference vectors of ACT, SMYRF and Evo-ViT: the runners that ``cases`` adds to its table, and the files beside them.

In these cases ``input`` maps a name to an expression, with a type behind " -> ". The random projections are replaced by
deterministic ones, numbered in the order of hashing, unless the case seeds torch's own generator (``manual_seed``).
"""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.hosts import Tokens
from common.hosts.runner import attend
from common.measure.flops import CONVENTIONS, count_parameters
from common.tests import reference
from common.tests.reference import Case, CaseError, Checks, NotCovered, Runner
from hourglass_swag.host import SwagBlock
from hourglass_swag.models import REGISTRY, create, evo_vit
from hourglass_swag.models.act_vision_transformer import attentions, clusters
from hourglass_swag.models.ops.ACT.ada_clustering_attention import (
    AdaClusteringAttention,
    calc_center,
    copy_to_members,
    hash_codes,
)
from hourglass_swag.models.ops.ACT.attention_layer import AdaMultiheadAttention
from hourglass_swag.models.ops.ACT.extensions import ada_cluster_, broadcast_, weighted_sum_
from hourglass_swag.models.ops.smyrf.attn import SmyrfAttention
from hourglass_swag.models.ops.smyrf.smyrf_attn import SmyrfMultiheadAttention
from hourglass_swag.models.ops.smyrf.utils import E2LSH, EXTRA_CHANNELS, XBOXPLUS, lsh_clustering
from hourglass_swag.models.vision_transformer import EncoderBlock
from hourglass_swag.tests.counting import Seen, count_with_clusters, networks, published_ops, steps
from hourglass_swag.tools.costs import build_network, parse_network
from hourglass_swag.tools.flop_count import flop_count
from hourglass_swag.tools.parser import get_model_args

CORES = (AdaClusteringAttention, SmyrfAttention)
SINGLE_TOLERANCE = 1e-6  # of cases whose name ends in _float32
COUNT_TOLERANCE = 300  # operations, on small networks: the published tool counts arithmetic on shapes, too
PUBLISHED_TOLERANCE = 25_000  # operations, at full size

METHOD_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **networks("ActVisionTransformer", "act_vision_transformer", short="ActViT"),
    **networks("SmyrfVisionTransformer", "smyrf_vision_transformer", short="SmyrfViT"),
    **networks("EvoViT", "evo_vit"),
}


# Reading


def read_input(case: Case, name: str) -> Any:
    """One input of a case: a tensor, or what else the expression gives."""
    text, _, dtype = case.raw["input"][name].partition(" -> ")
    value = reference.evaluate_text(text, case.names())
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        return value
    dtype = dtype.strip() or (case.raw["input"].get("dtype") if value.is_floating_point() else "")
    return value.to(getattr(torch, dtype)) if dtype else value


def tolerance(case: Case) -> float | None:
    """Tolerance of an output; None for that of the case."""
    return SINGLE_TOLERANCE if case.name.endswith("_float32") else None


@dataclasses.dataclass
class Hashing:
    """What was drawn and hashed while a case ran."""

    draws: int = 0
    codes: list[Tensor] = dataclasses.field(default_factory=list)


@contextmanager
def projections(case: Case) -> Iterator[Hashing]:
    """The projections of a case in every hash, numbered from 0; or torch's generator seeded as the case says."""
    seen = Hashing()
    published = {core: core.draw for core in CORES}
    hash_method = AdaClusteringAttention.hash

    def draw(core: nn.Module, dim: int, n_hashes: int, device: torch.device, dtype: torch.dtype) -> Any:
        seen.draws += 1
        if "manual_seed" in case.raw:
            return published[type(core)](core, dim, n_hashes, device, dtype)
        alpha, beta = fixed_projections(case.seed, seen.draws - 1, dim, n_hashes)
        return alpha.to(device, dtype), beta.to(device, dtype)

    def remember(core: AdaClusteringAttention, vectors: Tensor, n_hashes: int) -> Tensor:
        seen.codes.append(hash_method(core, vectors, n_hashes))
        return seen.codes[-1]

    for core in CORES:
        core.draw = draw
    AdaClusteringAttention.hash = remember
    try:
        if "manual_seed" in case.raw:
            torch.manual_seed(case.raw["manual_seed"])
        yield seen
    finally:
        for core in CORES:
            core.draw = published[core]
        AdaClusteringAttention.hash = hash_method


def fixed_projections(seed: int, call: int, dim: int, n_hashes: int) -> tuple[Tensor, Tensor]:
    """The projections of the i-th hash of a forward pass."""
    alpha = reference.array(f"alpha-{call}", (dim, n_hashes), seed)
    beta = np.abs(reference.array(f"beta-{call}", (n_hashes,), seed)) % 1
    return torch.from_numpy(alpha), torch.from_numpy(beta)


def check_outputs(case: Case, checks: Checks, known: dict[str, Any]) -> None:
    """Compare every output of the case."""
    for name in case.outputs:
        if name not in known:
            raise NotCovered(f"output {name} of {case.build}")
        checks.output(name, known[name], tolerance=tolerance(case))


# Operators and attention


def run_operator(case: Case, checks: Checks) -> None:
    """One of the three operators of ACT."""
    function = case.build["function"]
    if function == "ada_cluster_":
        groups, counts = ada_cluster_(read_input(case, "hashes"))
        check_outputs(case, checks, {"groups": groups, "counts": counts})
        return
    groups, weights = read_input(case, "groups"), read_input(case, "weights")
    if function == "weighted_sum_":
        check_outputs(case, checks, {"y": weighted_sum_(read_input(case, "x"), groups, weights)})
    else:
        check_outputs(case, checks, {"x": broadcast_(read_input(case, "y"), groups, weights)})


def run_center(case: Case, checks: Checks) -> None:
    """Means and copies of groups, and their gradients; the groups are an output of the case."""
    groups = torch.from_numpy(checks.stored[f"{case.name}/g"])
    number = int(groups.max()) + 1
    counts = F.one_hot(groups.long(), number).sum(1)
    x, y = (read_input(case, name).requires_grad_() for name in ("x", "y"))
    center, copied = calc_center(x, groups, counts), copy_to_members(y, groups)
    center.backward(read_input(case, "upstream of the mean"))
    copied.backward(read_input(case, "upstream of broadcast"))
    known = {"g": groups, "counts": counts, "center": center, "bcast": copied, "grad_x": x.grad, "grad_y": y.grad}
    check_outputs(case, checks, known)


def run_hash(case: Case, checks: Checks) -> None:
    """Codes, and the groups they give."""
    vectors = read_input(case, "V")
    found = re.search(r"r\s*=\s*([\d.]+)", case.build["function"])
    width = float(found[1]) if found else 8.0
    alpha, beta = fixed_projections(case.seed, 0, vectors.shape[-1], case.build["n_hashes"])
    hashes = hash_codes(vectors, alpha, beta, width)
    groups, counts = ada_cluster_(hashes)
    check_outputs(case, checks, {"hashes": hashes, "groups": groups, "counts": counts})


def run_attention(case: Case, checks: Checks) -> None:
    """The attention core of ACT or SMYRF: output, codes or orders, cluster counts, gradients."""
    core = {"AdaClusteringAttention": AdaClusteringAttention, "SmyrfAttention": SmyrfAttention}[case.build["class"]]
    core = core(**case.build["kwargs"]).eval()
    q, k, v = (read_input(case, name).requires_grad_() for name in "qkv")
    options = {}
    if "key_padding_mask" in case.raw["input"]:
        mask = torch.as_tensor(read_input(case, "key_padding_mask"))
        options["key_padding_mask"] = mask.repeat_interleave(len(q) // len(mask), dim=0)
    if isinstance(core, SmyrfAttention):
        options = {"norm_factor": case.build.get("norm_factor", 1.0), "return_attn_map": True}
    known: dict[str, Any] = {}
    with projections(case) as hashing:
        out = core(q, k, v, **options)
    if isinstance(core, SmyrfAttention):
        out, (known["order_q"], known["order_k"]) = out
    else:
        sides = [side for side, grouped in (("q", core.group_Q), ("k", core.group_K)) if grouped]
        known |= {f"hashes_{side}": codes for side, codes in zip(sides, hashing.codes, strict=True)}
        clusters = {"clusters_q": core.Q_clusters, "clusters_k": core.K_clusters}
        checks.equal("clusters", clusters, case.raw.get("clusters", clusters))
    check_draws(case, checks, hashing)
    known["out"] = out
    if "g" in case.raw["input"]:
        out.backward(read_input(case, "g"))
        known |= {"grad_q": q.grad, "grad_k": k.grad, "grad_v": v.grad}
    check_outputs(case, checks, known)


def check_draws(case: Case, checks: Checks, hashing: Hashing) -> None:
    """Compare the number of projections drawn with the one that the case states."""
    if "draws" in case.raw:
        checks.equal("draws", hashing.draws, case.raw["draws"])


def run_multi_head(case: Case, checks: Checks) -> None:
    """Attention with projections, (tokens, batch, width): of ``x`` to itself, or of ``query`` to ``key``, ``value``."""
    make = {"AdaMultiheadAttention": AdaMultiheadAttention, "SmyrfMultiheadAttention": SmyrfMultiheadAttention}
    module, inputs = reference.build(make[case.build["class"]], case.seed, **case.build["kwargs"]), case.raw["input"]
    drawn = {name: read_input(case, name) for name in ("x", "query", "key", "value") if name in inputs}
    with_gradients = any(name.startswith("grad_") for name in case.outputs)
    if with_gradients:
        drawn = {name: tensor.requires_grad_() for name, tensor in drawn.items()}
    operands = [drawn["x"]] * 3 if "x" in drawn else [drawn[name] for name in ("query", "key", "value")]
    options = {}
    if "key_padding_mask" in inputs:
        options["key_padding_mask"] = torch.as_tensor(read_input(case, "key_padding_mask"))
    with projections(case) as hashing, torch.set_grad_enabled(with_gradients):
        out, weights = module(*operands, **options)
    checks.equal("second result", weights, None)
    check_draws(case, checks, hashing)
    if with_gradients:
        out.backward(read_input(case, "g"))
    check_outputs(case, checks, {"out": out} | {f"grad_{name}": tensor.grad for name, tensor in drawn.items()})


def run_lift(case: Case, checks: Checks) -> None:
    """SMYRF's lift, values on the random lines, and both orders."""
    q, k = read_input(case, "q"), read_input(case, "k")
    lift = XBOXPLUS(q, k)
    alpha, beta = fixed_projections(case.seed, 0, q.shape[-1] + EXTRA_CHANNELS, case.build["n_hashes"])
    beta = beta * case.build.get("r", 1)
    orders = lsh_clustering(q, k, alpha, beta)
    values = E2LSH(alpha, beta)(lift.Q())
    known = {"Q": lift.Q(), "K": lift.K(), "values_q": values, "order_q": orders[0], "order_k": orders[1]}
    check_outputs(case, checks, known)


def run_evo_block(case: Case, checks: Checks) -> None:
    """One layer of Evo-ViT: tokens and class attention."""
    kwargs = dict(case.build["kwargs"])
    ratio, tradeoff = kwargs.pop("prune_ratio", 1.0), kwargs.pop("tradeoff", 0.5)
    block = reference.build(EncoderBlock, case.seed, **kwargs)
    method = evo_vit.EvoViT(keep=(ratio, 0.5), tradeoff=(tradeoff,) * 2, representative=False)  # a later layer prunes
    x, attention = read_input(case, "x").transpose(0, 1), read_input(case, "cls_attn")
    carried = {} if attention is None else {"evo_vit": evo_vit.Evolution(attention)}
    tokens, view = Tokens(x, 1, None, carried=carried), SwagBlock(block, "block")
    with torch.no_grad():
        tokens = method.before(0, tokens) if ratio != 1 else tokens
        parts = view.qkv(tokens.x, None)
        tokens = method.between(0, tokens.update(x=tokens.x + view.project(attend(parts, tokens), parts)), parts)
        tokens = tokens.update(x=tokens.x + view.mlp(tokens.x))
        tokens = method.after(0, tokens) if ratio != 1 else tokens
    known = {"out": tokens.x.transpose(0, 1), "cls_attn": tokens.carried["evo_vit"].attention}
    check_outputs(case, checks, known)


# Networks


def run_method_network(case: Case, checks: Checks) -> None:
    """A whole network: logits, layers, class attention, clusters, parameters; or gradients in training mode."""
    model = reference.build(METHOD_NETWORKS[case.build["class"]], case.seed, **case.build["kwargs"])
    if "params" in case.raw:
        checks.equal("params", count_parameters(model), case.raw["params"])
    images = read_input(case, "x")
    training = "loss" in case.outputs
    seen: list[Tokens] = []
    with projections(case) as hashing, torch.set_grad_enabled(training), steps(model) as acted:
        model.train(training)
        run = model.plan.run
        model.plan.run = lambda tokens, **unseen: run(tokens, seen=seen)  # pyright: ignore[reportAttributeAccessIssue]
        logits = model(images)
    check_draws(case, checks, hashing)
    if "clusters" in case.raw:
        checks.equal("clusters", clusters(model), case.raw["clusters"])
    known: dict[str, Any] = {"logits": logits}
    if training:
        known |= loss_and_gradients(model, logits)
        check_outputs(case, checks, known)
        return
    leaving = torch.stack([tokens.x.transpose(0, 1) for tokens in leaving_layers(seen, acted)])  # (layers, N, B, C)
    known["after_layer"] = leaving
    known["layer_rms"] = leaving.square().mean((1, 2, 3)).sqrt()
    known["last_cls16"] = leaving[-1, 0, :, :16]
    pruned = [operands[0].carried["evo_vit"].attention for step, operands, _ in acted if step.hook == "before"]
    if pruned:
        known["cls_attn_before_sort"] = torch.stack(pruned)
        known["sort_index"] = torch.stack([cls_attn.argsort(dim=1, descending=True) for cls_attn in pruned])
        want = case.raw["outputs"].get("cls_attn_before_sort", ())
        if len(want) == 2:  # abridged: the beginning of what enters the last pruned layer
            known["cls_attn_before_sort"] = pruned[-1][:, : want[1]]
    check_outputs(case, checks, known)


def leaving_layers(seen: list[Tokens], acted: list[Seen]) -> list[Tokens]:
    """Tokens that leave each layer: those that enter the next, before a method of that layer changes them."""
    before = {step.layer: operands[0] for step, operands, _ in acted if step.hook == "before"}
    return [before.get(layer + 1, tokens) for layer, tokens in enumerate(seen[1:])]


def loss_and_gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Cross-entropy against classes 0, 1, ..., gradients by name with | for ., and the norm of all."""
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    return {"loss": loss, "grad_norm": norm} | {name.replace(".", "|"): grad for name, grad in gradients.items()}


# Files beside cases.json


def more_cases(folder: Path) -> list[Case]:
    """Cases of the other files of such a folder: costs, command lines, manifests; none where there are no such files.

    Raises:
        CaseError: if a file is not valid JSON.
    """
    cases: list[Case] = []
    for entry in read_json(folder / "cost_cases.json", []):
        cases.append(make_case(f"cost_{entry['name']}", "cost", entry))
    for entry in read_json(folder / "cost_published.json", []):
        cases.append(make_case(f"published_{entry['flags'].removeprefix('-m ').replace(' ', '_')}", "published", entry))
    if (folder / "cli.json").is_file():
        lines = read_json(folder / "cli.json", [])
        build = {"function": "get_default_parser().parse_args, get_model_args"}
        cases.append(Case("cli", 0, build, "", (), lines, {}))
    for path in sorted(folder.glob("manifest_*.json")):
        if (name := path.stem.removeprefix("manifest_")) in REGISTRY:
            cases.append(make_case(path.stem, "manifest", {"model": name, **read_json(path, {})}))
    return cases


def read_json(path: Path, default: Any) -> Any:
    """Content of a file, or ``default`` where there is none."""
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CaseError(f"{path} is not valid JSON: {error}") from error


def make_case(name: str, kind: str, entry: dict[str, Any]) -> Case:
    """An entry of a file beside cases.json as a case."""
    return Case(name, int(entry.get("seed", 0)), {"function": f"file: {kind}"}, "", (), {}, entry)


def run_manifest(case: Case, checks: Checks) -> None:
    """Names, shapes and order of the state dict of a network of the registry, and its number of parameters."""
    entry = dict(case.raw)
    name, params = entry.pop("model"), entry.pop("params", None)
    state = entry.get("state_dict", entry)
    with torch.device("meta"):
        model = create(name)
        if tokens := state.get("encoder.pos_embedding"):
            side = round((tokens[0] - 1) ** 0.5) * model.patch_size  # pyright: ignore[reportOperatorIssue]
            model = create(name, image_size=side)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    checks.equal("keys", list(shapes), list(state))
    checks.equal("shapes", shapes, state)
    if params is not None:
        checks.equal("params", count_parameters(model), params)


def run_method_cost(case: Case, checks: Checks) -> None:
    """Cost of a small network, per operation."""
    raw = case.raw
    model = reference.build(METHOD_NETWORKS[raw["class"]], case.seed, **raw["kwargs"])
    images = read_input(dataclasses.replace(case, raw={**raw, "input": {"x": raw["input"]}}), "x")
    with projections(case):
        counted = {key: round(1e9 * value) for key, value in flop_count(model, (images,)).items()}
    if raw.get("clusters"):
        checks.equal("clusters", clusters(model), raw["clusters"])  # pyright: ignore[reportCallIssue]
        given = count_with_clusters(copy.deepcopy(model), raw["clusters"]).published
        checks.equal("total for these clusters", CONVENTIONS["swag"].total(given), sum(counted.values()))
    expected = dict(raw["flops"])
    expected["bmm"] = expected.get("bmm", 0) + expected.pop("matmul", 0)
    for key in {*expected, *counted}:
        if abs(counted.get(key, 0) - expected.get(key, 0)) > COUNT_TOLERANCE:
            checks.fail(f"{key} is {counted.get(key, 0)}, expected {expected.get(key, 0)} +- {COUNT_TOLERANCE}")
    checks.number("total", sum(counted.values()), raw["total"], tolerance=COUNT_TOLERANCE / raw["total"])


def run_published_cost(case: Case, checks: Checks) -> None:
    """Cost of a published row at full size, from its command line."""
    raw = case.raw
    args = parse_network(raw["flags"])
    checks.equal("resolution", args.resolution, raw["resolution"])
    given = get_model_args(args)
    stated = raw.get("model_kwargs", {})
    checks.equal("model arguments", {name: given.get(name) for name in stated}, stated)
    with torch.device("meta"):
        model = build_network(args)
    total = CONVENTIONS["swag"].total
    if raw.get("official_gflops") is not None:
        counted = total(published_ops(model))
        check_gflops(checks, counted, raw["official_gflops"])
        published = str(raw["published_gflops"])
        digits = len(published.partition(".")[2])
        checks.equal("published digits", round(counted / 1e9, digits), raw["published_gflops"])
    if run := raw.get("official_run_with_random_weights"):
        check_gflops(checks, total(count_with_clusters(model, run["clusters_per_layer"]).published), run["gflops"])
    if "implied_mean_clusters_per_layer" in raw:
        layers = len(attentions(model))
        one, two = (total(count_with_clusters(model, [number] * layers).published) for number in (1, 2))
        implied = 1 + (1e9 * raw["published_gflops"] - one) / (two - one)
        if abs(implied - raw["implied_mean_clusters_per_layer"]) > 1:
            checks.fail(f"implied clusters are {implied}, expected {raw['implied_mean_clusters_per_layer']}")


def check_gflops(checks: Checks, got: int, want: float) -> None:
    """Operations against G, to the accuracy of the published tool's closed form."""
    checks.number("GFLOPs", got / 1e9, want, tolerance=PUBLISHED_TOLERANCE / 1e9 / want)


METHOD_RUNNERS: dict[str, Runner] = {
    **dict.fromkeys(METHOD_NETWORKS, run_method_network),
    **dict.fromkeys(("ada_cluster_", "weighted_sum_", "broadcast_"), run_operator),
    "CalcCenter, Broadcast": run_center,
    **dict.fromkeys(("AdaClusteringAttention", "SmyrfAttention"), run_attention),
    **dict.fromkeys(("AdaMultiheadAttention", "SmyrfMultiheadAttention"), run_multi_head),
    "XBOXPLUS, E2LSH, lsh_clustering": run_lift,
    "EvoEncoderBlock": run_evo_block,
    "file: cost": run_method_cost,
    "file: published": run_published_cost,
    "file: manifest": run_manifest,
}
