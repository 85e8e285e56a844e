#!/usr/bin/env bash
# Runs a command again and again until it is done; codjax train goes on from its newest checkpoint.
#
#     bash scripts/launch/restart.sh [FLAGS] COMMAND [ARGUMENT…]
#
# Ends with status 0 (done) or 2 (a mistake in the config, which no repetition mends). After any
# other status, 143 (another host was preempted) among them, it waits and runs the command again:
# 5 s, then twice as long each time, at most 300 s; a run of ten minutes or more counts as a success.
# SIGTERM and SIGINT go to the command, and end the loop when it has ended.
#
#   --final=A,B    further statuses that end the loop
#   --tries=N      starts in a row that fail before it gives up (default: 100)
#   --pause=S      first pause in seconds (default: 5)
#   --print        print the command and touch nothing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

final=",0,2," tries=100 pause=5
while (($#)); do
  case "$1" in
    --final=*) final+="${1#*=}," ;;
    --tries=*) tries="${1#*=}" ;;
    --pause=*) pause="${1#*=}" ;;
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

child="" is_ending=false
# shellcheck disable=SC2329 # called by the trap
pass_on() {
  is_ending=true
  [[ -z "$child" ]] || kill "-$1" "$child" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

wait_s=$pause num_failed=0
while true; do
  started=$SECONDS status=0
  "$@" &
  child=$!
  status_of "$child" || status=$?
  child=""
  if $is_ending || [[ "$final" == *",$status,"* ]]; then
    exit "$status"
  fi
  if ((SECONDS - started >= 600)); then
    wait_s=$pause num_failed=0
  fi
  num_failed=$((num_failed + 1))
  if ((num_failed >= tries)); then
    echo "restart.sh: gave up after $num_failed starts in a row; the last ended with $status." >&2
    exit "$status"
  fi
  echo "restart.sh: ended with status $status; again in $wait_s s." >&2
  sleep "$wait_s" &
  child=$!
  status_of "$child" || true
  child=""
  if $is_ending; then
    exit "$status"
  fi
  wait_s=$((wait_s * 2 > 300 ? 300 : wait_s * 2))
done
