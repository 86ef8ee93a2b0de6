#!/usr/bin/env bash
# Installs into .venv and runs the digits pipeline; arguments are passed on: bash launch/local.sh --config.seeds=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh
exec .venv/bin/python -m tif_jax run --config configs/digits.py --workdir runs/digits "$@"
