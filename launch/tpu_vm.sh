#!/usr/bin/env bash
# Makes a TPU VM, installs the working tree on all its workers and runs tif there, through preemptions, until it is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

usage="usage: bash launch/tpu_vm.sh --name NAME --zone ZONE --type TYPE [FLAGS] [--] COMMAND --config FILE --workdir DIR ...

  --name NAME        of the TPU VM or slice; one that is there is used
  --zone ZONE        such as us-central1-a
  --type TYPE        such as v5litepod-16 or v6e-8
  --version VERSION  of its software (default: Google's choice for the type)
  --project PROJECT  default: gcloud's
  --spot             cheaper; may be preempted at any time
  --bucket BUCKET    Cloud Storage bucket, mounted at /mnt/BUCKET on every worker. Local disks end with the VM: what has
                     to survive it, --workdir /mnt/BUCKET/..., is there
  --delete           delete the VM when the run is over, done or failed
  --pause SECONDS    before trying again (default 30)
  --dry-run          print the commands instead

Exit status: tif's; 1 also where trying again did not help."

name="" zone="" type="" version="" project="" spot="" bucket="" delete="" pause=30
while (($#)); do
  case "$1" in
    --help | -h)
      echo "$usage"
      exit 0
      ;;
    --spot) spot=yes ;;
    --delete) delete=yes ;;
    --dry-run) DRY_RUN=1 ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --name | --zone | --type | --version | --project | --bucket | --pause)
      [[ -n "${2:-}" && "$2" != -* ]] || fail "$1 needs a value; --help lists the flags"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --)
      shift
      break
      ;;
    -*) fail "unknown flag $1; --help lists the flags, and those of tif come after its COMMAND" ;;
    *) break ;;
  esac
  shift
done
[[ -n "$name" && -n "$zone" && -n "$type" ]] || fail "--name, --zone and --type are needed; --help lists the flags"
(($#)) || fail "what is tif to do? --help shows the order of the arguments"
bucket="${bucket#gs://}"
if [[ -z "$version" ]]; then
  case "$type" in
    v6e*) version=v2-alpha-tpuv6e ;;
    v5p*) version=v2-alpha-tpuv5 ;;
    v5lite*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
need gcloud "https://cloud.google.com/sdk/docs/install"

vm=(gcloud compute tpus tpu-vm)
where=("--zone=$zone" ${project:+"--project=$project"})
worker=(bash tif_jax/launch/tpu_worker.sh)
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
trap 'say "stopped here; the workers go on: the same command again takes over"; exit 130' INT TERM

state=""
seen="" # ready once: what gcloud cannot do from then on, it can later
installed=""
read_state() {
  local command=("${vm[@]}" describe "$name" "${where[@]}" "--format=value(state)")
  if [[ -n "${DRY_RUN:-}" ]]; then
    run "${command[@]}"
    state="${state:-ABSENT}"
  elif ! state="$("${command[@]}" 2>"$scratch/describe")"; then
    if grep -q NOT_FOUND "$scratch/describe"; then
      state=ABSENT
    else
      cat "$scratch/describe" >&2
      state=UNREACHABLE
    fi
  fi
}

create() {
  installed=""
  local command=("${vm[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot})
  if { run "${command[@]}" 2>&1 >&3 | tee "$scratch/create" >&2; } 3>&1; then
    [[ -z "${DRY_RUN:-}" ]] || state=READY
    return
  fi
  [[ -n "$seen" ]] || grep -qi capacity "$scratch/create" || fail "$name could not be created"
  say "trying again in $pause s"
  sleep "$pause"
}

make_ready() {
  while read_state && [[ "$state" != READY ]]; do
    case "$state" in
      ABSENT) create ;;
      PREEMPTED | TERMINATED | HIDDEN | UNKNOWN)
        say "$name is $state: deleting it"
        run "${vm[@]}" delete "$name" "${where[@]}" --quiet || sleep "$pause"
        ;;
      STOPPED) fail "$name was stopped by somebody; start or delete it" ;;
      UNREACHABLE)
        [[ -n "$seen" ]] || fail "gcloud cannot tell the state of $name"
        sleep "$pause"
        ;;
      *) say "$name is $state" && sleep "$pause" ;;
    esac
    [[ -z "${DRY_RUN:-}" ]] || break
  done
  seen=yes
}

on_workers() { # COMMAND
  run "${vm[@]}" ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

install() {
  local file
  while IFS= read -r -d '' file; do
    [[ ! -e "$file" ]] || printf '%s\0' "$file"
  done < <(git ls-files -z --cached --others --exclude-standard) | tar --null --files-from=- -czf "$scratch/tif_jax.tar.gz"
  run "${vm[@]}" scp "$scratch/tif_jax.tar.gz" "$name:" "${where[@]}" --worker=all &&
    on_workers "mkdir -p tif_jax && tar -xzf tif_jax.tar.gz -C tif_jax && $(quote "${worker[@]}" install "$bucket")" &&
    installed=yes
}

over() { # STATUS
  if [[ -n "$delete" ]]; then
    run "${vm[@]}" delete "$name" "${where[@]}" --quiet
  else
    say "$name is still there and is paid for; to delete it: $(quote "${vm[@]}" delete "$name" "${where[@]}")"
  fi
  exit "$1"
}

failures=0 # in a row
launch="$(date +%s)-$$" attempt=1
while true; do
  make_ready
  status=0
  if [[ -z "$installed" ]]; then install || status=$?; fi
  if ((status == 0)); then
    on_workers "$(quote "${worker[@]}" run "$bucket" "$launch-$attempt" "$@")" || status=$?
  fi
  case "$status" in
    0) over 0 ;;
    42) over 2 ;;
    43)
      say "$name was taken over by a later start of this script"
      exit 1
      ;;
    1 | 255) ((++failures)) ;; # gcloud or the connection: the run may be going on
    75) ((++attempt, failures = 0, 1)) ;;
    *) ((++attempt, ++failures)) ;;
  esac
  sleep "$pause" # a preemption does not show at once
  read_state
  if [[ "$state" == READY ]]; then
    ((status != 41)) || over 1
    ((failures < 5)) || over 1
  else
    failures=0
  fi
  say "the run ended with status $status on $name, which is $state: running it again"
done
