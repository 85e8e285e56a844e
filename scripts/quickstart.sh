#!/usr/bin/env bash
# Trains, evaluates and plots a small agent on a laptop: bash scripts/quickstart.sh [WORKDIR]
# Needs Python >= 3.11 and PyPI; installs into .venv. Stop it at any time, start it again to go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_codjax ""

workdir="${1:-runs/quickstart}"
config="configs/quickstart.py"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

echo "== training: a warm-up by imitation, then reinforcement learning over packs"
"$VENV/bin/codjax" train --config="$config" --workdir="$workdir"
echo "== evaluating: the trained agent, its warm-up, and two controls, on held-out packs"
"$VENV/bin/codjax" eval --config="$config" --workdir="$workdir"
echo
echo "plot:  $workdir/reward_by_position.png"
echo "table: $workdir/eval.json"
echo "packs to read: $workdir/eval_packs.txt and $workdir/trajectories/"
