"""A server on a port, from when it listens until it is told to stop and has answered what it accepted."""

import asyncio
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tif_jax.errors import InputError
from tif_jax.serving.app import Service

logger = logging.getLogger(__name__)

_SECONDS = 10.0  # for a connection's first request to arrive, up to the end of its headers
_SECONDS_BETWEEN = 75.0  # for the next one; longer than the pools of common proxies keep a connection
_SECONDS_TO_STOP = 30  # for what is accepted to be answered
_CONNECTIONS = 1024  # open ones; while there are so many, every request is answered 503


class _Impatient(H11Protocol):
    """Hangs up on who does not send a request: uvicorn would wait for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._await_request(_SECONDS)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered:  # or the next request was there, and has begun
            self._await_request(_SECONDS_BETWEEN)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _await_request(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._hang_up_unless_after, self.cycle)

    def _hang_up_unless_after(self, cycle) -> None:
        if self.cycle is cycle:
            self.transport.abort()


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free. Raises InputError where it can not be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"can not listen on {host}, port {port}: {reason}") from None


def serve(service: Service, listener: socket.socket, stop: threading.Event) -> None:
    """Serves until `stop` is set; returns when all that was accepted is answered."""
    config = uvicorn.Config(
        service.app(), http=_Impatient, ws="none", lifespan="on", log_config=None, access_log=False,
        limit_concurrency=_CONNECTIONS, timeout_graceful_shutdown=_SECONDS_TO_STOP, server_header=False,
        timeout_keep_alive=int(_SECONDS_BETWEEN),
    )  # fmt: skip
    server = uvicorn.Server(config)
    with ThreadPoolExecutor(1) as pool:  # outside the main thread uvicorn leaves signals to us
        running = pool.submit(server.run, sockets=[listener])
        running.add_done_callback(lambda _: stop.set())
        stop.wait()
        server.should_exit = True
        running.result()
