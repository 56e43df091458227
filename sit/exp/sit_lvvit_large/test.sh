#!/usr/bin/env bash
# SiT-L: accuracy of a trained checkpoint. Published: 85.6 % top-1 on ImageNet-1k.
#
#   DATA=imagenet CHECKPOINT=checkpoint.pth bash sit/exp/sit_lvvit_large/test.sh [flags of sit/main.py]
#
# DATA holds val/. CHECKPOINT is what train.sh wrote, or the published SiT-L: a slimmed network, not the teacher, as
# the published script calls it. A file without the training-only modules needs --allow-stripped, unless sit/strip.py
# wrote it.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
need DATA "the folder that holds val/ of ImageNet"
need CHECKPOINT "the trained SiT-L, as sit/exp/sit_lvvit_large/train.sh writes it"

start sit_lvvit_large-test \
  --data-path "$DATA" \
  --batch-size 128 --epoch 125 --lr 2e-4 --warmup-epochs 0 \
  --distillation-type frd --lambda-token 2.0 --lambda-logits 2.0 \
  --input-size 288 \
  --drop-path 0.3 \
  --aa rand-n3-m9-mstd0.5-inc1 \
  --model sit_lvvit_large --finetune "$CHECKPOINT" \
  --dist-eval --eval "$@"
