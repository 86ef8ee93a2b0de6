#!/usr/bin/env bash
# What launch/tpu_vm.sh has every worker do, in the folder of the project there:
#   tpu_worker.sh install BUCKET
#   tpu_worker.sh run BUCKET ATTEMPT COMMAND ...   starts tif and shows its log; asked again for the same attempt: only shows
# BUCKET may be ''. Exit status of `run`: tif's, but 41 and 42 for 1 and 2, with which gcloud itself fails; 43 where another
# attempt has taken over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
action="$1" bucket="$2"
shift 2

install_gcsfuse() {
  local list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  curl -fsSL "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" | sudo tee "$list" >/dev/null
  sudo apt-get update -q
  sudo apt-get install -qy gcsfuse
}

mount_bucket() {
  local folder="/mnt/$bucket"
  ! mountpoint -q "$folder" || return 0
  sudo mkdir -p "$folder"
  sudo chown "$(id -u)" "$folder"
  # On large machines gcsfuse remembers for ever what it once saw, and the workers would not see each other's files. A
  # checkpoint gets its name by renaming a folder, which without hierarchical namespace is refused above the limit.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$bucket" "$folder"
}

wait_for_the_run() { # the lock is held by all of its processes, to their end
  flock "$@" .tif.lock true
}

take_over() { # ATTEMPT
  echo "$1" >.tif.attempt
  ! wait_for_the_run --nonblock || return 0
  echo "stopping the earlier run" >&2
  kill -TERM -- "-$(cat .tif.pid)"
  wait_for_the_run --timeout 300 || kill -KILL -- "-$(cat .tif.pid)"
  wait_for_the_run
}

start() { # apart from the connection, which may be lost
  rm -f .tif.status
  : >tif.log # it may be followed before the command begins
  # shellcheck disable=SC2016
  setsid flock --no-fork .tif.lock bash -c 'trap : TERM; status=0; "$@" || status=$?; echo "$status" >.tif.status' - \
    .venv/bin/python -m tif_jax "$@" >>tif.log 2>&1 </dev/null &
  echo $! >.tif.pid
}

case "$action" in
  install)
    take_over installation
    # The Python of the TPU images is older than 3.11; install.sh takes uv's where it finds none.
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || curl -fsSL https://astral.sh/uv/install.sh | sh
    bash launch/install.sh tpu
    [[ -z "$bucket" ]] || command -v gcsfuse >/dev/null || install_gcsfuse
    ;;
  run)
    [[ -z "$bucket" ]] || mount_bucket
    attempt="$1"
    shift
    if [[ "$(cat .tif.attempt 2>/dev/null)" != "$attempt" ]]; then
      take_over "$attempt"
      start "$@"
    fi
    tail --pid="$(cat .tif.pid)" --lines=+1 --follow tif.log
    [[ "$(cat .tif.attempt)" == "$attempt" ]] || exit 43
    status="$(cat .tif.status 2>/dev/null || echo 137)" # none: the machine was started again
    case "$status" in
      1 | 2) exit $((40 + status)) ;;
      *) exit "$status" ;;
    esac
    ;;
esac
