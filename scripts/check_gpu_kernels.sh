#!/usr/bin/env bash
# Checks the GPU kernels on one H100: bash scripts/check_gpu_kernels.sh [--output=FILE.json]
# Registers and spills of every kernel, results and gradients against float64, speed against XLA;
# some minutes. Without a GPU: bash scripts/check_gpu_kernels.sh --compile-only
# Needs Python 3.12; installs jax[cuda13] (4.4 GB). PYTHON=… names the Python, VENV=… the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh
install_codjax gpu
exec "$VENV/bin/python" scripts/check_gpu_kernels.py "$@"
