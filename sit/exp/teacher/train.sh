#!/usr/bin/env bash
# A teacher for those who lack the published file: LV-ViT with this paper's stem, trained from scratch on class labels.
# The published teachers were trained with token labeling and reach 81.8 (T), 83.1 (S), 84.0 (M) and 85.3 % (L); without
# label maps expect less. With them add: --token-label-data MAPS --mixup 0 --cutmix 0 (sit/token_labeling.py).
# Hardware: 8 GPUs, 128 images each, 310 epochs. The recipe is ours, after DeiT's: nothing is published.
#
#   DATA=imagenet MODEL=sit_lvvit_small bash sit/exp/teacher/train.sh [flags of sit/main.py]
#
# DATA holds train/ and val/. MODEL is sit_lvvit_tiny, _small (also the teacher of _xsmall), _medium or _large; for the
# last add --input-size 288 --drop-path 0.3.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
need DATA "the folder that holds train/ and val/ of ImageNet"
need MODEL "the size of the teacher, such as sit_lvvit_small"

start "teacher-$MODEL" \
  --data-path "$DATA" \
  --batch-size 128 --epochs 300 --lr 5e-4 --linear-warmup 5 \
  --distillation-type none --drop-path 0.1 \
  --model "$MODEL" "$@"
