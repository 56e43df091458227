"""What the launch tests start under real launchers; imports no more than it needs, to start quickly."""

import argparse
import json
import sys

from common.run.distributed import launch, reduce_sums, run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local-rank", "--local_rank", type=int, default=-1)
    parser.add_argument("--fail-rank", type=int, default=-1)
    args = parser.parse_args()
    world = launch("cpu", local_rank=args.local_rank, start_timeout_s=60)
    total = reduce_sums({"ranks": float(world.rank), "count": 1.0})
    if world.rank == args.fail_rank:
        raise ArithmeticError(f"rank {world.rank} broke on purpose")
    row = {"rank": world.rank, "size": world.size, "local_rank": world.local_rank, "flag": args.local_rank, **total}
    print(json.dumps(row) + "\n", end="", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
