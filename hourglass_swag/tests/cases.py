"""Run a folder of reference vectors of this paper: ``python -m hourglass_swag.tests.cases DIR``.

A table says which function runs what is built: ``RUNNERS``, by the class or function that a case names. Each reads the
rest, configuration, input and outputs, from the case.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.hosts import Lean
from common.hosts.host import take_tokens
from common.measure.flops import CONVENTIONS, count_operations, count_parameters
from common.tests import reference
from common.tests.reference import Case, Checks, NotCovered, Runner
from hourglass_swag import evaluation
from hourglass_swag.models import ats_vision_transformer, evit, regnet, vision_transformer
from hourglass_swag.models.ops import ats
from hourglass_swag.models.ops.class_row import score_class_row
from hourglass_swag.models.ops.cluster import AvgPool, TokenClusteringBlock
from hourglass_swag.models.ops.reconstruction import NaiveUnpooling, TokenReconstructionBlock
from hourglass_swag.tests import tome_cases
from hourglass_swag.tests.counting import Seen, networks, steps, tokens_per_layer
from hourglass_swag.tests.method_cases import METHOD_RUNNERS, more_cases, run_hash
from hourglass_swag.tools import jit_handles
from hourglass_swag.tools.costs import depends_on_data
from hourglass_swag.tools.parser import boolean, get_default_parser, get_model_args

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "VisionTransformer": vision_transformer.VisionTransformer,
    **{f"ViT{size.upper()}": partial(vision_transformer.make_vit, size) for size in ("b16", "l16", "h14")},
    **networks("HourglassViT", "hourglass_vit"),
    **networks("EViT", "evit"),
    **networks("ATSVisionTransformer", "ats_vision_transformer", short="ATSViT"),
}


def run_network(case: Case, checks: Checks) -> None:
    """A whole network: output, gradients, resized position embedding, tokens and outputs of the layers, cost."""
    if isinstance(case.values, dict) and "per_op" in case.values:
        run_cost(case, checks)
        return
    make = NETWORKS[case.build["class"]]
    model = reference.build(make, case.seed, **case.build["kwargs"])
    if checkpoint := case.build.get("checkpoint"):
        load_checkpoint(case, checks, model, checkpoint)
    gradients = [name for name in case.outputs if name.startswith("grad:")]
    with steps(model) as seen, torch.set_grad_enabled(bool(gradients)):
        logits = model(case.read())
    parameters = dict(model.named_parameters())
    if gradients:
        case.read_loss(logits=logits, output=logits).backward()
    known: dict[str, Any] = {"output": logits, "logits": logits, "pos_embedding": parameters["encoder.pos_embedding"]}
    known |= {f"grad:{name}": parameter.grad for name, parameter in parameters.items()}
    known |= kept_patches(seen) | policies(seen)
    for name in case.outputs:
        if known.get(name) is None:
            raise NotCovered(f"output {name} of a network")
        checks.output(name, known[name])
    tokens = tokens_per_layer(model, case.read()) if isinstance(model, Lean) else []
    facts: dict[str, Any] = {
        "tokens entering each layer": tokens[:-1],
        "tokens leaving each layer": tokens[1:],
        "params": count_parameters(model),
        "state_dict_keys": len(model.state_dict()),
    }
    for name, value in case.values.items():
        if name not in facts:
            raise NotCovered(f"value {name} of a network")
        checks.equal(name, facts[name], value)


def load_checkpoint(case: Case, checks: Checks, model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Fill ``model`` otherwise and load the checkpoint that the case describes, which must not be changed by that."""
    reference.fill_(model, case.seed + 1)
    source = reference.build(NETWORKS[checkpoint["class"]], checkpoint["filled with seed"], **checkpoint["kwargs"])
    state = source.state_dict()
    shapes = {key: value.shape for key, value in state.items()}
    report = model.load_state_dict(state)
    checks.equal("missing and unexpected keys", (report.missing_keys, report.unexpected_keys), ([], []))
    checks.equal("shapes of the checkpoint", {key: value.shape for key, value in state.items()}, shapes)


def kept_patches(seen: list[Seen]) -> dict[str, Tensor]:
    """EViT's ``score_<i>`` and ``kept_<i>`` of the i-th layer that drops patches."""
    found: dict[str, Tensor] = {}
    for step, operands, left in seen:
        if not isinstance(step.method, evit.EViT) or step.hook != "between":
            continue
        tokens, parts = operands
        if left.x.shape[1] < tokens.x.shape[1]:
            index = len(found) // 2
            _, places = step.method.rank(step.layer, tokens, parts)
            number = 1 + places.shape[1]
            found[f"score_{index}"] = score_class_row(parts.q, parts.k) if parts.scores is None else parts.scores
            found[f"score_{index}"], found[f"kept_{index}"] = found[f"score_{index}"][:, 1:], places - 1
            torch.testing.assert_close(left.x[:, 1:number], take_tokens(tokens.x, places), rtol=0, atol=0)
    return found


def policies(seen: list[Seen]) -> dict[str, Tensor]:
    """ATS's ``policy_<layer>`` (B, U) of every layer that samples."""
    found: dict[str, Tensor] = {}
    for step, _, result in seen:
        if step.hook == "attend" and isinstance(step.method, ats_vision_transformer.ATS):
            x, mask = result[1].x, result[1].mask
            found[f"policy_{step.layer}"] = torch.ones(x.shape[:2]) if mask is None else mask[:, :, 0]
    return found


def gather_tokens(x: Tensor, positions: Tensor, policy: Tensor | None) -> Tensor:
    """Rows of ``x`` (B, N, C) at ``positions`` (B, U), zero where ``policy`` (B, U, 1) is 0: (B, U, C)."""
    rows = take_tokens(x, positions)
    return rows if policy is None else rows * policy


def run_sampling(case: Case, checks: Checks) -> None:
    """The steps of adaptive token sampling one by one."""
    names = case.names()
    drawn = {
        key: torch.from_numpy(reference.evaluate_text(call, names))
        for key, call in re.findall(r'(?=fill\.array\("(\w+)")(fill\.array\("\w+",\s*\([\d, ]+\)\))', case.text)
    }
    q, v, raw = drawn["q"], drawn["v"], drawn["raw"]
    k = torch.from_numpy(reference.array("k", q.shape, case.seed))
    policy = torch.ones(*raw.shape[:2], 1, dtype=torch.float64)
    if not (masked := re.search(r"last (\d+) tokens of the last sample 0", case.text)):
        raise NotCovered("a policy that does not mask tokens of the last sample")
    policy[-1, raw.shape[1] - int(masked[1]) :] = 0
    logits = (q / q.shape[2] ** 0.5 @ k.transpose(1, 2)).view(*v.shape[:3], -1)
    attention = ats.softmax_with_policy(logits, policy)
    scores, indices = ats.score_assignment_step(attention, v * policy[:, None])
    reference_tokens = case.build["kwargs"]["n_ref_tokens"]
    positions, counts = ats.inverse_transform_sampling(scores, indices, reference_tokens)
    survivors = (torch.arange(positions.shape[1]) < counts[:, None]).double()[..., None]
    rows = gather_tokens(attention.transpose(1, 2).flatten(2), positions, survivors)
    cdf = ats.normalized_cdf(scores)
    known = {
        "softmax": attention,
        "sorted_scores": scores,
        "sorted_indices": indices,
        "normalized_cdf": cdf,
        "ys": ats.create_ys(cdf, reference_tokens),
        "selected_x": gather_tokens(raw, positions, survivors),
        "selected_attn": rows.unflatten(2, attention.shape[1::2]).transpose(1, 2),
        "policy": survivors,
        "sampler": survivors.nonzero(),
    }
    for name in case.outputs:
        if name not in known:
            raise NotCovered(f"output {name} of adaptive token sampling")
        checks.output(name, known[name])


def run_unique(case: Case, checks: Checks) -> None:
    """``get_unique_indices`` of the rows given as input."""
    checks.output("unique", ats.get_unique_indices(torch.tensor(case.raw["input"]), **case.build["kwargs"]))


def run_regnet(case: Case, checks: Checks) -> None:
    """A RegNet or AnyNet: output in evaluation or training mode, running averages after it, stages, sizes."""
    kind, params = re.fullmatch(r"(\w+)\((\w+)\)", case.build["class"]).groups()  # pyright: ignore[reportOptionalMemberAccess]
    shape = getattr(regnet, params)(**case.build["kwargs"])
    model = reference.build(getattr(regnet, kind), case.seed, params=shape)
    training = any("train" in name or name.endswith("_after") for name in case.outputs)
    with torch.no_grad():
        output = model.train(training)(case.read())
    known = {"output_train" if training else "output": output}
    known |= {f"stem_{name}_after": value for name, value in model.get_submodule("stem.stem.1").named_buffers()}
    for name in case.outputs:
        if name not in known:
            raise NotCovered(f"output {name} of a RegNet")
        checks.output(name, known[name])
    facts: dict[str, Any] = {
        "stages": [list(stage) for stage in shape.get_expanded_params()],
        "params": count_parameters(model),
        "state_dict_keys": len(model.state_dict()),
    }
    for name, value in case.values.items():
        if name.split()[0] not in facts:
            raise NotCovered(f"value {name} of a RegNet")
        checks.equal(name, facts[name.split()[0]], value)


def run_complement(case: Case, checks: Checks) -> None:
    """``complement_idx`` of the rows given as input."""
    checks.output("complement", evit.complement_idx(torch.tensor(case.raw["input"]), **case.build["kwargs"]))


def run_cost(case: Case, checks: Checks) -> None:
    """Cost of a network: the published total."""
    make, options = NETWORKS[case.build["class"]], case.build["kwargs"]
    with torch.device("meta"):
        model = make(**options).eval()
    images = torch.empty_like(case.read(), device="meta", dtype=torch.float32)
    if depends_on_data(model):
        model, images = reference.build(make, case.seed, dtype=torch.float32, **options), case.read().float()
    checks.number("total", CONVENTIONS["swag"].total(count_operations(model, images).published), case.values["total"])


def run_block(case: Case, checks: Checks) -> None:
    """One encoder layer: its closed forms of cost, and its output where there is one."""
    block = reference.build(vision_transformer.EncoderBlock, case.seed, **case.build["kwargs"])
    x = case.read()
    x = x if isinstance(x, Tensor) else torch.from_numpy(x)
    for name, value in case.values.items():
        if name not in ("flops", "activations"):
            raise NotCovered(f"value {name} of EncoderBlock")
        checks.equal(name, block.flops(x) if name == "flops" else block.activations(x, x), value)  # pyright: ignore[reportCallIssue]
    if case.outputs:
        with torch.no_grad():
            checks.output(case.outputs[0], block(x))


def run_head(case: Case, checks: Checks) -> None:
    """The classification head alone."""
    head = reference.build(vision_transformer.VisionTransformerHead, case.seed, **case.build["kwargs"])
    with torch.no_grad():
        checks.output("output", head(torch.from_numpy(case.read())))


def run_clustering(case: Case, checks: Checks) -> None:
    """The clustering block, its initialisation alone (``method``), or the average pool of the ablation."""
    make = {"TokenClusteringBlock": TokenClusteringBlock, "AvgPool": AvgPool}[case.build["class"]]
    block = make(**case.build.get("kwargs", {}))
    features = torch.from_numpy(case.read())
    if method := case.build.get("method"):
        sides = {side: int(number) for side, number in re.findall(r"(width|height)\s*=\s*(\d+)", method)}
        centroids, labels = block.calc_init_centroid(features, **sides)  # pyright: ignore[reportCallIssue]
        checks.output("centroids", centroids)
        checks.output("labels", labels)
        return
    features.requires_grad_(any(name.startswith("grad") for name in case.outputs))
    number = case.build.get("forward num_spixels")
    centroids, labels = block(features) if number is None else block(features, number)
    checks.output("centroids", centroids)
    if labels is not None:
        checks.output("hard_labels", labels)
    if features.requires_grad:
        case.read_loss(centroids=centroids, output=centroids).backward()
        for name in case.outputs:
            if name.startswith("grad"):
                checks.output(name, features.grad)


def run_unpooling(case: Case, checks: Checks) -> None:
    """Both reconstructions; the settings of the weighted one are in the names of its outputs."""
    names = case.names()
    drawn = {
        key: torch.from_numpy(np.asarray(reference.evaluate_text(call, names)))
        for key, call in re.findall(r'(?=fill\.array\("(\w+)")(fill\.array\([^()]*\([^()]*\)[^()]*\))', case.text)
    }
    labels = torch.from_numpy(case.read("hard_labels"))
    for output in case.outputs:
        if output == "index":
            checks.output(output, labels)
        elif output == "naive":
            state = NaiveUnpooling().derive_unpooler()
            state.update_state(hard_labels=labels)
            checks.output(output, state.call(drawn["regions"])[0])
        elif setting := re.fullmatch(r"tsa_k(-?\d+)_t([\d.e+-]+)_s([\d.e+-]+?)(?:_(l1|l2))?", output):
            scale = float(setting[3])
            block = TokenReconstructionBlock(int(setting[1]), float(setting[2]), normalize=setting[4] or "l2")  # pyright: ignore[reportArgumentType]
            state = block.derive_unpooler()
            state.update_state(feat_before_pooling=scale * drawn["before"])
            state.update_state(feat_after_pooling=scale * drawn["after"])
            checks.output(output, state.call(drawn["regions"])[0])
        else:
            raise NotCovered(f"output {output} of token reconstruction")


def run_handles(case: Case, checks: Checks) -> None:
    """Cost of single operations from shapes."""
    for value in case.values:
        handle = getattr(jit_handles, value["handle"], None)
        if handle is None:
            raise NotCovered(f"cost handle {value['handle']}")
        checks.equal(
            value["handle"], dict(handle(value["inputs"], value["outputs"], **value["kwargs"])), value["count"]
        )


def run_command_line(case: Case, checks: Checks) -> None:
    """Namespace and keyword arguments of command lines.

    The published flags of type bool take the word False as True; here they mean what they say, so such a flag is
    expected to be what its word says.
    """
    for line in case.values:
        args = get_default_parser().parse_args(line["argv"])
        words = dict(zip(line["argv"], line["argv"][1:], strict=False))
        said = {flag[2:]: boolean(words[flag]) for flag in ("--act_group_q", "--act_group_k") if flag in words}
        for name, value in line.get("namespace", {}).items():
            checks.equal(f"{line['argv']} {name}", getattr(args, name), said.get(name, value))
        expected = {name: said.get(name, value) for name, value in line["model_kwargs"].items()}
        checks.equal(f"{line['argv']} model arguments", get_model_args(args), expected)


def run_lines(case: Case, checks: Checks) -> None:
    """``accuracy``, and the lines printed from the meter updates that the case describes."""
    names = case.names()
    logits, target = (
        torch.from_numpy(reference.evaluate_text(reference.find_expression(case.text, names, word), names))
        for word in ("logits", "target")
    )
    acc1, acc5 = evaluation.accuracy(logits, target, topk=(1, 5))
    checks.output("acc1", acc1)
    checks.output("acc5", acc5)
    times, losses = (
        [float(number) for number in re.findall(r"[\d.]+\d", found[1])]
        for word in ("times", "losses")
        if (found := re.search(rf"{word} ([\d., ]+)", case.raw["what"]))
    )
    made = re.search(r"ProgressMeter\((\d+), prefix='([^']*)'\)", case.build["function"])
    if not made:
        raise NotCovered("lines of anything but ProgressMeter(number, prefix)")
    meters = evaluation.make_meters()
    progress = evaluation.ProgressMeter(int(made[1]), meters, prefix=made[2])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for i, (seconds, loss) in enumerate(zip(times, losses, strict=True)):
            for meter, value in zip(meters, (seconds, loss, float(acc1) + i, float(acc5)), strict=True):
                meter.update(value)
            progress.display(i)
        progress.display_summary()
    checks.equal("stdout", printed.getvalue(), case.values["stdout"])


def run_transform(case: Case, checks: Checks) -> None:
    """The evaluation transform of one image; Pillow's versions differ by a grey level here and there."""
    start = case.text.find("clip(")
    if start < 0:
        raise NotCovered("an image that is not made with clip()")
    names = case.names()
    pixels = reference.evaluate_text(reference.leading_expression(case.text[start:], names), names)
    image = Image.fromarray(pixels.astype(np.uint8))
    tensor = evaluation.transform_image(image, **case.build["kwargs"])
    checks.output("tensor", tensor, absolute=True)
    if found := re.search(r"mean abs error < ([\d.e-]+)", str(case.raw.get("tolerance", ""))):
        want = checks.stored.get(f"{case.name}/tensor")
        if want is not None and want.shape == tuple(tensor.shape):
            error = float(np.abs(tensor.numpy() - want).mean())
            if not error < float(found[1]):
                checks.fail(f"tensor differs by {error:.2e} on average, allowed is {found[1]}")


RUNNERS: dict[str, Runner] = {
    **dict.fromkeys(NETWORKS, run_network),
    "EncoderBlock": run_block,
    "VisionTransformerHead": run_head,
    "TokenClusteringBlock": run_clustering,
    "AvgPool": run_clustering,
    "NaiveUnpooling / TokenReconstructionBlock": run_unpooling,
    "NaiveUnpooling": run_unpooling,
    "TokenReconstructionBlock": run_unpooling,
    "RegNet(RegNetParams)": run_regnet,
    "AnyNet(AnyNetParams)": run_regnet,
    "complement_idx": run_complement,
    "softmax_with_policy, score_assignment_step, create_ys, inverse_transform_sampling": run_sampling,
    "get_unique_indices": run_unique,
    "tools.jit_handles": run_handles,
    "get_default_parser().parse_args, get_model_args": run_command_line,
    "transform_image": run_transform,
    **METHOD_RUNNERS,
}


def find_runner(case: Case) -> Runner:
    """The function that runs a case."""
    built = case.build.get("class") or case.build.get("function") or case.build.get("functions") or ""
    built = built if isinstance(built, str) else ", ".join(built)
    if built in RUNNERS:
        return RUNNERS[built]
    if "AverageMeter" in built:
        return run_lines
    if runner := tome_cases.find_runner(built):
        return runner
    if built.startswith("hash with"):
        return run_hash
    raise NotCovered(f"no runner for {built or 'a case that names neither class nor function'}")


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if any case fails."""
    return reference.main(find_runner, argv, program="python -m hourglass_swag.tests.cases", more_cases=more_cases)


if __name__ == "__main__":
    sys.exit(main())
