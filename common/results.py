"""File records of other machines: ``python -m common.results add FILE``."""

import sys

from common.ledger.results import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    sys.exit(main())
