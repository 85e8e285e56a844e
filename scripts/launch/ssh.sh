#!/usr/bin/env bash
# Trains with one process on each of several machines, reached by plain ssh.
#
#     bash scripts/launch/ssh.sh --hosts=node0,node1 --dir=/shared/codjax \
#       --config=configs/mine.py --workdir=/shared/runs/mine
#
# Every host must have codjax installed in DIR/.venv (or PYTHON=…) and see the same workdir. All
# other flags go to codjax train. When one process fails, all end: put restart.sh before this script
# to start again. SIGTERM and Ctrl-C here stop all at the same step, with a checkpoint.
#
#   --hosts=A,B    one process each, on all devices of the host; the first is the coordinator
#   --dir=DIR      folder of codjax, the same on all hosts
#   --port=P       of the coordinator (default: 8476); the hosts must reach it
#   --print        print the commands and touch nothing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

hosts="" dir="" port=8476 flags=()
while (($#)); do
  case "$1" in
    --hosts=*) hosts="${1#*=}" ;;
    --dir=*) dir="${1#*=}" ;;
    --port=*) port="${1#*=}" ;;
    --print) PRINT=true ;;
    -h | --help) help && exit ;;
    *) flags+=("$1") ;;
  esac
  shift
done
need --hosts "$hosts"
need --dir "$dir"
number --port "$port"
IFS=, read -r -a names <<<"$hosts"

python="${PYTHON:-.venv/bin/python}"
ssh=(ssh -o BatchMode=yes -o ServerAliveInterval=15)
# Each process leaves its number beside the coordinator's port, so that SIGTERM can reach it.
# shellcheck disable=SC2329 # called by the trap
stop_all() {
  local index
  for index in "${!names[@]}"; do
    # shellcheck disable=SC2016 # for the shell over there
    "${ssh[@]}" "${names[$index]}" 'kill -TERM "$(cat '"/tmp/codjax-$port-$index.pid"')"' &
  done
}
trap stop_all TERM INT
for index in "${!names[@]}"; do
  command="cd $(quoted "$dir") && echo \$\$ > /tmp/codjax-$port-$index.pid && exec env $(quoted \
    "CODJAX_COORDINATOR=${names[0]#*@}:$port" "CODJAX_NUM_PROCESSES=${#names[@]}" \
    "CODJAX_PROCESS_ID=$index" "CODJAX_STOP_STATUS=${CODJAX_STOP_STATUS:-0}" \
    "$python" -m codjax train ${flags[@]+"${flags[@]}"})"
  if $PRINT; then
    run "${ssh[@]}" "${names[$index]}" "$command"
  else
    start "${names[$index]}" "${ssh[@]}" "${names[$index]}" "$command"
  fi
done
finish
