"""Reference vectors of token merging: the runners that ``cases`` adds to its table."""

import dataclasses
import re
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.models import deit
from timm.models import vision_transformer as timm_models
from torch import Tensor, nn

from common.measure.flops import CONVENTIONS, count_operations
from common.tests import reference
from common.tests.reference import Case, Checks, NotCovered, Runner
from hourglass_swag.models import vision_transformer
from hourglass_swag.models.ops.tome import make_visualization, merge, parse_r, patch
from hourglass_swag.tools.flop_count import flop_count

MATCHINGS = ("bipartite_soft_matching", "kth_bipartite_soft_matching", "random_bipartite_soft_matching")


def run_matching(case: Case, checks: Checks) -> None:
    """One matching: merging in every mode, undoing it, weighted averages and source tracing.

    ``mean_official`` of the ablations is the published mean, which leaves the destination out of the count: it is
    compared with sum and count, and the mean of this code with the right quotient.
    """
    metric = torch.from_numpy(case.read("metric"))
    text = case.text.replace("same shape", str(tuple(metric.shape)))
    x = torch.from_numpy(dataclasses.replace(case, text=text).read("x"))
    options = dict(case.build["kwargs"])
    if case.build["function"].startswith("random"):
        options["draw"] = torch.from_numpy(reference.array("draw", (*metric.shape[:2], 1), case.seed))
    merged, unmerge = getattr(merge, case.build["function"])(metric, **options)
    total = merged(x, mode="sum")
    count = merged(torch.ones_like(x[..., :1]), mode="sum")
    torch.testing.assert_close(merged(x, mode="mean"), total / count)
    plain = merge.merge_wavg(merged, x)
    sizes = torch.arange(1.0, x.shape[1] + 1, dtype=x.dtype)[None, :, None].expand(len(x), -1, -1)
    weighted = merge.merge_wavg(merged, x, sizes)
    known = {
        "sum": total,
        "mean": merged(x, mode="mean"),
        "amax": merged(x, mode="amax"),
        "mean_official": total / (count - 1).clamp_min(1),
        "unmerge_of_sum": unmerge(total),
        "wavg": plain[0],
        "size": plain[1],
        "wavg_weighted": weighted[0],
        "size_weighted": weighted[1],
        "source": merge.merge_source(merged, x),
    }
    for name in case.outputs:
        if name not in known:
            raise NotCovered(f"output {name} of a matching")
        checks.output(name, known[name])


def run_schedules(case: Case, checks: Checks) -> None:
    """``parse_r`` of every value."""
    for value in case.values:
        r = tuple(value["r"]) if value["kind"] == "tuple" else value["r"]
        checks.equal(f"r = {r}", parse_r(value["num_layers"], r), value["schedule"])


def run_visualization(case: Case, checks: Checks) -> None:
    """The image of merged groups; a grey level is allowed, as colours are rounded."""
    names = case.names()
    start = case.text.find("clip(")
    if start < 0:
        raise NotCovered("an image that is not made with clip()")
    pixels = reference.evaluate_text(reference.leading_expression(case.text[start:], names), names)
    source = torch.from_numpy(case.read("source"))
    image = make_visualization(Image.fromarray(pixels.astype(np.uint8)), source, **case.build["kwargs"])
    checks.output("image", np.asarray(image), tolerance=1)


def build_patched(case: Case, *, device: str = "cpu") -> nn.Module:
    """The network of a case, filled and patched, with r set."""
    name, _, how = case.build["class"].rpartition(" then tome.patch.")
    kwargs = dict(case.build["kwargs"])
    r = kwargs.pop("r", case.build.get("r", 0))
    if how == "timm":
        make: Any = deit.VisionTransformerDistilled if kwargs.pop("distilled", False) else timm_models.VisionTransformer
    else:
        make = getattr(vision_transformer, name.rpartition(".")[2], None)
    if make is None:
        raise NotCovered(f"token merging in {name}")
    with torch.device(device):
        model = reference.build(make, case.seed, **kwargs) if device == "cpu" else make(**kwargs).eval()
    model = getattr(patch, how)(model, **case.build.get("patch", {}))
    cast(Any, model).r = tuple(r) if case.build.get("r is a tuple") else r
    return model


def run_patched(case: Case, checks: Checks) -> None:
    """A patched network: output, gradients, sizes, sources, tokens of the layers; or its cost."""
    if isinstance(case.values, dict) and "per_op" in case.values:
        run_cost(case, checks)
        return
    model = build_patched(case)
    tokens = cast(Any, model).tokens_per_layer()[1:]
    gradients = [name for name in case.outputs if name.startswith("grad:")]
    with torch.set_grad_enabled(bool(gradients)):
        logits = model(case.read())
    if gradients:
        case.read_loss(logits=logits, output=logits).backward()
    info = cast(Any, model)._tome_info
    known: dict[str, Tensor | None] = {"output": logits, "logits": logits}
    known |= {"size": info["size"], "source": info["source"]}
    known |= {f"grad:{name}": parameter.grad for name, parameter in model.named_parameters()}
    for name in case.outputs:
        if known.get(name) is None:
            raise NotCovered(f"output {name} of a patched network")
        checks.output(name, known[name])
    for name, value in case.values.items():
        if name == "state_dict_keys":
            checks.equal("missing keys", sorted(set(value) - set(model.state_dict())), [])
        elif name == "tokens leaving each layer":
            checks.equal(name, tokens, value)
        else:
            raise NotCovered(f"value {name} of a patched network")


def run_cost(case: Case, checks: Checks) -> None:
    """Costs of a patched network."""
    model = cast(Any, build_patched(case, device="meta"))
    images = torch.empty_like(case.read(), device="meta", dtype=torch.float32)
    checks.number("total", CONVENTIONS["swag"].total(count_operations(model, images).published), case.values["total"])
    checks.number("total of flop_count", 1e9 * sum(flop_count(model, (images,)).values()), case.values["total"])


def find_runner(built: str) -> Runner | None:
    """The function that runs a case that builds ``built``; None if it is not about token merging."""
    if re.search(r" then tome\.patch\.(swag|timm)$", built):
        return run_patched
    return RUNNERS.get(built)


RUNNERS: dict[str, Runner] = {
    **dict.fromkeys(MATCHINGS, run_matching),
    "parse_r": run_schedules,
    "make_visualization": run_visualization,
}
