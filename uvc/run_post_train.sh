#!/usr/bin/env bash
# Stage 2 of UVC on DeiT-Tiny: fine-tune what run_uvc_train.sh found; the published command.
# Published: DeiT-Tiny at about half the cost loses 0.9 points of top-1, 0.3 with the distillation token.
# Hardware: 2 GPUs as here, 120 epochs of 5004 steps at 2 x 128.
#
#   DATA=DIR CHECKPOINT=FILE bash uvc/run_post_train.sh [more flags of post_train.py, which win over those below]
#
# DATA        folder with train/ and val/, one folder per class
# CHECKPOINT  file that stage 1 wrote after its last epoch, or an official state dict with masks
# MODEL       checkpoint of the dense network, the teacher (default: the published one, downloaded)
# OUTPUT      where runs go (default: output/uvc)
# PROCS       processes, one per GPU (default: 2)
# GPUS        which GPUs, such as 2,3 (default: the first ones)
# WORKERS     loading processes per process (default: 64)
set -euo pipefail
: "${DATA:?usage: DATA=DIR CHECKPOINT=FILE bash uvc/run_post_train.sh [flags]; DIR holds train/ and val/}"
: "${CHECKPOINT:?usage: DATA=DIR CHECKPOINT=FILE bash uvc/run_post_train.sh [flags]; FILE is of stage 1}"
procs=${PROCS:-2}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m common.run.torchrun --nproc_per_node "$procs" --master_port "${PORT:-6382}" \
    "$root/uvc/post_train.py" --pretrained 0 \
    --model_type deit_tiny_patch16_224 --model_path "${MODEL:-pretrained}" --checkpoint_dir "$CHECKPOINT" \
    --data_dir "$DATA" --distillation-type soft --distillation-alpha 0.1 --train_batch_size 128 \
    --gpu_num "${GPUS:-$(seq -s, 0 $((procs - 1)))}" --epochs 120 --eval_every 1000 --output_dir "${OUTPUT:-output/uvc}" \
    --name ft_deit_tiny_patch16_224 --num_workers "${WORKERS:-64}" --learning_rate 1e-4 "$@"
