"""The HTTP face of a classifier: POST a picture to /predict; /health, /metrics, and / says what is served."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tif_jax.data.source import UnreadableImage
from tif_jax.errors import WorkError
from tif_jax.models.predictions import prediction_of
from tif_jax.runtime.machine import num_cores
from tif_jax.serving.batcher import Batcher
from tif_jax.serving.classifier import Answer, Classifier
from tif_jax.serving.metrics import CONTENT_TYPE, Metrics

logger = logging.getLogger(__name__)

_GONE = 499  # what nginx calls a client that hung up; nobody reads it


@dataclass(frozen=True)
class Limits:
    """What a server bears."""

    requests: int = 256  # accepted at once; those beyond are answered 503
    num_bytes: int = 16 * 2**20  # of a picture's file
    seconds: float = 10.0  # for a request to arrive whole
    patience: float = 0.005  # seconds that a picture waits for others to share its batch


class _RefusedError(Exception):
    """Answered with a status and a sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class Service:
    """Requests in, answers out. `seconds`: of a batch of each size, as measured; `about`: what / says besides."""

    def __init__(self, classifier: Classifier, seconds: Mapping[int, float], limits: Limits, about: dict[str, Any]):
        self._classifier, self._limits, self._about = classifier, limits, about
        self._batcher: Batcher = Batcher(self._answered, dict(seconds), limits.patience)
        self._decoders = ThreadPoolExecutor(num_cores(), thread_name_prefix="decode")
        self._num_accepted = 0
        self.metrics = Metrics(sorted(seconds), lambda: len(self._batcher))

    def app(self) -> Starlette:
        routes = [
            Route("/predict", self._predict, methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/", self._index),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _as_json})

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._batcher.close)
        self._decoders.shutdown()

    async def _predict(self, request: Request) -> Response:
        began = time.monotonic()
        try:
            response = await self._admitted(request)
        except _RefusedError as refused:
            retry = {"Retry-After": "1"} if refused.status == 503 else {}
            response = JSONResponse({"error": str(refused)}, refused.status, headers=retry)
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            response = JSONResponse({"error": "the server ends"}, 503)
        except Exception:  # ours, and told in the log; the next request may well be answered
            logger.exception("a picture is not answered")
            response = JSONResponse({"error": "this picture could not be answered; the server's log says why"}, 500)
        self.metrics.requests.labels(str(response.status_code)).inc()
        self.metrics.seconds.observe(time.monotonic() - began)
        return response

    async def _admitted(self, request: Request) -> Response:
        if self._num_accepted >= self._limits.requests:
            raise _RefusedError(503, f"{self._num_accepted} pictures are in work, as many as may be; try again")
        self._num_accepted += 1
        self.metrics.in_progress.inc()
        try:
            top, with_tokens = self._asked(request)
            view = await self._view(request)
            answer = await _unless_gone(asyncio.wrap_future(self._batcher.put(view)), request)
            return Response(self._told(answer, top, with_tokens), media_type="application/json")
        finally:
            self._num_accepted -= 1
            self.metrics.in_progress.dec()

    async def _view(self, request: Request) -> np.ndarray:
        """What the model gets of the picture; its file is not kept."""
        body = await self._body(request)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, self._classifier.view, body)
        except UnreadableImage as error:
            raise _RefusedError(400, str(error)) from None

    def _asked(self, request: Request) -> tuple[int, bool]:
        """How many classes, and whether tokens are told."""
        asked = request.query_params
        if unknown := sorted({*asked} - {"top", "tokens"}):
            raise _RefusedError(400, f"{unknown[0]} is not known; a request takes top=5 and tokens=true")
        top, tokens = asked.get("top", "5"), asked.get("tokens", "false")
        if not (top.isascii() and top.isdigit() and 0 < int(top[:9]) and len(top) < 9):
            raise _RefusedError(400, f"top is {top[:20]!r}; it is a number of classes, at least 1")
        if tokens not in ("true", "false"):
            raise _RefusedError(400, f"tokens is {tokens[:20]!r}; it is true or false")
        if tokens == "true" and not self._classifier.tells_tokens:
            raise _RefusedError(
                400, "tokens is true, but each picture goes through models of its own here: leave it out"
            )
        return int(top), tokens == "true"

    async def _body(self, request: Request) -> bytes:
        most = self._limits.num_bytes
        refused = _RefusedError(413, f"the picture's file is too large; {most} bytes are the most")
        if (said := request.headers.get("content-length", "")).isdigit() and int(said[:18]) > most:
            raise refused
        parts, number = [], 0
        try:
            async with asyncio.timeout(self._limits.seconds):
                async for part in request.stream():
                    number += len(part)
                    if number > most:
                        raise refused
                    parts.append(part)
        except TimeoutError:
            raise _RefusedError(408, f"the picture did not arrive within {self._limits.seconds:g} s") from None
        if not number:
            raise _RefusedError(400, "the body is empty; it is the file of one picture, as curl --data-binary sends it")
        return b"".join(parts)

    def _answered(self, views: Sequence[np.ndarray]) -> list[Answer]:
        self.metrics.batches.observe(len(views))
        return self._classifier(views)

    def _told(self, answer: Answer, top: int, with_tokens: bool) -> bytes:
        try:
            found = prediction_of(self._classifier.model, "this picture", answer.probabilities, top)
        except WorkError as error:
            raise _RefusedError(500, str(error)) from None
        self.metrics.gmac.inc(answer.gmac)
        told: dict[str, Any] = {
            "classes": found.classes,
            "names": found.names,
            "probabilities": [float(f"{p:.6g}") for p in found.probabilities],
            "gmac": round(answer.gmac, 6),
        }
        if with_tokens:
            told |= {name: row.tolist() for name, row in answer.tokens.items()}
        return json.dumps(told).encode()

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _index(self, _request: Request) -> Response:
        return JSONResponse(self._about)


async def _as_json(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _unless_gone(answer: "asyncio.Future[Answer]", request: Request) -> Answer:
    """The answer; what nobody waits for any more is taken back. Raises ClientDisconnect."""
    gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())  # behind the body comes nothing but that
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()
