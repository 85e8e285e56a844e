#!/usr/bin/env bash
# The quickstart on three seeds, with its two trained controls: bash scripts/laptop_study.sh [FOLDER]
# Nine runs of a few minutes; stop it at any time, start it again to go on. Writes FOLDER/study.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_codjax ""

folder="${1:-runs/study}"
config="configs/quickstart.py"
seeds="${SEEDS:-0 1 2}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

run() { # NAME OVERRIDE…
  local workdir="$folder/$1"
  shift
  [[ -f "$workdir/eval.json" ]] && return
  echo "== $workdir"
  "$VENV/bin/codjax" train --config="$config" --workdir="$workdir" "$@"
  "$VENV/bin/codjax" eval --config="$config" --workdir="$workdir" "$@"
}

for seed in $seeds; do
  run "cod_seed$seed" --config.seed="$seed"
  run "trained_blank_seed$seed" --config.seed="$seed" --config.rollout.blank_hints=True
  run "gamma0_seed$seed" --config.seed="$seed" --config.credit.style=discounted --config.credit.gamma=0.0
done
"$VENV/bin/python" scripts/study_table.py "$folder" | tee "$folder/study.md"
