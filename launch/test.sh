#!/usr/bin/env bash
# Installs into .venv with what the tests need and runs them; arguments are passed on: bash launch/test.sh -k oracle
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh test
exec .venv/bin/python -m pytest "$@"
