#!/usr/bin/env bash
# Scores in PARTS independent jobs, as a SLURM array or as processes of this machine: see --help
#SBATCH --job-name=tif-score
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [[ ! -f launch/common.sh ]]; then
  echo "submit from the project's folder: sbatch --array=1-64 launch/score_array.sh ..." >&2
  exit 2
fi
source launch/common.sh

usage="usage: sbatch --array=1-PARTS [SBATCH OPTIONS] launch/score_array.sh --parts PARTS [--] --config FILE --workdir DIR ...
       bash launch/score_array.sh --parts PARTS [--jobs JOBS] [--dry-run] [--] --config FILE --workdir DIR ...

  --parts PARTS  into which the images are divided; part K is what tif score --config.score.part=K/PARTS scores
  --jobs JOBS    without SLURM: so many processes at once (default 1), the first on GPU 0, the next on GPU 1, ...
  --dry-run      print the commands instead

Finished parts are passed over, so whatever happened, the same command again completes the rest."

parts="" jobs=1
while (($#)); do
  case "$1" in
    --help | -h)
      echo "$usage"
      exit 0
      ;;
    --dry-run) DRY_RUN=1 ;;
    --parts=* | --jobs=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --parts | --jobs)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "$1 is ${2:-missing}; it is a number from 1"
      [[ "$1" == --parts ]] && parts="$2" || jobs="$2"
      shift
      ;;
    --)
      shift
      break
      ;;
    *) break ;;
  esac
  shift
done
[[ -n "$parts" && $# -gt 0 ]] || fail "$usage"
[[ -n "${DRY_RUN:-}" || -x .venv/bin/python ]] || fail "no .venv in $PWD: bash launch/install.sh, with cuda12 or tpu if needed"

arguments=("$@")
score() { # PART COMMAND_BEFORE ...
  run "${@:2}" .venv/bin/python -m tif_jax score "${arguments[@]}" --config.score.part="$1/$parts"
}

if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
  trap : TERM # the process of the step gets it too, saves and exits 75; this script outlives it
  status=0
  score "$SLURM_ARRAY_TASK_ID" srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" || status=$?
  [[ "$status" != 75 ]] || requeue
  exit "$status"
fi

every_jobs_th_part() { # from part $1 + 1, on GPU $1
  local gpu=(env)
  ((jobs == 1)) || gpu=(env "CUDA_VISIBLE_DEVICES=$1")
  trap 'exit 75' TERM # after the running process, which gets it too
  for ((part = $1 + 1; part <= parts; part += jobs)); do
    score "$part" "${gpu[@]}" || exit
  done
}

if [[ -n "${DRY_RUN:-}" ]]; then
  for ((slot = 0; slot < jobs; slot++)); do every_jobs_th_part "$slot"; done
  exit
fi

set -m # a process group each, so that signals reach all of it
slots=()
for ((slot = 0; slot < jobs; slot++)); do
  every_jobs_th_part "$slot" &
  slots+=($!)
done
trap 'stopped=yes; kill -TERM -- "${slots[@]/#/-}" 2>/dev/null || true' TERM INT

outcome=0
for slot in "${slots[@]}"; do
  status=0 stopped=""
  wait "$slot" || status=$?
  if [[ -n "$stopped" ]]; then # it was the waiting that ended
    status=0
    wait "$slot" || status=$?
  fi
  if ((status && (outcome == 0 || outcome == 75))); then outcome=$status; fi
done
exit "$outcome"
