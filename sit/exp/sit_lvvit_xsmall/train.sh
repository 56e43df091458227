#!/usr/bin/env bash
# SiT-XS: 196, 98, 49 and 24 tokens, slimmed after blocks 1, 2 and 3 of 16.
# Published: 81.2 % top-1 on ImageNet-1k, 1.5 GMACs, 25.6 M parameters; teacher LV-ViT-S with 83.1 %.
# Hardware: 8 GPUs, 128 images each, 135 epochs (125 and a cooldown of 10). Hours are not published.
#
#   DATA=imagenet TEACHER=teacher.pth bash sit/exp/sit_lvvit_xsmall/train.sh [flags of sit/main.py]
#
# DATA holds train/ and val/. TEACHER is the LV-ViT-S file of this paper (the public LV-ViT is another network): the
# student starts from it and is taught by it.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
need DATA "the folder that holds train/ and val/ of ImageNet"
need TEACHER "the LV-ViT-S teacher, linked from the README of SiT; sit/exp/teacher/train.sh trains one"

start sit_lvvit_xsmall \
  --data-path "$DATA" \
  --batch-size 128 --epoch 125 --lr 2e-4 --warmup-epochs 0 \
  --distillation-type frd --lambda-token 2.0 --lambda-logits 2.0 \
  --model sit_lvvit_xsmall --finetune "$TEACHER" \
  --teacher-model sit_lvvit_xsmall --teacher-path "$TEACHER" \
  --dist-eval "$@"
