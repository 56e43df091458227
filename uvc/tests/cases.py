"""Run a folder of reference vectors of this paper: ``python -m uvc.tests.cases DIR``.

``find_runner`` picks the function that runs a case by what it builds and by the first words of its name. Everything
else, configuration, gates, noise, settings and outputs, is read from the case.
"""

import json
import sys
from pathlib import Path

import torch

from common.measure.flops import count_parameters
from common.tests import reference
from common.tests.reference import Case, CaseError, Checks, NotCovered, Runner
from uvc.models import create
from uvc.models.gates import register_masks
from uvc.tests import baseline_cases, model_cases, optimizer_cases, removal_cases, training_cases
from uvc.tests.model_cases import float64

# First words of a case's name -> the function that runs it; the longest that fits is taken.
RUNNERS: dict[str, Runner] = {
    **dict.fromkeys(("model", "t2t", "published"), model_cases.run_model),
    "vit_plain": model_cases.run_plain_vit,
    "scores": optimizer_cases.run_scores,
    "least_s_sum": optimizer_cases.run_least_sum,
    "resource": optimizer_cases.run_resource,
    "resource_published": optimizer_cases.run_published_resource,
    "resource_without_mhsa": optimizer_cases.run_projected_resource,
    "lagrangian": optimizer_cases.run_lagrangian,
    "prox": optimizer_cases.run_proximal,
    "masks": optimizer_cases.run_masks,
    "prune_weights": optimizer_cases.run_pruned_weights,
    "optimizer": optimizer_cases.run_optimizer,
    "compress": removal_cases.run_compress,
    **dict.fromkeys(("bp_magnitude", "bp_synflow", "bp_taylor"), baseline_cases.run_scores),
    "bp_structured": baseline_cases.run_structured,
    "bp_gmp_schedule": baseline_cases.run_gmp_schedule,
    "bp_token": baseline_cases.run_token_selection,
    "distillation": training_cases.run_distillation,
    "schedules": training_cases.run_schedules,
    "zlr_schedule": training_cases.run_zlr_schedule,
    "stage2_lr": training_cases.run_stage2_rates,
    "stage1": training_cases.run_stage1,
    "stage2": training_cases.run_stage2,
}


def run_manifest(case: Case, checks: Checks) -> None:
    """Names and shapes of a state dict with masks, its parameters and the size of its masks."""
    with torch.device("meta"):
        model = create(case.build["model"])
        register_masks(model)
    state = {name: list(value.shape) for name, value in model.state_dict().items()}
    want = dict(case.values)
    checks.equal("params", count_parameters(model), want.pop("params"))
    masks = [value.numel() for name, value in model.state_dict().items() if name.endswith(".mask")]
    checks.equal("mask_elements", sum(masks), want.pop("mask_elements"))
    checks.equal("names that only one side has", sorted(state.keys() ^ want.keys()), [])
    for name in state.keys() & want.keys():
        checks.equal(name, state[name], want[name])


def more_cases(folder: Path) -> list[Case]:
    """One case per ``manifest_<model>.json`` of the folder."""
    cases = []
    for path in sorted(folder.glob("manifest_*.json")):
        try:
            content = json.loads(path.read_text())
            content = {**content.pop("keys", {}), **content} if "keys" in content else content
        except ValueError as error:
            raise CaseError(f"{path} is not valid JSON: {error}") from error
        model = path.stem.removeprefix("manifest_")
        cases.append(Case(path.stem, 0, {"manifest": True, "model": model}, "", (), content, content))
    return cases


def find_runner(case: Case) -> Runner:
    """The function that runs a case."""
    if "manifest" in case.build:
        return run_manifest
    fitting = [words for words in RUNNERS if case.name.startswith(words)]
    if not fitting:
        raise NotCovered(f"no runner for {case.name}")
    return RUNNERS[max(fitting, key=len)]


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if any case fails or is not covered."""
    with float64():
        return reference.main(find_runner, argv, program="python -m uvc.tests.cases", more_cases=more_cases)


if __name__ == "__main__":
    sys.exit(main())
