#!/usr/bin/env bash
# Top-1 of a trained Scala-S on ImageNet-1K: the command of record.
#
#   bash scala/eval.sh DATA CHECKPOINT [flags of main_scala.py ...]
#
# DATA holds val/ in class folders; CHECKPOINT is a file or URL. Flags given here win, for example
#   bash scala/eval.sh DATA log/deit_small_distilled_scala/checkpoint.pth --eval_ratio all
#   bash scala/eval.sh DATA CHECKPOINT --model deit_base_distilled_patch16_224_scala --eval_ratio 0.25 0.5 0.75 1.0
# Environment: NPROC processes (4), LAUNCHER torchrun or launch (torch.distributed.launch), PYTHON interpreter.
# Expected at r = 0.5 with X = 13: 68.3 %.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
fi
DATA=$1
CHECKPOINT=$2
shift 2
PYTHON=${PYTHON:-python}
NPROC=${NPROC:-4}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
case "${LAUNCHER:-torchrun}" in
    torchrun) START=(-m common.run.torchrun --nproc_per_node="$NPROC" ${PORT:+--master_port="$PORT"}) ;;
    launch) START=(-m torch.distributed.launch --nproc_per_node="$NPROC" ${PORT:+--master_port="$PORT"} --use_env) ;;
    *) echo "LAUNCHER must be torchrun or launch, got $LAUNCHER" >&2; exit 2 ;;
esac
exec "$PYTHON" "${START[@]}" scala/main_scala.py --eval --data-path "$DATA" \
    --model deit_small_distilled_patch16_224_scala --batch-size 256 --eval_ratio 0.5 --resume "$CHECKPOINT" "$@"
