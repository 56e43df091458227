"""Speed of a student against its teacher: paired, by LeViT's protocol, and where a training step spends its time.

    python sit/speed_test.py --model sit_lvvit_small
    python sit/speed_test.py --model sit_lvvit_tiny sit_lvvit_xsmall --device cpu --processor-time --batch-size 1
    python sit/speed_test.py --model sit_lvvit_small --protocol levit --batch-size 1024
    python sit/speed_test.py --model sit_lvvit_tiny --training --batch-size 64

Ours: student and teacher take turns, each pass synchronised, median over rounds, float32 unless --dtype says otherwise.
LeViT's, which the paper names: a traced network, autocast to float16 on a GPU, ten seconds of warm-up, passes until
their times sum up to sixty; on the CPU one thread, processor time. Networks as deployed: logits alone, batch norm
folded. The last line is the speed-up; --output writes a record for python -m common.results add.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.run.cli import make_parser, positive_float, positive_int
from common.run.files import check_output
from common.run.program import run
from sit.sizes import OURS, SIZES

DTYPES = ("float32", "bfloat16", "float16")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Networks and protocol."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    names = [name for name in SIZES if name not in OURS]
    add("--model", nargs="+", default=names, choices=list(SIZES), metavar="NAME",
        help="students to time, each against its teacher (default: the five published)")  # fmt: skip
    add("--protocol", default="ours", choices=("ours", "levit", "both"), help="how to time (default: ours)")
    add("--training", action="store_true", help="time training steps instead: share of the teacher and of RTSM")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N (default: auto)")
    add("--batch-size", type=positive_int, metavar="N",
        help="images per pass (default: 256 on a GPU, 1 on a CPU; LeViT's protocol: 1024 and 16)")  # fmt: skip
    add("--dtype", default="float32", choices=DTYPES, help="precision of the networks (default: float32)")
    add("--compile", action="store_true", help="compile the networks with torch.compile")
    add("--warmup", type=positive_int, default=2, metavar="N", help="untimed rounds (default: 2)")
    add("--rounds", type=positive_int, default=10, metavar="N", help="timed rounds (default: 10)")
    add("--limit-s", type=positive_float, default=None, metavar="S", help="seconds for each pair (default: no limit)")
    add("--levit-warmup-s", type=positive_float, default=10.0, metavar="S", help="LeViT's warm-up (default: 10)")
    add("--levit-seconds", type=positive_float, default=60.0, metavar="S", help="LeViT's measurement (default: 60)")
    add("--processor-time", action="store_true",
        help="count what this process computed, on one thread: for a CPU that other work disturbs")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="write a record file for python -m common.results add")
    args = parser.parse_args(argv)
    if args.output and args.protocol != "ours":
        parser.error("--output records our protocol only")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Time what the flags name; returns the speed-up of each student, or of each training step its milliseconds."""
    args = parse_args(argv)
    check_output(args.output)
    import torch

    from common.ledger import results
    from common.measure.benchmark import choose_clock, describe_device, device_name
    from common.run.files import ROOT
    from common.run.launch import choose_device
    from sit import ledger, timing

    device = choose_device(args.device)
    clock = choose_clock(args.processor_time, device)
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}")
    answers: dict[str, float] = {}
    records: list[results.Record] = []
    common: dict[str, Any] = {"batch": args.batch_size, "rounds": args.rounds, "limit_s": args.limit_s, "clock": clock}
    for name in args.model:
        if args.training:
            answers[name] = timing.run_training(name, device, **common)
            continue
        if args.protocol in ("ours", "both"):
            dtype = getattr(torch, args.dtype)
            speeds = timing.run_pair(name, device, dtype, compiled=args.compile, warmup=args.warmup, **common)
            answers[name] = speeds["student"].speedup
            if args.output:
                records.append(ledger.record_of(name, speeds))
        if args.protocol in ("levit", "both"):
            answers[name] = timing.run_levit(
                name, device, batch=args.batch_size, warmup_s=args.levit_warmup_s, seconds=args.levit_seconds
            )
            print(f"{name}: {answers[name]:.2f}x by LeViT's protocol", flush=True)
    if args.output:
        described = describe_device(device)
        if args.processor_time:  # as common/ledger/gpu.py describes it
            described |= {"threads": 1, "timing": "processor time, 1 thread"}
        words = ["FILE" if word == str(args.output) else word for word in (sys.argv[1:] if argv is None else argv)]
        command = shlex.join(["python", "sit/speed_test.py", *words])
        part = f"speed-batch{records[0].batch_size}-{args.dtype}"
        origin = results.Origin(results.now(), results.current_commit(ROOT), described, command, part=part)
        results.write_records(args.output, records, origin)
        print(f"written to {args.output}")
    print("  ".join(f"{name} {answer:.2f}{'' if args.training else 'x'}" for name, answer in answers.items()))
    return answers


if __name__ == "__main__":
    run(main, expected=(RuntimeError, ValueError))
