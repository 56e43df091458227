#!/usr/bin/env bash
# Accuracy of a teacher, LV-ViT without slimming. Published: 81.8 (T), 83.1 (S), 84.0 (M) and 85.3 % (L) top-1.
#
#   DATA=imagenet MODEL=sit_lvvit_small TEACHER=teacher.pth bash sit/exp/teacher/test.sh [flags of sit/main.py]
#
# DATA holds val/. MODEL is the size of TEACHER, see train.sh; for sit_lvvit_large add --input-size 288.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
need DATA "the folder that holds val/ of ImageNet"
need MODEL "the size of the teacher, such as sit_lvvit_small"
need TEACHER "its weights, linked from the README of SiT or written by train.sh"

start "teacher-$MODEL-test" \
  --data-path "$DATA" --batch-size 128 \
  --distillation-type none \
  --model "$MODEL" --finetune "$TEACHER" \
  --eval "$@"
