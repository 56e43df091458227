"""Stage 2 of UVC: train the weights of the architecture that stage 1 found, masks and skips fixed.

    python uvc/post_train.py --model_type deit_tiny_patch16_224 --checkpoint_dir FILE --data_dir DIR \
        --model_path pretrained --distillation-type soft --distillation-alpha 0.1
    python uvc/post_train.py --checkpoint_dir FILE --data_dir DIR --eval

FILE is of stage 1 or 2, ours or an official bare state dict with masks. Writes into OUTPUT_DIR/NAME: last.pth and
best.pth (--resume auto continues exactly), <model_type>.pth.tar, the best masked weights for compress.py, log.jsonl and
result.json. run_post_train.sh is the published command.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from common.run.errors import UsageError
from common.run.program import run
from uvc import arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return arguments.parse(arguments.post_parser(__doc__), argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run stage 2, or with ``--eval`` only evaluate ``--checkpoint_dir``."""
    args = parse_args(argv)
    if args.pretrained:
        raise UsageError("--pretrained 1 reads a folder that does not exist here: name the file with --checkpoint_dir")
    if not args.checkpoint_dir:
        raise UsageError("--checkpoint_dir is missing: name the file that joint_train.py wrote after an epoch")
    arguments.check_paths(args)
    from common.run.launch import launch, seed_everything
    from uvc.build import load_network
    from uvc.stages import fine_tune

    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    patch = "" if args.patch_mode == "auto" else args.patch_mode
    masked = load_network(args.checkpoint_dir, args.stated_model_type, img_size=args.img_size, patch=patch)
    masked.model.gates.jumping |= args.enable_jumping
    return fine_tune(arguments.post_run(args, masked.model_type), masked, world)


if __name__ == "__main__":
    run(main)
