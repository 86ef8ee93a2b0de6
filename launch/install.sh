#!/usr/bin/env bash
# Installs the project into .venv, which is made if absent: bash launch/install.sh [EXTRA[,EXTRA...]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [[ -n "${PYTHON:-}" ]]; then
  candidates=("$PYTHON")
else
  candidates=(python3 python3.13 python3.12 python3.11 python)
fi

# A .venv without pip is one whose making was interrupted: it is made again.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  found=""
  for candidate in "${candidates[@]}"; do
    if is_new_enough "$candidate"; then
      found="$candidate"
      break
    fi
  done
  if [[ -z "$found" && -z "${PYTHON:-}" ]] && command -v uv >/dev/null; then
    uv python install 3.12 >&2
    found="$(uv python find 3.12)"
  fi
  if [[ -z "$found" ]]; then
    echo "no Python >= 3.11 among: ${candidates[*]}; install one (or uv, which brings it), or name it: PYTHON=/path/to/python3" >&2
    exit 2
  fi
  echo "making .venv with $("$found" --version)" >&2
  "$found" -m venv .venv
fi

echo "installing into .venv" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
