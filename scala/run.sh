#!/usr/bin/env bash
# Train Scala-S and Scala-B on ImageNet-1K: the commands of record.
#
#   bash scala/run.sh DATA [s|b|all] [flags of main_scala.py ...]
#
# DATA holds train/ and val/ in class folders. Flags given here win over the recipe, for example
#   bash scala/run.sh DATA s --granularity 0.25 --output_dir log/scala_s_x4      # X = 4 instead of 13
# One step runs forward and backward at four widths.
#   Scala-S: 100 epochs, 4 x 256 images per step; X = 13 gives 58.7 / 68.3 / 73.3 / 76.1 % at r = .25 / .5 / .75 / 1
#   Scala-B: 300 epochs, 4 x 128 images per step; X = 13 gives 75.3 / 79.3 / 81.2 / 82.0 %
# The paper does not say how long that took; it used four GPUs.
# Environment: NPROC processes (4), LAUNCHER torchrun or launch (torch.distributed.launch), PYTHON interpreter,
# TEACHER_S and TEACHER_B, the DeiT weights that teach the largest width.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,16s/^# \{0,1\}//p' "$0"
    exit 2
fi
DATA=$1
WHAT=all
shift
case "${1:-}" in
    s | b | all) WHAT=$1; shift ;;
esac
PYTHON=${PYTHON:-python}
NPROC=${NPROC:-4}
TEACHER_S=${TEACHER_S:-https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth}
TEACHER_B=${TEACHER_B:-https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

start() {
    case "${LAUNCHER:-torchrun}" in
        torchrun) "$PYTHON" -m common.run.torchrun --nproc_per_node="$NPROC" ${PORT:+--master_port="$PORT"} "$@" ;;
        launch) "$PYTHON" -m torch.distributed.launch --nproc_per_node="$NPROC" ${PORT:+--master_port="$PORT"} --use_env "$@" ;;
        *) echo "LAUNCHER must be torchrun or launch, got $LAUNCHER" >&2; exit 2 ;;
    esac
}

if [ "$WHAT" != b ]; then
    start scala/main_scala.py --data-path "$DATA" --batch-size 256 --epochs 100 \
        --aa rand-m1-mstd0.5-inc1 --no-repeated-aug --lr 2e-3 --warmup-epochs 3 \
        --teacher-model deit_small_patch16_224 --teacher-path "$TEACHER_S" --distillation-type hard \
        --model deit_small_distilled_patch16_224_scala --smallest_ratio 0.25 --largest_ratio 1.0 \
        --granularity 0.0625 --distill_type soft --transfer_type progressive --token_type dist_token \
        --ce_coefficient 1.0 --full_warm_epoch 10 --output_dir log/deit_small_distilled_scala "$@"
fi
if [ "$WHAT" != s ]; then
    start scala/main_scala.py --data-path "$DATA" --batch-size 128 --epochs 300 \
        --aa rand-m4-mstd0.5-inc1 --no-repeated-aug --lr 1e-3 --warmup-epochs 5 \
        --teacher-model deit_base_patch16_224 --teacher-path "$TEACHER_B" --distillation-type hard \
        --model deit_base_distilled_patch16_224_scala --smallest_ratio 0.25 --largest_ratio 1.0 \
        --discrete_ratio 0.0625 --distill_type soft --transfer_type progressive --token_type dist_token \
        --ce_coefficient 1.0 --full_warm_epoch 10 --output_dir log/deit_base_distilled_scala "$@"
fi
