"""What is measured for the claims of ``tables/claims.toml``: one small DeiT per seed, made cheaper in several ways.

Everything is trained by the scripts' ordinary flags, and every way gets the same number of epochs from the same dense
weights, with the same distillation: UVC and UVC without block gates split them over their two stages, the others
fine-tune under masks that are set at once. Uniform width removes the weakest heads and neurons, the same number from
every block; ``structured`` as many, those with the least gradients; ``omp`` the smallest weights anywhere.

Cost is what the physically compressed network executes. The masks of all but UVC are set so that it is just within the
share of the dense network's; UVC's structure is that of the last epoch of stage 1 within it. What a way reaches at
exactly the share is read off the straight line to the dense network: what a mixture of the two costs and reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from common.ledger.evidence import Arms, Job, Run, mixture
from uvc import baselines, compress, joint_train, post_train
from uvc.baseline_scores import magnitude_scores, masks_of, set_masks_
from uvc.loading import load_masked, save_masked
from uvc.models.compact import CompactViT
from uvc.models.gates import GatedTransformer
from uvc.pruning import update_masks_
from uvc.removal import config_of
from uvc.structure import Structure

MODEL = "deit_desk8"
GATES, NO_GATES = "--glr 2 --gating_weight 3.5e-4 --gating_interval 15", "--enable_block_gating 0"
HEADS_REMOVED = 2
"""Of the four of each block, by uniform width and ``structured``; neurons go until the cost is met, about half, too."""
TRIES = (0.0, 0.05, 0.1)
"""Stage 1 is run again with its budget lower by so much where no epoch's structure is within the share."""


@dataclass(frozen=True)
class Setup:
    """Data set, epochs of the dense network, of stage 1 and of stage 2, and the share of the cost that remains.

    ``gated`` is the budget of a stage 1 with block gates over that share: its constraint is on the cost with soft
    gates, which let through less than a block that runs.
    """

    data_set: str = "fashion"
    dense: int = 10
    search: int = 2
    tune: int = 3
    share: float = 0.5
    gated: float = 0.92

    @property
    def data(self) -> str:
        """Flags of every program."""
        return (
            f"--model_type {MODEL} --dataset {self.data_set} --no-aug --num_workers 0 --train_batch_size 64 "
            "--eval_batch_size 500 --mixup 0 --cutmix 0"
        )

    @property
    def dense_flags(self) -> str:
        return (
            f"omp --density 1 --from-scratch {self.data} --epochs {self.dense} --warmup-epochs 1 --warmup-lr 1e-3 "
            "--learning_rate 1.6e-2"
        )

    @property
    def stage1_flags(self) -> str:
        return (
            f"{self.data} --distillation-type soft --distillation-alpha 0.1 --num_epochs {self.search} "
            "--enable_warmup 0 --warmup_steps 20 --learning_rate 1e-3 --enable_patch_gating 0 --soptim adam --slr 1 "
            "--roptim adam --rlr 0.1 --ylr 0.05 --plr 0.05 --zlr_schedule_list 40 --z_grad_clip 1"
        )

    def tune_flags(self, epochs: int) -> str:
        """Of stage 2 and of the baselines."""
        return (
            f"{self.data} --distillation-type soft --distillation-alpha 0.1 --epochs {epochs} --warmup-epochs 0 "
            "--learning_rate 8e-3"
        )


@dataclass(frozen=True)
class Bench:
    """Where a seed's networks are trained."""

    job: Job
    setup: Setup

    def train(self, program: ModuleType, name: str, flags: str) -> Path:
        """Run a program; the folder of its files."""
        where = f"--name {name} --output_dir {self.job.folder} --seed {self.job.seed} --device {self.job.device}"
        program.main([*flags.split(), *where.split()])
        return self.job.folder / name

    @property
    def dense(self) -> Path:
        """Of the dense network, as the last epoch left it."""
        return self.job.folder / "dense" / "last.pth"

    @property
    def budget(self) -> float:
        """Millions of multiply-accumulates that may remain."""
        return self.setup.share * executed_mmacs(load_masked(self.dense).model)

    def tune(self, name: str, file: Path, epochs: int) -> dict[str, float]:
        """Stage 2 on a masked file, and what comes out."""
        flags = f"{self.setup.tune_flags(epochs)} --model_path {self.dense} --checkpoint_dir {file}"
        return self.evaluate(self.train(post_train, name, flags) / "last.pth")

    def evaluate(self, file: Path) -> dict[str, float]:
        """Top-1 on the held-out images, and what the compressed network executes."""
        words = f"--eval {self.setup.data} --checkpoint_dir {file} --device {self.job.device} --output_dir="
        top1 = post_train.main(words.split())["top1_percent"]
        return {"top1_percent": top1, "mmacs": executed_mmacs(load_masked(file).model)}

    def search(self, name: str, *, gates: bool) -> Path:
        """Stage 1: the file of the last epoch whose structure is within the share.

        Raises:
            RuntimeError: even the lowest budget left none.
        """
        flags = f"{self.setup.stage1_flags} {GATES if gates else NO_GATES} --model_path {self.dense}"
        for lower in TRIES:
            budget = f"{self.setup.share * (self.setup.gated if gates else 1) - lower:.3f}"
            folder = self.train(joint_train, f"{name}-{budget}", f"{flags} --budget {budget}")
            files = [folder / f"{MODEL}_{epoch}.pth.tar" for epoch in range(self.setup.search, 0, -1)]
            for file in files:
                if executed_mmacs(load_masked(file).model) <= self.budget:
                    return file
        raise RuntimeError(f"{self.job.folder}: no epoch of stage 1 came down to {self.setup.share:g} of the cost")


def executed_mmacs(model: GatedTransformer) -> float:
    """Millions of multiply-accumulates of one image in the physically compressed network, its head included."""
    with torch.device("meta"):
        return CompactViT(config_of(model, Structure.from_model(model))).count().executed.macs / 1e6


def uniform_(model: GatedTransformer, heads: int, neurons: int) -> None:
    """Mask the weakest heads and neurons of every block, so many of each."""
    depth = len(model.blocks)
    update_masks_(model, torch.tensor([[heads, neurons]]).expand(depth, 2), torch.zeros(depth, model.num_heads))


def least(fits: Callable[[int], bool], most: int) -> int:
    """The smallest of 0 to ``most`` from which on all fit, by bisection."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def neurons_to_remove(model: GatedTransformer, mmacs: float) -> int:
    """How many neurons of each block go besides ``HEADS_REMOVED`` heads, so that at most ``mmacs`` are executed."""

    def fits(neurons: int) -> bool:
        uniform_(model, HEADS_REMOVED, neurons)
        return executed_mmacs(model) <= mmacs

    return least(fits, model.hidden_dim - 1)


def omp_density(model: GatedTransformer, mmacs: float, *, steps: int = 4096) -> float:
    """Share of the weights that ``omp`` may keep so that what has to be executed is at most ``mmacs``.

    Zeros anywhere save nothing: rows and columns must have gone as a whole.
    """
    scores = magnitude_scores(model)

    def fits(removed: int) -> bool:
        set_masks_(model, masks_of(scores, 1 - removed / steps))
        return executed_mmacs(model) <= mmacs

    return 1 - least(fits, steps - 1) / steps


def arms(bench: Bench, family: str, found: dict[str, float]) -> Arms:
    """What a way costs and reaches, and what it reaches at exactly the share."""
    dense, share = bench.evaluate(bench.dense), bench.setup.share
    return {f"{family}: {share:g}": found, f"{family}@{share:g}": mixture(found, dense, share * dense["mmacs"])}


def train_dense(job: Job, setup: Setup) -> Arms:
    """The network of a seed."""
    bench = Bench(job, setup)
    bench.train(baselines, "dense", setup.dense_flags)
    return {"dense": bench.evaluate(bench.dense)}


def train_uvc(job: Job, setup: Setup, *, gates: bool) -> Arms:
    """Both stages."""
    bench = Bench(job, setup)
    name, family = ("uvc", "UVC") if gates else ("no-skipping", "UVC without skipping")
    found = bench.search(name, gates=gates)
    return arms(bench, family, bench.tune(f"{name}-tuned", found, setup.tune))


def train_uniform(job: Job, setup: Setup) -> Arms:
    """Masks set at once, then as many epochs as UVC has in both stages."""
    bench = Bench(job, setup)
    model = load_masked(bench.dense).model
    uniform_(model, HEADS_REMOVED, neurons_to_remove(model, bench.budget))
    file = save_masked(job.folder / "uniform.pth.tar", model, model_type=MODEL)
    return arms(bench, "uniform width", bench.tune("uniform", file, setup.search + setup.tune))


def train_pruned(job: Job, setup: Setup, method: str) -> Arms:
    """A baseline of ``baselines.py``."""
    bench = Bench(job, setup)
    model = load_masked(bench.dense).model
    if method == "omp":
        how = f"--density {omp_density(model, bench.budget)}"
    else:  # it rounds down, so a little more
        heads, neurons = model.num_heads - HEADS_REMOVED, model.hidden_dim - neurons_to_remove(model, bench.budget)
        shares = (heads + 0.5) / model.num_heads, (neurons + 0.5) / model.hidden_dim
        how = f"--attention-density {shares[0]} --mlp-density {shares[1]}"
    flags = f"{method} {how} {setup.tune_flags(setup.search + setup.tune)} --model_path {bench.dense}"
    return arms(bench, method, bench.evaluate(bench.train(baselines, method, flags) / "last.pth"))


def run_live(job: Job, setup: Setup) -> Arms:
    """The whole path in short: dense network, both stages, removal, export; files are read back and compared."""
    bench = Bench(replace(job, folder=job.folder / "live"), setup)
    dense = train_dense(bench.job, setup)["dense"]
    file = bench.search("uvc", gates=True)
    found = bench.tune("tuned", file, setup.tune)
    place = bench.job.folder / "tuned"
    compress.main(
        f"--checkpoint {place / 'last.pth'} --output {place / 'small'} --export {place / 'small.pt2'}".split()
    )
    return {"live: dense": dense, f"live: UVC, {setup.share:g} of the cost": found}


def runs(setup: Setup, live: Setup) -> dict[str, Run]:
    """All that is measured for a seed; ``live`` is the setup of the short run."""
    tune = setup.tune_flags(setup.search + setup.tune)
    plain = f"{setup.dense_flags}; share {setup.share:g}, {HEADS_REMOVED} heads; {tune}"
    both = f"{setup.dense_flags}; share {setup.share:g}; {setup.stage1_flags}; {setup.tune_flags(setup.tune)}"
    short = f"{live.dense_flags}; share {live.share:g} x {live.gated}; {live.stage1_flags} {GATES}"
    return {
        "dense": Run(setup.dense_flags, partial(train_dense, setup=setup)),
        "uvc": Run(f"{both}; {setup.gated} {GATES}", partial(train_uvc, setup=setup, gates=True)),
        "no-skipping": Run(f"{both}; 1.0", partial(train_uvc, setup=setup, gates=False)),
        "uniform": Run(plain, partial(train_uniform, setup=setup)),
        "structured": Run(plain, partial(train_pruned, setup=setup, method="structured")),
        "omp": Run(plain, partial(train_pruned, setup=setup, method="omp")),
        "live": Run(f"{short}; {live.tune_flags(live.tune)}", partial(run_live, setup=live)),
    }


RUNS = runs(Setup(), Setup(dense=2, search=1, tune=1, share=0.6, gated=0.8))
