"""File records of other machines: ``python -m common.results add FILE``."""

import sys

from common.ledger.results import main as main
from common.ledger.results import parse_args as parse_args
from common.run.program import run

if __name__ == "__main__":
    sys.exit(run(main))
