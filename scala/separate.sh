#!/usr/bin/env bash
# Train the baselines of the tables: one plain DeiT per width, trained alone (design: the paper gives no command).
#
#   bash scala/separate.sh DATA [s|b|all] [0.25 0.50 0.75 1.0 ...] [flags of main_scala.py ...]
#
# DATA holds train/ and val/ in class folders. Without ratios, all four of the size are trained, one after the other;
# flags given here win over the recipe, which is that of run.sh without teacher and narrower widths. Checkpoints go to
# log/ROW/checkpoint.pth, where the ledger finds them:
#   python -m common.reproduce scala --table scala_s --columns top1_percent --data DATA --weights log
# Published: S 45.8 / 65.1 / 70.7 / 75.0 %, B 72.2 / 79.9 / 81.0 / 81.8 % at r = .25 / .50 / .75 / 1.0
# Environment: NPROC processes (4), LAUNCHER torchrun or launch, PYTHON interpreter, OUT folder (log),
# DRY=1 to print the commands only.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
fi
DATA=$1
SIZES="s b"
shift
case "${1:-}" in
    s | b) SIZES=$1; shift ;;
    all) shift ;;
esac
RATIOS=()
while [[ "${1:-}" =~ ^[0-9.]+$ ]]; do
    case "$1" in
        0.25 | 0.50 | 0.75 | 1.0) RATIOS+=("$1") ;;
        *) echo "the rows are 0.25, 0.50, 0.75 and 1.0, got $1" >&2; exit 2 ;;
    esac
    shift
done
[ ${#RATIOS[@]} -gt 0 ] || RATIOS=(0.25 0.50 0.75 1.0)
PYTHON=${PYTHON:-python}
NPROC=${NPROC:-4}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

start() {
    if [ -n "${DRY:-}" ]; then
        echo "$@"
        return
    fi
    case "${LAUNCHER:-torchrun}" in
        torchrun) "$PYTHON" -m common.run.torchrun --nproc_per_node="$NPROC" ${PORT:+--master_port="$PORT"} "$@" ;;
        launch) "$PYTHON" -m torch.distributed.launch --nproc_per_node="$NPROC" ${PORT:+--master_port="$PORT"} --use_env "$@" ;;
        *) echo "LAUNCHER must be torchrun or launch, got $LAUNCHER" >&2; exit 2 ;;
    esac
}

for size in $SIZES; do
    case "$size" in
        s) NAMES=(so_tiny tiny small)
           RECIPE=(--batch-size 256 --epochs 100 --full_warm_epoch 100 --aa rand-m1-mstd0.5-inc1 --lr 2e-3 --warmup-epochs 3) ;;
        b) NAMES=(tiny small base)
           RECIPE=(--batch-size 128 --epochs 300 --full_warm_epoch 300 --aa rand-m4-mstd0.5-inc1 --lr 1e-3 --warmup-epochs 5) ;;
    esac
    for ratio in "${RATIOS[@]}"; do
        case "$ratio" in
            0.25) NETWORK=(--model "deit_${NAMES[0]}_patch16_224_scala") ;;
            0.50) NETWORK=(--model "deit_${NAMES[1]}_patch16_224_scala") ;;
            # no registered network has this width: the full one, whose only width is 0.75
            0.75) NETWORK=(--model "deit_${NAMES[2]}_patch16_224_scala" --smallest_ratio 0.75 --largest_ratio 0.75) ;;
            1.0) NETWORK=(--model "deit_${NAMES[2]}_patch16_224_scala") ;;
        esac
        start scala/main_scala.py --data-path "$DATA" "${RECIPE[@]}" --no-repeated-aug --distillation-type none \
            "${NETWORK[@]}" --output_dir "${OUT:-log}/$size-separate-$ratio" "$@"
    done
done
