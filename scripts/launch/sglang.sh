#!/usr/bin/env bash
# Starts SGLang servers on a GPU machine and keeps them up, for a run on other machines.
#
#     bash scripts/launch/sglang.sh --num=8 --model=/shared/Qwen3-8B \
#       --config=configs/mine.py --workdir=/shared/runs/mine-servers
#
# Run it in the folder of codjax. It installs codjax into .venv and SGLang into an environment of its
# own, both once, and calls codjax serve; all other flags go there, so what the config says of
# server.local counts. The servers listen on all interfaces, on ports from server.local.first_port,
# 30000. SIGTERM and Ctrl-C here end them. See docs/servers.md.
#
#   --num=N          servers (default: 8)
#   --model=DIR      Hugging Face folder to start from
#   --gpus=G         of one server (default: 1)
#   --venv=DIR       environment of SGLang, made if it is not there (default: .venv-sglang-gpu)
#   --sglang=V       version to install into it (default: 0.5.23, with which codjax is tested)
#   --print          print the commands and touch nothing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

num=8 model="" gpus=1 sglang_venv=.venv-sglang-gpu version=0.5.23 flags=()
while (($#)); do
  case "$1" in
    --num=*) num="${1#*=}" ;;
    --model=*) model="${1#*=}" ;;
    --gpus=*) gpus="${1#*=}" ;;
    --venv=*) sglang_venv="${1#*=}" ;;
    --sglang=*) version="${1#*=}" ;;
    --print) PRINT=true ;;
    -h | --help) help && exit ;;
    *) flags+=("$1") ;;
  esac
  shift
done
number --num "$num"
need --model "$model"
number --gpus "$gpus"
[[ "$sglang_venv" != *"'"* ]] || die "--venv must be a path without quotes; got $sglang_venv."
((${#flags[@]})) || die "flags of codjax serve must be given: --config=… --workdir=…"

# Whether the environment has this SGLang already.
is_installed() {
  "$sglang_venv/bin/python" - "$version" 2>/dev/null <<'PY'
import importlib.metadata, sys
sys.exit(importlib.metadata.version("sglang") != sys.argv[1])
PY
}

command=("$VENV/bin/python" -m codjax serve "--model=$model"
  "--config.server.local.num=$num" "--config.server.local.gpus_per_server=$gpus"
  --config.server.local.host=0.0.0.0
  "--config.server.local.command=('$sglang_venv/bin/python', '-m', 'sglang.launch_server')"
  ${flags[@]+"${flags[@]}"})
$PRINT || install_codjax ""
if $PRINT || ! is_installed; then
  run "${PYTHON:-python3}" -m venv "$sglang_venv"
  run "$sglang_venv/bin/python" -m pip install "sglang==$version"
fi
$PRINT || exec "${command[@]}"
run "${command[@]}"
