# shellcheck shell=bash
# Sourced by the other scripts, from the root of the project: `install_codjax dev`.

VENV="${VENV:-.venv}"

# The first of $PYTHON, python3, python3.13, … that is at least 3.11.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "codjax needs Python 3.11 or newer; found: $("${PYTHON:-python3}" --version 2>/dev/null || echo none)." \
    "Install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

# Makes the virtual environment and installs codjax with an extra (dev, gpu, tpu; none: "") into it,
# unless that was done already with the same pyproject.toml and constraints.txt.
install_codjax() {
  local extra="$1" python stamp wanted
  if [[ ! -x "$VENV/bin/python" ]]; then
    python="$(find_python)" || return 1
    echo "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" || {
      echo "could not make $VENV; on Debian and Ubuntu: apt-get install python3-venv" >&2
      return 1
    }
  fi
  stamp="$VENV/codjax-${extra:-run}.stamp"
  wanted="$("$VENV/bin/python" - <<'PY'
import hashlib, pathlib, sys
files = [pathlib.Path(name) for name in ("pyproject.toml", "constraints.txt")]
# The folder too: an editable install points into it.
print(hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest(), pathlib.Path.cwd(), sys.version.split()[0])
PY
)" || return 1
  # Every extra holds what codjax needs to run.
  [[ -z "$extra" ]] && for stamp in "$VENV"/codjax-*.stamp "$stamp"; do
    [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && return
  done
  [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && return
  echo "installing codjax${extra:+[$extra]} into $VENV; the first time takes a few minutes"
  "$VENV/bin/python" -m pip install -qq --retries 10 --timeout 180 \
    --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}" || {
    echo "the installation failed; see pip's message above, then run the same command again" >&2
    return 1
  }
  echo "$wanted" >"$stamp"
}
