#!/usr/bin/env bash
# Tests against a real SGLang server on this machine's CPU: bash scripts/test_sglang.sh [-k …]
# Installs SGLang into .venv-sglang, once (2.6 GB; CODJAX_SGLANG_VENV=… names another folder), with
# Python 3.11: PYTHON=… names it. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_codjax dev

real="$PWD/tests/rollout/sglang/real"
sglang_venv="$(realpath -m "${CODJAX_SGLANG_VENV:-.venv-sglang}")"

# Makes the virtual environment of the server, unless that was done with the same requirements.
install_sglang() {
  local python stamp="$sglang_venv/codjax-sglang.stamp" wanted
  wanted="$(sha256sum <"$real/requirements.txt")"
  [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && return
  if [[ ! -x "$sglang_venv/bin/python" ]]; then
    python="$(find_python)" || return 1
    "$python" -m venv "$sglang_venv" || return 1
  fi
  echo "installing SGLang into $sglang_venv with $("$sglang_venv/bin/python" --version); minutes"
  # --no-deps: the list is complete, and what it leaves out of SGLang's own is for GPUs.
  "$sglang_venv/bin/python" -m pip install -qq --retries 10 --timeout 180 \
    --disable-pip-version-check --no-deps -r "$real/requirements.txt" || {
    echo "the installation failed; see pip's message above. If it is torch's CPU build that is missing:" \
      "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/test_sglang.sh" >&2
    return 1
  }
  echo "$wanted" >"$stamp"
}

install_sglang
export CODJAX_SGLANG_PYTHON="$sglang_venv/bin/python" CODJAX_SGLANG_PATH="$real/stand_in"
# One process: the tests share a pair of servers.
exec "$VENV/bin/python" -m pytest -m "slow and not gpu" "$real" "$@"
