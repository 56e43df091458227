"""What the launch tests start under real launchers; imports no more than it needs, to start quickly."""

import json
import sys
import time

from common.run.cli import make_parser
from common.run.errors import UsageError
from common.run.program import run


def main() -> None:
    parser = make_parser()
    parser.add_argument("--local-rank", "--local_rank", type=int, default=-1)
    parser.add_argument("--fail-rank", type=int, default=-1, help="which rank fails; 9 is every rank")
    parser.add_argument("--how", choices=("bug", "mistake", "busy", "exit"), default="bug")
    args = parser.parse_args()
    from common.run.launch import launch, reduce_sums

    world = launch("cpu", local_rank=args.local_rank, start_timeout_s=60)
    total = reduce_sums({"ranks": float(world.rank), "count": 1.0})
    if args.fail_rank in (world.rank, 9):
        if args.how == "exit":
            sys.exit(3)
        raise UsageError("give --less") if args.how == "mistake" else ArithmeticError(f"rank {world.rank} broke")
    if args.fail_rank >= 0:
        if args.how == "busy":
            time.sleep(60)
        reduce_sums({"never": 1.0})
    row = {"rank": world.rank, "size": world.size, "local_rank": world.local_rank, "flag": args.local_rank, **total}
    print(json.dumps(row) + "\n", end="", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
