"""Stage 1 of UVC: learn weights, pruning numbers and skips of a dense ViT together, under a budget on its cost.

    python uvc/joint_train.py --model_type deit_tiny_patch16_224 --model_path pretrained --data_dir DIR --budget 0.5
    torchrun --nproc_per_node=8 uvc/joint_train.py --model_type deit_small_patch16_224 --data_dir DIR ...

Writes into OUTPUT_DIR/NAME: <model_type>_<epoch>.pth.tar after each epoch, what post_train.py takes; last.pth, from
which --resume auto continues exactly; log.jsonl; structure.png, what of the network is left; result.json.
run_uvc_train.sh is the published command.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from common.run.program import run
from uvc import arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return arguments.parse(arguments.joint_parser(__doc__), argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run stage 1, or with ``--eval`` only evaluate what ``--resume`` names; returns the last numbers."""
    args = parse_args(argv)
    arguments.check_paths(args)
    settings = arguments.joint_run(args)
    from common.run.launch import launch, seed_everything
    from uvc.stages import learn

    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    return learn(settings, world)


if __name__ == "__main__":
    run(main)
