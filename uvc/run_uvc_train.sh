#!/usr/bin/env bash
# Stage 1 of UVC on DeiT-Tiny at half the cost: the published command.
# Published log (2 GPUs x 128, patch gating off): about 42.7 % of the cost after 31 epochs, 56.3 % top-1 before stage 2.
# Hardware: 2 GPUs as here; one epoch is 1.28 million images, 1251 steps at 2 x 512.
#
#   DATA=DIR bash uvc/run_uvc_train.sh [more flags of joint_train.py, which win over those below]
#
# DATA      folder with train/ and val/, one folder per class
# MODEL     checkpoint of the dense network (default: the published one, downloaded)
# OUTPUT    where runs go (default: output/uvc)
# PROCS     processes, one per GPU (default: 2)
# GPUS      which GPUs, such as 2,3 (default: the first ones)
# WORKERS   loading processes per process (default: 64)
set -euo pipefail
: "${DATA:?usage: DATA=DIR bash uvc/run_uvc_train.sh [flags]; DIR holds train/ and val/}"
procs=${PROCS:-2}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m common.run.torchrun --nproc_per_node "$procs" --master_port "${PORT:-6019}" \
    "$root/uvc/joint_train.py" --gpu_num "${GPUS:-$(seq -s, 0 $((procs - 1)))}" --uvc_train \
    --model_type deit_tiny_patch16_224 --model_path "${MODEL:-pretrained}" --data_dir "$DATA" \
    --distillation-type soft --distillation-alpha 0.1 --train_batch_size 512 --num_epochs 30 --eval_every 1000 \
    --flops_with_mhsa 1 --zlr_schedule_list "1,5,9,13,17" --learning_rate 1e-4 --enable_deit 0 --budget 0.5 \
    --enable_pruning 1 --enable_block_gating 1 --enable_patch_gating 1 --gating_weight 5e-4 --patch_weight 5 \
    --patch_l1_weight 0.01 --patchloss "l1" --use_gumbel 1 --glr 0.1 --patchlr 0.01 --num_workers "${WORKERS:-64}" \
    --seed 730 --output_dir "${OUTPUT:-output/uvc}" --name mc_deit_tiny_patch16_224_with_patch --log_interval 1000 \
    --eps 0.1 --eps_decay 0.92 --enable_warmup 1 --warmup_epochs 5 --warmup_lr 1e-4 --z_grad_clip 0.5 \
    --gating_interval 50 "$@"
