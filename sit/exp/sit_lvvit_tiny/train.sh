#!/usr/bin/env bash
# SiT-T: 196, 98, 49 and 24 tokens, slimmed after blocks 1, 2 and 3 of 14.
# Published: 80.1 % top-1 on ImageNet-1k, 1.0 GMACs, 15.9 M parameters; teacher LV-ViT-T with 81.8 %.
# Hardware: 8 GPUs, 128 images each, 135 epochs (125 and a cooldown of 10). Hours are not published.
#
#   DATA=imagenet TEACHER=teacher.pth bash sit/exp/sit_lvvit_tiny/train.sh [flags of sit/main.py]
#
# DATA holds train/ and val/. TEACHER is the LV-ViT-T file of this paper (the public LV-ViT is another network): the
# student starts from it and is taught by it.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
need DATA "the folder that holds train/ and val/ of ImageNet"
need TEACHER "the LV-ViT-T teacher, linked from the README of SiT; sit/exp/teacher/train.sh trains one"

start sit_lvvit_tiny \
  --data-path "$DATA" \
  --batch-size 128 --epoch 125 --lr 2e-4 --warmup-epochs 0 \
  --distillation-type frd --lambda-token 2.0 --lambda-logits 2.0 \
  --drop-path 0.0 \
  --model sit_lvvit_tiny --finetune "$TEACHER" \
  --teacher-model sit_lvvit_tiny --teacher-path "$TEACHER" \
  --dist-eval "$@"
