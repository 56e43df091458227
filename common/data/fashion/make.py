"""Make ``fashion.npz`` from the four IDX files of Fashion-MNIST: a stratified part, the same from every copy of them.

    python -m common.data.fashion.make DIR      # where train-images-idx3-ubyte.gz and its three companions are

1,200 training and 200 test images of each class, drawn with seed 0, in their original order.
Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv:1708.07747; MIT licence, see LICENSE.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from common.run.flags import make_parser

PER_CLASS = {"train": 1200, "val": 200}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the four files")
    folder = parser.parse_args(argv).folder
    import numpy as np

    from common.data.memory import FASHION, read_idx

    with zipfile.ZipFile(FASHION, "w", zipfile.ZIP_LZMA) as archive:  # a seventh smaller than NumPy's own compression
        for split, number in PER_CLASS.items():
            images, labels = read_idx(folder, split)
            generator = np.random.default_rng(0)
            chosen = [generator.permutation(np.flatnonzero(labels == label))[:number] for label in range(10)]
            kept = np.sort(np.concatenate(chosen))
            for name, values in ((f"{split}_images", images[kept]), (f"{split}_labels", labels[kept])):
                content = io.BytesIO()
                np.save(content, values, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_LZMA)


if __name__ == "__main__":
    main()
