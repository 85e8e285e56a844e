# shellcheck shell=bash
# Sourced by the launch scripts: commands that run, or that --print only shows.

PRINT=false

# The words as one could type them in a shell.
quoted() {
  local word text=""
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    text+=" $word"
  done
  printf '%s' "${text# }"
}

# Runs a command, or prints it.
run() {
  if $PRINT; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# Ends the script with one line that says what is wrong: bad usage, status 2.
die() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# The comment at the top of the script is its help.
help() {
  sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;}}' "$0"
}

# need NAME VALUE: a flag that must be given.
need() {
  [[ -n "$2" ]] || die "$1 must be given; --help tells the flags."
}

# number NAME VALUE: a flag that counts something.
number() {
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || die "$1 must be a whole number, at least 1; got '$2'."
}

# start LABEL COMMAND…: runs it in the background; every line of its output begins with the label.
# `${PIDS[@]}` are the processes. Ctrl-C and SIGTERM reach the process group: what passes the lines on
# must outlive whom they are for.
PIDS=() READERS=() PIPES=""
start() {
  local label="$1" pipe
  shift
  if [[ -z "$PIPES" ]]; then
    PIPES="$(mktemp -d)"
    trap 'rm -rf "$PIPES"' EXIT
  fi
  pipe="$PIPES/${#PIDS[@]}"
  mkfifo "$pipe"
  (
    trap '' INT TERM
    while IFS= read -r line || [[ -n "$line" ]]; do printf '[%s] %s\n' "$label" "$line"; done
  ) <"$pipe" &
  READERS+=($!)
  "$@" >"$pipe" 2>&1 &
  PIDS+=($!)
}

# Waits for all that was started, and for their last lines. Ends the script with the first status
# other than 0 of a process.
finish() {
  local pid status=0 one
  for pid in ${PIDS[@]+"${PIDS[@]}"}; do
    one=0
    status_of "$pid" || one=$?
    ((status)) || status=$one
  done
  for pid in ${READERS[@]+"${READERS[@]}"}; do status_of "$pid" || true; done
  exit "$status"
}

# The exit status of a child, however often our own signals interrupt the waiting.
status_of() {
  while kill -0 "$1" 2>/dev/null; do
    wait "$1" || true
  done
  wait "$1"
}
