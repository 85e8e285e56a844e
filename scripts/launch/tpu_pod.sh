#!/usr/bin/env bash
# A TPU pod slice, or several slices, through gcloud: make, set up, train, look, stop, give back.
#
#     flags="--name=cod --zone=us-west4-a --type=v5litepod-256"
#     bash scripts/launch/tpu_pod.sh create $flags
#     bash scripts/launch/tpu_pod.sh setup  $flags     # sends HEAD, installs codjax[tpu]
#     bash scripts/launch/tpu_pod.sh train  $flags --config=configs/mine.py --workdir=/mnt/runs/mine
#     bash scripts/launch/tpu_pod.sh logs   $flags
#     bash scripts/launch/tpu_pod.sh stop   $flags     # at a step, with a checkpoint
#     bash scripts/launch/tpu_pod.sh delete $flags
#
# The workdir must be on a file system that all workers mount. Training goes on when the terminal
# is closed; every worker starts again after a failure. After a preemption of the slice: delete,
# create, setup, train, with the same flags; the run goes on from its newest checkpoint.
#
#   --name=N       of the slice
#   --zone=Z
#   --type=T       accelerator type, as v5litepod-256, v5p-128, v6e-256
#   --version=V    software of the VMs (default: by type)
#   --slices=N     slices, joined by the data centre's network (default: 1)
#   --spot         cheaper, and taken away at any time
#   --python=P     of setup: the Python over there, at least 3.11 (default: the first that is found)
#   --print        print the commands and touch nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch/common.sh

action="${1:-}" name="" zone="" type="" version="" slices=1 python="" spot=() flags=()
(($#)) && shift
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --spot) spot=(--spot) ;;
    --python=*) python="${1#*=}" ;;
    --print) PRINT=true ;;
    -h | --help) help && exit ;;
    *) flags+=("$1") ;;
  esac
  shift
done
if [[ "$action" == -h || "$action" == --help ]]; then
  help && exit
fi
need --name "$name"
need --zone "$zone"
number --slices "$slices"
if [[ "$action" != train ]] && ((${#flags[@]})); then
  die "unknown flag ${flags[0]}; --help tells the flags."
fi

tpus=(gcloud compute tpus)
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
fi

default_version() {
  case "$type" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "--version must be given for --type=$type." ;;
  esac
}

# Runs a command on every worker of every slice, at once.
everywhere() {
  local node pids=() status=0
  for node in ${nodes[@]+"${nodes[@]}"}; do
    local command=("${tpus[@]}" tpu-vm ssh "$node" --zone="$zone" --worker=all --command="$1")
    if $PRINT; then
      run "${command[@]}"
    else
      "${command[@]}" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || status=$?; done
  return "$status"
}

case "$action" in
  create)
    need --type "$type"
    version="${version:-$(default_version)}"
    if ((slices == 1)); then
      run "${tpus[@]}" tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" \
        --version="$version" ${spot[@]+"${spot[@]}"}
    else
      run "${tpus[@]}" queued-resources create "$name" --zone="$zone" --accelerator-type="$type" \
        --runtime-version="$version" --node-count="$slices" --node-prefix="$name" \
        ${spot[@]+"${spot[@]}"}
    fi
    ;;
  setup)
    archive="/tmp/codjax-$name.tar.gz"
    run git archive --format=tar.gz --output="$archive" HEAD
    for node in ${nodes[@]+"${nodes[@]}"}; do
      run "${tpus[@]}" tpu-vm scp "$archive" "$node:codjax.tar.gz" --zone="$zone" --worker=all
    done
    everywhere "mkdir -p codjax && tar -xzf codjax.tar.gz -C codjax && cd codjax && \
. scripts/install.sh && ${python:+PYTHON=$(quoted "$python") }install_codjax tpu"
    ;;
  train)
    ((${#flags[@]})) || die "flags of codjax train must be given: --config=… --workdir=…"
    command=(
      nohup bash scripts/launch/restart.sh .venv/bin/python -m codjax train --distributed=true
      ${flags[@]+"${flags[@]}"}
    )
    everywhere "cd codjax && { $(quoted "${command[@]}") >> ../codjax.log 2>&1 < /dev/null & \
echo \$! > ../codjax.pid; }"
    ;;
  logs)
    run "${tpus[@]}" tpu-vm ssh "${nodes[0]}" --zone="$zone" --worker=0 \
      --command="tail -n 50 -f codjax.log"
    ;;
  stop)
    # shellcheck disable=SC2016 # for the shells over there
    everywhere 'kill -TERM "$(cat codjax.pid)"'
    ;;
  delete)
    if ((slices == 1)); then
      run "${tpus[@]}" tpu-vm delete "$name" --zone="$zone" --quiet
    else
      run "${tpus[@]}" queued-resources delete "$name" --zone="$zone" --force --quiet
    fi
    ;;
  *) die "the first argument must be create, setup, train, logs, stop or delete; got '$action'." ;;
esac
