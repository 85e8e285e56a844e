#!/usr/bin/env bash
# Submits a training run to TPU slices of a GKE cluster: a JobSet through kubectl, or xpk.
#
#     bash scripts/launch/gke.sh --name=cod --image=REGION-docker.pkg.dev/PROJECT/codjax/codjax:1 \
#       --accelerator=tpu-v5-lite-podslice --topology=16x16 --hosts=64 --chips=4 \
#       --claim=runs --config=configs/mine.py --workdir=/runs/mine
#
# The image is that of scripts/launch/Dockerfile. A pod that fails or is preempted ends the others,
# and JobSet starts all again; the run goes on from its newest checkpoint. Other flags go to
# codjax train.
#
#   --name=N          of the job
#   --image=I
#   --accelerator=A   label of the node pool: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology=T      of one slice, as 16x16 or 4x4x4
#   --hosts=N         machines of one slice
#   --chips=N         TPU chips of a machine (default: 4)
#   --slices=N        slices, joined by the data centre's network (default: 1)
#   --claim=C         PersistentVolumeClaim that all pods mount at /runs, ReadWriteMany
#   --restarts=N      how often JobSet starts all again (default: 1000)
#   --xpk=CLUSTER     print or run xpk workload create on that cluster instead; needs --tpu-type
#   --tpu-type=T      for xpk, as v5litepod-256
#   --print           print the commands and the YAML, and touch nothing
#
# PYTHON=… names the Python that fills the template in (default: python3).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

name="" image="" accelerator="" topology="" hosts="" chips=4 slices=1 claim="" restarts=1000
xpk="" tpu_type="" flags=()
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --accelerator=*) accelerator="${1#*=}" ;;
    --topology=*) topology="${1#*=}" ;;
    --hosts=*) hosts="${1#*=}" ;;
    --chips=*) chips="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --claim=*) claim="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --xpk=*) xpk="${1#*=}" ;;
    --tpu-type=*) tpu_type="${1#*=}" ;;
    --print) PRINT=true ;;
    -h | --help) help && exit ;;
    *) flags+=("$1") ;;
  esac
  shift
done
need --name "$name"
need --image "$image"
number --slices "$slices"
number --restarts "$restarts"
((${#flags[@]})) || die "flags of codjax train must be given: --config=… --workdir=…"
train=(python -m codjax train --distributed=true "${flags[@]}")

if [[ -n "$xpk" ]]; then
  need --tpu-type "$tpu_type"
  run xpk workload create --cluster="$xpk" --workload="$name" --tpu-type="$tpu_type" \
    --num-slices="$slices" --docker-image="$image" --max-restarts="$restarts" \
    --command="$(quoted "${train[@]}")"
  exit
fi
need --accelerator "$accelerator"
need --topology "$topology"
need --claim "$claim"
number --hosts "$hosts"
number --chips "$chips"
yaml="$("${PYTHON:-python3}" "$here/render.py" "$here/jobset.yaml.in" NAME="$name" IMAGE="$image" \
  ACCELERATOR="$accelerator" TOPOLOGY="$topology" HOSTS="$hosts" CHIPS="$chips" \
  SLICES="$slices" CLAIM="$claim" RESTARTS="$restarts" -- "${train[@]}")"
if $PRINT; then
  echo "kubectl apply -f - <<'YAML'"
  printf '%s\nYAML\n' "$yaml"
else
  kubectl apply -f - <<<"$yaml"
fi
