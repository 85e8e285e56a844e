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
#   --restarts=N      how often JobSet starts all again, without pauses (default: 100)
#   --print           print the commands and the YAML, and touch nothing
#   --xpk=CLUSTER     print or run xpk workload create on that cluster instead, with --tpu-type, and
#                     without --accelerator, --topology, --hosts, --chips and --claim
#   --tpu-type=T      for xpk, as v5litepod-256
#   --xpk-flag=FLAG   a further flag of xpk, as --xpk-flag=--zone=us-west4-a; may be repeated
#
# PYTHON=… names the Python that fills the template in, at least 3.11 (default: the first found).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

name="" image="" accelerator="" topology="" hosts="" chips="" slices=1 claim="" restarts=100
xpk="" tpu_type="" xpk_flags=() flags=()
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
    --xpk-flag=*) xpk_flags+=("${1#*=}") ;;
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
train=(python -m codjax train --distributed=true ${flags[@]+"${flags[@]}"})

if [[ -n "$xpk" ]]; then
  need --tpu-type "$tpu_type"
  [[ -z "$accelerator$topology$hosts$chips" ]] ||
    die "--accelerator, --topology, --hosts and --chips are not for xpk: --tpu-type says all that."
  [[ -z "$claim" ]] || die "--claim is not for xpk: its own storages are, by --xpk-flag=--storage=…"
  for flag in ${flags[@]+"${flags[@]}"}; do
    case "$flag" in
      --zone* | --project* | --storage*) die "for xpk it must be --xpk-flag=$flag." ;;
    esac
  done
  # Its shell is process 1 and sends SIGTERM on to one child, which exec makes Python. By itself it
  # starts again after 42 and 127 to 255 only (143: stopped; 134, 137: ended by JAX or a signal).
  command="$(quoted exec env CODJAX_STOP_STATUS=143 "${train[@]}")"
  run xpk workload create --cluster="$xpk" --workload="$name" --tpu-type="$tpu_type" \
    --num-slices="$slices" --docker-image="$image" --max-restarts="$restarts" \
    --restart-on-exit-codes=1 --termination-grace-period-seconds=600 \
    ${xpk_flags[@]+"${xpk_flags[@]}"} --command="${command//\$/\$\$}"
  exit
fi
if [[ -n "$tpu_type" ]] || ((${#xpk_flags[@]})); then
  die "--tpu-type and --xpk-flag are for xpk: --xpk=CLUSTER must be given too."
fi
need --accelerator "$accelerator"
need --topology "$topology"
need --claim "$claim"
number --hosts "$hosts"
number --chips "${chips:=4}"
source "$here/../install.sh"
python="$(find_python)" || exit 2
yaml="$("$python" "$here/render.py" "$here/jobset.yaml.in" NAME="$name" IMAGE="$image" \
  ACCELERATOR="$accelerator" TOPOLOGY="$topology" HOSTS="$hosts" CHIPS="$chips" \
  SLICES="$slices" CLAIM="$claim" RESTARTS="$restarts" -- "${train[@]}")"
if $PRINT; then
  echo "kubectl apply -f - <<'YAML'"
  printf '%s\nYAML\n' "$yaml"
else
  kubectl apply -f - <<<"$yaml"
fi
