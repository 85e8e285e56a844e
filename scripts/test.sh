#!/usr/bin/env bash
# Installs codjax with its dev tools into .venv, once, and runs the quick tests.
#     bash scripts/test.sh                      # all of them, on two processes
#     bash scripts/test.sh tests/test_credit.py # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
install_codjax dev
exec "$VENV/bin/python" -m pytest -n 2 -m "not slow and not gpu" "$@"
