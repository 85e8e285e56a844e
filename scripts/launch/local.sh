#!/usr/bin/env bash
# Trains with several processes on this machine's CPU, over loopback: the rehearsal of a launch.
#
#     bash scripts/launch/local.sh -n 2 --config=configs/quickstart.py --workdir=runs/two
#
# All flags but these go to codjax train. Ends with the first status other than 0 of a process.
# SIGTERM and Ctrl-C go to all processes as SIGTERM; they stop at the same step, with a checkpoint.
#
#   -n N           processes (default: 2)
#   --devices=D    virtual devices of each (default: 1)
#   --port=P       of the coordinator, process 0 (default: 8476)
#   --print        print the commands and touch nothing
#
# PYTHON=… names the Python that codjax is installed in (default: .venv/bin/python).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

num=2 devices=1 port=8476 flags=()
while (($#)); do
  case "$1" in
    -n)
      num="${2:-}"
      shift
      ;;
    --devices=*) devices="${1#*=}" ;;
    --port=*) port="${1#*=}" ;;
    --print) PRINT=true ;;
    -h | --help) help && exit ;;
    *) flags+=("$1") ;;
  esac
  (($#)) && shift
done
number -n "$num"
number --devices "$devices"
number --port "$port"

python="${PYTHON:-.venv/bin/python}"
trap '((${#PIDS[@]} == 0)) || kill -TERM "${PIDS[@]}" 2>/dev/null || true' TERM INT
for ((index = 0; index < num; index++)); do
  # With the default order, virtual devices may wait for each other in different collectives.
  xla="--xla_force_host_platform_device_count=$devices"
  xla+=" --xla_cpu_enable_concurrency_optimized_scheduler=false"
  command=(
    env JAX_PLATFORMS=cpu "XLA_FLAGS=$xla"
    "CODJAX_COORDINATOR=127.0.0.1:$port" "CODJAX_NUM_PROCESSES=$num" "CODJAX_PROCESS_ID=$index"
    "$python" -m codjax train ${flags[@]+"${flags[@]}"}
  )
  if $PRINT; then
    run "${command[@]}"
  else
    start "$index" "${command[@]}"
  fi
done
finish
