"""Several processes, one per host or accelerator, as one run: how they find each other and agree.

How they end together is in `watch`. With one process all of this is a no-op.
"""

import argparse
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tif_jax.errors import InputError
from tif_jax.runtime import preemption, watch

logger = logging.getLogger(__name__)

_A_WEEK = 7 * 24 * 3600

# For `_arguments.parse`. The environment's names are those that launchers of JAX programs commonly set.
FLAGS: dict[str, dict] = dict(
    coordinator=dict(
        default=os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
        metavar="HOST:PORT",
        help="of process 0, where one run has several processes (default: $JAX_COORDINATOR_ADDRESS)",
    ),
    num_processes=dict(
        type=int,
        default=os.environ.get("JAX_NUM_PROCESSES"),
        metavar="N",
        help="how many processes the run has (default: $JAX_NUM_PROCESSES)",
    ),
    process_id=dict(
        type=int,
        default=os.environ.get("JAX_PROCESS_ID", "0"),
        metavar="I",
        help="which of them this is, from 0 (default: $JAX_PROCESS_ID or 0)",
    ),
)


def join(arguments: argparse.Namespace) -> None:
    """Makes this process one of several, before JAX starts: as FLAGS say, else as a TPU slice, SLURM or Kubernetes do.

    Raises InputError where the flags do not fit together.
    """
    number = arguments.num_processes
    if not 0 <= arguments.process_id < (number or 1):
        raise InputError(f"--process_id is {arguments.process_id} of --num_processes={number or 1}; they count from 0")
    if bool(arguments.coordinator) != (number is not None) and number != 1:
        raise InputError("--coordinator=HOST:PORT and --num_processes=N go together")
    # Who has finished waits for the others.
    if number is not None and number > 1:
        jax.distributed.initialize(
            arguments.coordinator, number, arguments.process_id, shutdown_timeout_seconds=_A_WEEK
        )
    elif number is None and _in_a_cluster():
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=_A_WEEK)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"this looks like one process of several, but the others were not found ({error}): give --coordinator, "
                "--num_processes and --process_id, or --num_processes=1 to a process by itself"
            ) from None
    if jax.process_count() > 1:
        preemption.take_back()  # JAX tells the other processes of a SIGTERM
        logger.info(
            "process %d of %d, with %d of %d devices",
            jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(),
        )  # fmt: skip
        if not is_first():
            logging.getLogger("tif_jax").setLevel(logging.WARNING)
        watch.begin(arguments.coordinator.rpartition(":")[0] or socket.gethostname())


def _in_a_cluster() -> bool:
    """Whether JAX can find the other processes by itself. On a machine alone it would raise an error instead."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # under srun, not in the batch script around it
        return True
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return True
    on_tpu = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return on_tpu and "tpu" in wanted and "," in os.environ.get("TPU_WORKER_HOSTNAMES", ",")


def is_first() -> bool:
    """Whether this process writes what all have found: logs, reports, metrics."""
    return jax.process_index() == 0


def first_says(value: bool) -> bool:
    """The first process's value, in all of them: for decisions that hang on files which another may see later."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def all_say(value: bool) -> bool:
    """Whether it is true in all processes."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(value)).all())


def wait_for_all(what: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


_calls, _agreed = itertools.count(1), threading.Event()  # of `stop_asked`


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """A function that tells whether to save and stop: in all processes the same, after a signal has come to any of them.

    All have to ask equally often, once a step. See `preemption.stop_flag`.
    """
    with preemption.stop_flag() as stop:
        yield stop.is_set if jax.process_count() == 1 else _ask_all


def _ask_all() -> bool:
    # JAX's own handler of SIGTERM tells the other processes, and at which of the calls to come they all say yes; once.
    # Calls are counted through all stages, so that one between two stages is not waited for in vain.
    if not _agreed.is_set() and multihost_utils.reached_preemption_sync_point(next(_calls)):
        _agreed.set()
    return _agreed.is_set()
