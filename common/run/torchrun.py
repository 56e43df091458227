"""torchrun that is quiet after a user's mistake: the one line of rank 0, and its status, instead of 35 lines.

    python -m common.run.torchrun --nproc_per_node=4 scala/main_scala.py --data-path DIR

It takes torchrun's flags. Under torchrun itself a mistake is one line too, but ends torchrun by a signal, which shells
report (see ``common.run.program``).
"""

import logging
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> None:
    """Start the processes and wait for them."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        sys.exit(f"error: the port is in use, choose another by --master-port: {str(error).splitlines()[0]}")
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode <= 1:  # a bug, or a signal
            raise
        sys.exit(failure.exitcode)


if __name__ == "__main__":
    main()
