"""Render the tables inside the READMEs: ``python -m common.docs``."""

import sys

from common.ledger.docs import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
