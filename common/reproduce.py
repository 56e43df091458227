"""The main job: ``python -m common.reproduce --help``."""

import sys

from common.ledger.reproduce import main as main
from common.ledger.reproduce import parse_args as parse_args
from common.run.program import run

if __name__ == "__main__":
    sys.exit(run(main))
