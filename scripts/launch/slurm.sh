#!/usr/bin/env bash
# Submits a training run to SLURM: one process per GPU, requeued after preemption.
#
#     bash scripts/launch/slurm.sh --nodes=4 --gpus-per-node=8 --time=24:00:00 \
#       --config=configs/mine.py --workdir=/shared/runs/mine
#
# Run it in the folder of codjax, on a file system that the nodes share, after
# `source scripts/install.sh; install_codjax gpu` there. Other flags go to codjax train.
#
#   --nodes=N            (default: 1)
#   --gpus-per-node=G    (default: 8)
#   --time=T             limit of one job; 10 minutes before it, the run stops with a checkpoint and
#                        is queued again (default: 24:00:00); see docs/launch.md for preemption
#   --sbatch=FLAG        a further flag of sbatch, as --sbatch=--partition=gpu; may be repeated
#   --print              print the command and touch nothing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus=8 time=24:00:00 more=() flags=()
while (($#)); do
  case "$1" in
    --nodes=*) nodes="${1#*=}" ;;
    --gpus-per-node=*) gpus="${1#*=}" ;;
    --time=*) time="${1#*=}" ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --print) PRINT=true ;;
    -h | --help) help && exit ;;
    *) flags+=("$1") ;;
  esac
  shift
done
number --nodes "$nodes"
number --gpus-per-node "$gpus"
((${#flags[@]})) || die "flags of codjax train must be given: --config=… --workdir=…"

# Without "B:", the signal goes to the processes of the step and not to the batch script.
run sbatch --job-name=codjax --nodes="$nodes" --ntasks-per-node="$gpus" \
  --gpus-per-node="$gpus" --time="$time" --requeue --open-mode=append \
  --signal=TERM@600 --output=codjax-%j.log ${more[@]+"${more[@]}"} \
  scripts/launch/train.sbatch ${flags[@]+"${flags[@]}"}
