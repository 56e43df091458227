"""main.py on Slurm, or on this machine, through submitit; a pre-empted job queues again and resumes.

    python sit/run_with_submitit.py --nodes 1 --ngpus 8 --shared-dir DIR --partition PARTITION \
        --model sit_lvvit_tiny --teacher-model sit_lvvit_tiny --teacher-path teacher.pth --finetune teacher.pth \
        --data-path DIR --batch-size 128 --epochs 125 --lr 2e-4 --drop-path 0

All flags of main.py are taken. --output_dir is the job's folder, where %j is the number of the job.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Sequence
from pathlib import Path

from common.run import cli
from common.run.errors import UsageError
from common.run.program import run
from sit import main as program
from sit.arguments import get_args_parser

PUBLISHED_SHARED = Path("/checkpoint")
"""Where the published script expects a folder that every node sees."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of main.py, and those of the job."""
    parser = get_args_parser(__doc__)
    add = parser.add_argument_group("job").add_argument
    add("--ngpus", type=cli.positive_int, default=8, help="GPUs per node, and processes (default: 8)")
    add("--nodes", type=cli.positive_int, default=2, help="nodes (default: 2; 1 without Slurm)")
    add("--timeout", type=cli.positive_int, default=2800, metavar="MIN", help="minutes of the job (default: 2800)")
    add("--job_dir", default="", metavar="DIR", help="folder of the job (default: %%j in the shared folder)")
    add("--shared-dir", default="", metavar="DIR",
        help="folder that every node sees (default: /checkpoint/USER/experiments, where there is one)")  # fmt: skip
    add("--partition", default="learnfair", help="Slurm partition (default: learnfair)")
    add("--use_volta32", action="store_true", help="Slurm constraint volta32gb")
    add("--comment", default="", help="Slurm comment")
    add("--cluster", default=None, choices=("slurm", "local", "debug"),
        help="where to run (default: Slurm where there is one, else this machine)")  # fmt: skip
    add("--wait", action="store_true", help="wait for the job and print its result")
    return parser.parse_args(argv)


def job_folder(args: argparse.Namespace) -> Path:
    """--job_dir, or %j in the shared folder.

    Raises:
        UsageError: if there is neither.
    """
    if args.job_dir:
        return Path(args.job_dir)
    if args.shared_dir:
        return Path(args.shared_dir) / "%j"
    if PUBLISHED_SHARED.is_dir():
        return PUBLISHED_SHARED / os.environ.get("USER", "nobody") / "experiments" / "%j"
    raise UsageError(
        f"no folder that every node sees: there is no {PUBLISHED_SHARED}; give --shared-dir DIR, or --job_dir DIR"
    )


def in_folder_of_the_job(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with the number of this job in --output_dir."""
    import submitit  # an extra: leanvit[slurm]

    args = copy.copy(args)
    args.output_dir = args.output_dir.replace("%j", submitit.JobEnvironment().job_id)
    return args


class Trainer:
    """What every process of the job runs; pickled by submitit, and asked for its successor when pre-empted."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self) -> dict[str, float]:
        """One process: its place from submitit, then main.py."""
        import submitit  # an extra: leanvit[slurm]

        os.environ.pop("MASTER_PORT", None)  # of the job that submitted this one
        place = submitit.helpers.TorchDistributedEnvironment()
        place.export(set_cuda_visible_devices=False, overwrite=True)
        args = in_folder_of_the_job(self.args)
        print(f"process {place.rank} of {place.world_size}, on {place.master_addr}", flush=True)
        try:
            return run(lambda: program.run_with(args))
        except SystemExit as error:  # submitit takes an exception for a failure, an exit for a lost job
            if str(error) == str(error.code):  # no text: submitit's own, to queue again
                raise
            raise RuntimeError(str(error)) from error

    def checkpoint(self) -> object:
        """The job that goes on from the last checkpoint; submitit calls this before the time is up."""
        import submitit  # an extra: leanvit[slurm]

        args = copy.copy(self.args)
        if Path(in_folder_of_the_job(args).output_dir, "checkpoint.pth").exists():
            args.resume = "auto"
        print(f"queueing again, {'resuming' if args.resume else 'from the start'}", flush=True)
        return submitit.helpers.DelayedSubmission(Trainer(args))


def submit(args: argparse.Namespace) -> object:
    """Hand the job to Slurm, or start it here; returns submitit's job."""
    import submitit  # an extra: leanvit[slurm]

    folder = job_folder(args)
    args.output_dir = str(folder)
    executor = submitit.AutoExecutor(folder=folder, cluster=args.cluster, slurm_max_num_timeout=30)
    slurm: dict[str, object] = {"slurm_partition": args.partition, "slurm_signal_delay_s": 120}
    if args.use_volta32:
        slurm["slurm_constraint"] = "volta32gb"
    if args.comment:
        slurm["slurm_comment"] = args.comment
    gpus = 0 if args.device == "cpu" else args.ngpus
    executor.update_parameters(
        mem_gb=40 * args.ngpus,
        gpus_per_node=gpus,
        tasks_per_node=args.ngpus,
        cpus_per_task=10,
        nodes=args.nodes if executor.cluster == "slurm" else 1,
        timeout_min=args.timeout,
        name="sit",
        **slurm,
    )
    return executor.submit(Trainer(args))


def main(argv: Sequence[str] | None = None) -> object:
    """Submit; with --wait also wait for the result of rank 0."""
    args = parse_args(argv)
    job = submit(args)
    print(f"submitted job {job.job_id}, its folder is {str(job_folder(args)).replace('%j', job.job_id)}")  # pyright: ignore
    if args.wait:
        result = job.results()[0]  # pyright: ignore[reportAttributeAccessIssue]
        print(f"finished: {result}")
        return result
    return job


if __name__ == "__main__":
    run(main)
