#!/usr/bin/env bash
# Installs into .venv and runs the digits pipeline; arguments are passed on: bash launch/local.sh --config.seeds=1
# The keys of a config: .venv/bin/tif --help config. Without arguments: tif run --config configs/digits.py --workdir runs/digits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,3s/^# //p' launch/local.sh
  exit
fi

bash launch/install.sh
exec .venv/bin/python -m tif_jax run --config configs/digits.py --workdir runs/digits "$@"
