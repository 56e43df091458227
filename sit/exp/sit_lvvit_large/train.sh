#!/usr/bin/env bash
# SiT-L: 324, 162, 81 and 40 tokens at 288 pixels, slimmed after blocks 10, 14 and 17 of 24.
# Published: 85.6 % top-1 on ImageNet-1k, 34.4 GMACs, 148.2 M parameters; teacher LV-ViT-L with 85.3 %.
# Hardware: 8 GPUs, 128 images each, 135 epochs (125 and a cooldown of 10). Hours are not published.
#
#   DATA=imagenet TEACHER=teacher.pth bash sit/exp/sit_lvvit_large/train.sh [flags of sit/main.py]
#
# DATA holds train/ and val/. TEACHER is the LV-ViT-L file of this paper (the public LV-ViT is another network): the
# student starts from it and is taught by it.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
need DATA "the folder that holds train/ and val/ of ImageNet"
need TEACHER "the LV-ViT-L teacher, linked from the README of SiT; sit/exp/teacher/train.sh trains one"

start sit_lvvit_large \
  --data-path "$DATA" \
  --batch-size 128 --epoch 125 --lr 2e-4 --warmup-epochs 0 \
  --distillation-type frd --lambda-token 2.0 --lambda-logits 2.0 \
  --input-size 288 \
  --drop-path 0.3 \
  --aa rand-n3-m9-mstd0.5-inc1 \
  --model sit_lvvit_large --finetune "$TEACHER" \
  --teacher-model sit_lvvit_large --teacher-path "$TEACHER" \
  --dist-eval "$@"
