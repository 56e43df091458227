# Plumbing of the scripts next door, which source it: folders, variables, launcher. It holds no setting of a run.
set -euo pipefail
work_path=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)
run=$(basename "$work_path")
cd "$work_path/../../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  cat >&2 <<'TEXT'
NPROC (processes on this machine, 8), OUTPUT (folder to write to), PYTHON, and LAUNCHER (common.run.torchrun or
torch.distributed.launch) may be set, too. Further words go to sit/main.py, where the last of two equal flags wins.
TEXT
  exit 2
}

# need NAME "what it is": stops unless the variable NAME is set
need() {
  if [[ -z "${!1:-}" ]]; then
    echo "error: $1 is not set: $2" >&2
    usage
  fi
}

# start NAME FLAGS...: sit/main.py in NPROC processes; what it prints goes to OUTPUT/console.txt as well
start() {
  local output=${OUTPUT:-output/sit/$1}
  shift
  mkdir -p "$output"
  local launcher=(-m "${LAUNCHER:-common.run.torchrun}" --nproc_per_node="${NPROC:-8}")
  [[ ${LAUNCHER:-common.run.torchrun} != torch.distributed.launch ]] && launcher+=(--standalone)
  "${PYTHON:-python}" "${launcher[@]}" sit/main.py --output_dir "$output" "$@" 2>&1 | tee -a "$output/console.txt"
}
