#!/usr/bin/env bash
# Runs a command again and again until it is done; codjax train goes on from its newest checkpoint.
#
#     bash scripts/launch/restart.sh [FLAGS] COMMAND [ARGUMENT…]
#
# Ends with status 0 (done), 2 (a mistake in the config) or 3 (a metric became nan), which no
# repetition mends. After any other status, that of a run which was stopped (143) among them, it
# waits and runs the command again: 5 s, then twice as long each time, at most 300 s. A run that
# leaves a newer checkpoint in the command's --workdir counts as a success, if the folder can be seen
# from here. SIGTERM and Ctrl-C go to the command as SIGTERM, and end the loop when it has ended.
#
#   --final=A,B    further statuses that end the loop
#   --tries=N      starts in a row without a newer checkpoint before it gives up (default: 20)
#   --pause=S      first pause in seconds (default: 5)
#   --no-pass      keep SIGTERM and Ctrl-C from the command: srun would kill its tasks
#   --print        print the command and touch nothing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

final=",0,2,3," tries=20 pause=5 passes=true
while (($#)); do
  case "$1" in
    --final=*) final+="${1#*=}," ;;
    --tries=*) tries="${1#*=}" ;;
    --pause=*) pause="${1#*=}" ;;
    --no-pass) passes=false ;;
    --print) PRINT=true ;;
    -h | --help) help && exit ;;
    --) shift && break ;;
    -*) die "unknown flag $1; --help tells the flags." ;;
    *) break ;;
  esac
  shift
done
(($#)) || die "a command must be given: restart.sh codjax train --config=… --workdir=…"
number --tries "$tries"
number --pause "$pause"
if $PRINT; then
  run "$@"
  exit
fi

# A run that was stopped must not look complete.
export CODJAX_STOP_STATUS=143

workdir="" before=""
for word in "$@"; do
  case "$before $word" in
    *' --workdir='*) workdir="${word#*=}" ;;
    '--workdir '*) workdir="$word" ;;
  esac
  before="$word"
done

# The number of the newest checkpoint in the workdir; -1 if there is none, or none to be seen.
newest() {
  local path step=-1
  for path in "$workdir"/checkpoints/*; do
    path="${path##*/}"
    if [[ "$path" =~ ^[0-9]+$ ]] && ((path > step)); then step=$path; fi
  done
  echo "$step"
}

child="" sleeper="" is_ending=false
# shellcheck disable=SC2329 # called by the trap
end() {
  is_ending=true
  [[ -z "$sleeper" ]] || kill "$sleeper" 2>/dev/null || true
  # Not SIGINT, which a background process ignores.
  ! $passes || [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true
}
trap end TERM INT

wait_s=$pause num_failed=0
while true; do
  status=0 step="$(newest)"
  "$@" &
  child=$!
  status_of "$child" || status=$?
  child=""
  if $is_ending || [[ "$final" == *",$status,"* ]]; then
    exit "$status"
  fi
  if (($(newest) > step)); then
    wait_s=$pause num_failed=0
  fi
  num_failed=$((num_failed + 1))
  if ((num_failed >= tries)); then
    echo "restart.sh: gave up after $num_failed starts in a row; the last ended with $status." >&2
    exit "$status"
  fi
  echo "restart.sh: ended with status $status; again in $wait_s s." >&2
  sleep "$wait_s" &
  sleeper=$!
  status_of "$sleeper" || true
  sleeper=""
  if $is_ending; then
    exit "$status"
  fi
  wait_s=$((wait_s * 2 > 300 ? 300 : wait_s * 2))
done
