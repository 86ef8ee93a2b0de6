# shellcheck shell=bash
# What the launch scripts share. Sourced from the project's folder, not run. With DRY_RUN set, commands are printed only.

say() {
  echo "$*" >&2
}

fail() { # what the user has to mend
  say "$*"
  exit 2
}

quote() { # one line that a shell reads as these arguments
  local word line="" apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_./:=@%+,-]*) line+=" '${word//$apostrophe/$escaped}'" ;;
      *) line+=" $word" ;;
    esac
  done
  echo "${line# }"
}

run() {
  echo "+ $(quote "$@")"
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}

need() { # TOOL WHERE_FROM
  [[ -n "${DRY_RUN:-}" ]] || command -v "$1" >/dev/null || fail "$1 is not installed (or not on PATH): $2"
}

# Inside a SLURM job whose tif stopped after saving: the job again, unless it was cancelled or SLURM itself queues it again.
requeue() {
  local job="$SLURM_JOB_ID"
  # The number of one task of an array is also that of the whole array.
  [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  if [[ "$(squeue --noheader --jobs "$job" --format %T)" == RUNNING ]]; then
    run scontrol requeue "$job"
  fi
}
