"""The main job: ``python -m common.reproduce --help``."""

import sys

from common.ledger.reproduce import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    sys.exit(main())
