"""Render the tables inside the READMEs: ``python -m common.docs``."""

import sys

from common.ledger.docs import main as main
from common.run.program import run

if __name__ == "__main__":
    sys.exit(run(main))
