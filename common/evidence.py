"""The papers' claims, measured: ``python -m common.evidence --help``."""

from common.ledger.evidence import main, parse_args
from common.run.program import run

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    run(main)
