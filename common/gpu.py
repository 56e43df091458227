"""The job of a machine with a GPU: ``python -m common.gpu --help``."""

import sys

from common.ledger.gpu import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    sys.exit(main())
