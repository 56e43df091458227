"""Published checkpoints on this machine, for the papers' adapters."""

from collections.abc import Sequence
from pathlib import Path

from common.ledger.tables import NeedsWeights
from common.run.checkpoint import hub_folder


def find_weights(files: Sequence[str], folder: Path | None) -> Path:
    """The first of these files that is in a folder; None is torch.hub's cache.

    Raises:
        NeedsWeights: naming the files looked for.
    """
    place = folder or hub_folder()
    for path in (place / file for file in files):
        if path.is_file():
            return path
    raise NeedsWeights(reason=f"{' or '.join(files)} in {place} (--weights DIR)")
