#!/usr/bin/env bash
# Runs tif on a SLURM cluster, one process per GPU: sbatch --nodes=4 launch/slurm.sh run --config FILE --workdir DIR
#SBATCH --job-name=tif
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
# SLURM runs a copy of this file.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [[ ! -f launch/common.sh ]]; then
  echo "submit from the project's folder: sbatch launch/slurm.sh ..." >&2
  exit 2
fi
source launch/common.sh

usage="usage: sbatch [SBATCH OPTIONS] launch/slurm.sh COMMAND --config FILE --workdir DIR ...
       bash launch/slurm.sh [--dry-run] COMMAND ...    # the same without SBATCH OPTIONS; --dry-run: prints what would be run

One process per GPU: --ntasks-per-node and --gpus-per-node are the GPUs of a node. Install on the shared file system first:
bash launch/install.sh cuda12"

case "${1:-}" in
  --help | -h | "")
    echo "$usage"
    [[ $# -gt 0 ]] && exit 0 || exit 2
    ;;
  --dry-run)
    DRY_RUN=1
    shift
    ;;
esac
[[ "${1:-}" != -- ]] || shift

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  need sbatch "this is for the login node of a SLURM cluster"
  run sbatch launch/slurm.sh "$@"
  [[ -n "${DRY_RUN:-}" ]] || exit 0
fi

[[ -n "${DRY_RUN:-}" || -x .venv/bin/python ]] || fail "no .venv in $PWD: bash launch/install.sh cuda12"
trap : TERM # the processes of the step get it too, save and exit 75; this script outlives them
status=0
# srun does not take --cpus-per-task over from sbatch. All GPUs of a node stay visible: JAX takes the one of its local rank.
run srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" .venv/bin/python -m tif_jax "$@" || status=$?
[[ "$status" != 75 ]] || requeue
exit "$status"
