#!/usr/bin/env bash
# Tests against a real SGLang server on this machine's CPU: bash scripts/test_sglang.sh [-k …]
# Installs SGLang into .venv-sglang, once (2.6 GB; CODJAX_SGLANG_VENV=… names another folder), with
# Python 3.11: PYTHON=… names it. Arguments go to pytest. Status 77: it cannot be installed here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_codjax dev

real="$PWD/tests/rollout/sglang/real"
sglang_venv="$(realpath -m "${CODJAX_SGLANG_VENV:-.venv-sglang}")"
cannot=77 needed_gb=6 # while pip unpacks

# Ends the script: what is missing is this machine's, and no test has failed.
leave_out() {
  echo "SGLang cannot be installed here: $*" >&2
  exit "$cannot"
}

# Makes the virtual environment of the server, unless that was done with the same requirements.
install_sglang() {
  local python stamp="$sglang_venv/codjax-sglang.stamp" wanted free_gb log="$sglang_venv/pip.log"
  wanted="$(sha256sum <"$real/requirements.txt")"
  [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && return
  mkdir -p "$sglang_venv"
  free_gb="$(df --output=avail -BG "$sglang_venv" | tail -n 1 | tr -dc 0-9)"
  ((free_gb >= needed_gb)) || leave_out "$sglang_venv needs $needed_gb GB of disk; $free_gb are free"
  if [[ ! -x "$sglang_venv/bin/python" ]]; then
    python="$(find_python)" || leave_out "there is no Python for it"
    "$python" -m venv "$sglang_venv" || return 1
  fi
  echo "installing SGLang into $sglang_venv with $("$sglang_venv/bin/python" --version); minutes"
  # --no-deps: the list is complete, and what it leaves out of SGLang's own is for GPUs.
  "$sglang_venv/bin/python" -m pip install -qq --retries 10 --timeout 180 \
    --disable-pip-version-check --no-deps -r "$real/requirements.txt" 2>&1 | tee "$log" >&2 || {
    if grep -q "No matching distribution found for torch" "$log"; then
      leave_out "pip finds no CPU build of torch for it (above); if the network has one:" \
        "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/test_sglang.sh"
    elif grep -q "(from versions: none)" "$log"; then
      leave_out "pip does not reach a package index (above)"
    elif grep -q "No space left on device" "$log"; then
      leave_out "the disk is full"
    fi
    echo "the installation failed; see pip's message above" >&2
    return 1
  }
  echo "$wanted" >"$stamp"
}

install_sglang
export CODJAX_SGLANG_PYTHON="$sglang_venv/bin/python" CODJAX_SGLANG_PATH="$real/stand_in"
# One process: the tests share a pair of servers.
exec "$VENV/bin/python" -m pytest -m "slow and not gpu" "$real" "$@"
