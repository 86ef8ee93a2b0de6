"""Processes of one run end together: as soon as one is lost, the others say so in one line and end.

JAX's own way, `jax.distributed.initialize(..., heartbeat_timeout_seconds=10)`, is not enough. Measured with JAX 0.10.2, two
processes on one machine: after `kill -9` of one the other aborted 10 to 16 s later, with status 134 and 20 to 50 lines of
stack trace; after an exception in one, both waited for more than 100 s. Here the other one ends 0.6 s after a kill and about
5 s after an exception, with one line and status 1.

Every process keeps a connection to the first one. The system closes it when a process dies, however it dies. Where the first
is killed while a call to JAX's service in it is under way, JAX aborts the others at once: `_abort_late` makes it wait.
"""

import atexit
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress

import jax
import numpy as np
from jax.experimental import multihost_utils

from tif_jax.runtime import log_file

logger = logging.getLogger(__name__)

_SECONDS_TO_CONNECT = 20.0
_SECONDS_TO_FAIL_ALIKE = 2.0
_SECONDS_TO_STOP = 30.0
_SECONDS_FOR_JAX = 0.5  # to say at length what it saw, so that our line is the last
_FINISHED, _STOPPED, _FAILED = b".", b"s", b"f"  # a process that is killed says nothing

_connections: list[socket.socket] = []  # to the first process, and from the first to all others
_watchers: list[threading.Thread] = []
_leaving = threading.Event()


def begin(host: str) -> None:
    """Connects the processes; from now on this one ends when another is lost. host: the first one's name, as it knows it."""
    own, number = jax.process_index(), jax.process_count()  # JAX may be gone when it is time to say them
    try:
        for process, connection in _connect(host):
            connection.settimeout(None)
            lost = (
                f"tif: process {process} of {number} is lost, so process {own} ends too: see what that one says, then start "
                "all of them again; the run goes on from its last checkpoint"
            )
            _connections.append(connection)
            _watchers.append(threading.Thread(target=_watch, args=(connection, lost), daemon=True))
            _watchers[-1].start()
        _abort_late()
    except OSError as error:  # a firewall, or a host that does not know its own name
        logger.warning("the processes can not watch each other (%s): a lost one will be noticed late", error)
    atexit.register(_tell, _FINISHED)  # runs before JAX's own, which waits for the others


def leave(status: int) -> None:
    """Ends this process where it is one of several: the others notice. An orderly end would wait for them.

    After status 75 or 130, stopped by a signal, they are asked to stop, too; after others they end soon.
    """
    stopped = status in (75, 130)
    if not jax.distributed.is_initialized():
        return
    _leaving.set()
    _tell(_STOPPED if stopped else _FAILED)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:  # the others hang on it: JAX aborts them when it is gone
        until = time.monotonic() + (_SECONDS_TO_STOP if stopped else _SECONDS_TO_FAIL_ALIKE + 1)
        for watcher in _watchers:
            if watcher is not threading.current_thread():
                watcher.join(max(0.0, until - time.monotonic()))
    os._exit(status)


def crash() -> None:
    """To be called where an exception has come that nobody expects: prints it, then `leave(1)`.

    If it came because another process is lost, that is what is printed, and not in which collective it was noticed.
    """
    if jax.distributed.is_initialized():
        time.sleep(_SECONDS_TO_FAIL_ALIKE + 1)  # `_watch` may end this process meanwhile
        traceback.print_exc()
        leave(1)


def _abort_late() -> None:
    """An abort of JAX waits until `_watch` has had its say, if there is anything to be said.

    C's own `sleep` becomes the handler of SIGABRT, and gets the signal's number, 6, as its seconds: the thread that aborts
    can not run Python. Then the process aborts as it would have.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _connect(host: str) -> Iterator[tuple[int, socket.socket]]:
    """The number of the process at the other end, and the connection. Raises OSError where there is no way."""
    first, num_others = jax.process_index() == 0, jax.process_count() - 1
    server = socket.create_server(("", 0), backlog=num_others) if first else None
    own = f"{host}:{server.getsockname()[1]}" if server else ""
    address = np.zeros(300, np.uint8)
    address[: len(own)] = np.frombuffer(own.encode(), np.uint8)
    host, _, port = bytes(multihost_utils.broadcast_one_to_all(address)).rstrip(b"\0").decode().rpartition(":")
    if server is None:
        connection = socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT)
        connection.sendall(jax.process_index().to_bytes(4))
        yield 0, connection
        return
    with server:
        server.settimeout(_SECONDS_TO_CONNECT)
        for _ in range(num_others):
            connection, _ = server.accept()
            yield int.from_bytes(connection.recv(4)), connection


def _tell(message: bytes) -> None:
    for connection in _connections:
        with suppress(OSError):
            connection.sendall(message)


def _watch(connection: socket.socket, lost: str) -> None:
    message = b""
    with suppress(OSError):
        message = connection.recv(1)
    if message == _FINISHED:
        return
    if message == _STOPPED:
        os.kill(os.getpid(), signal.SIGTERM)
        # Who waits for that process in a collective would do so for ever; what is done is saved.
        if not _leaving.wait(_SECONDS_TO_STOP):
            leave(75)
    if message == _FAILED:
        _leaving.wait(_SECONDS_TO_FAIL_ALIKE)  # what was wrong there may be wrong here, and is then better said here
    if _leaving.is_set():  # `leave` waits until the other one has ended
        with suppress(OSError):
            while connection.recv(1):
                pass
        return
    time.sleep(_SECONDS_FOR_JAX)
    log_file.note(lost)
    log_file.end(1)
    print(lost, file=sys.stderr, flush=True)
    os._exit(1)
