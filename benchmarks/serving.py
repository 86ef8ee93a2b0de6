"""`tif serve` under load: is every picture answered rightly, how fast, and in how much memory?

    python -m benchmarks.serving [--weights FILE] [--images FOLDER] [--reducer R] [--requests 10000] [--clients 64]

Starts the server on this machine and so many clients, each of which sends one picture after another over a connection of its
own. One request in a hundred is garbage, one in a hundred is hung up on; two more clients say nothing or half of a request.
Every answer is compared with a direct call of the model. Batches of 1 alone, as a server without batches would have them, are
served second. Then SIGTERM comes amid requests. Prints a table. Default weights and images: DeiT-Ti and the CC-BY photographs
in $TIF_DATA (default: ../shared/data).
"""

import argparse
import http.client
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil

from benchmarks._common import data_root
from tif_jax import load
from tif_jax.commands._reducers import reducer_in

VALID, GARBAGE, ABORTED = "valid", "garbage", "aborted"
_PER_HUNDRED = {7: GARBAGE, 57: ABORTED}
_PATIENCE = 60.0


class Load(NamedTuple):
    """What came of many requests."""

    counts: Counter  # of (kind, what came)
    seconds: list[float]  # of those answered rightly
    took: float


class Clients:
    """Sends pictures, and knows the right answers: the likeliest class, and the probability of it."""

    def __init__(self, port: int, files: list[bytes], answers: list[tuple[int, float]]):
        self.port, self.files, self.answers = port, files, answers
        self.stopping = False

    def together(self, num_requests: int, num_clients: int) -> Load:
        counts: Counter = Counter()
        seconds: list[float] = []
        numbers, lock, began = itertools.count(), threading.Lock(), time.perf_counter()

        def client() -> None:
            connection = None
            while (number := next(numbers)) < num_requests:
                kind = _PER_HUNDRED.get(number % 100, VALID)
                connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
                start = time.perf_counter()
                try:
                    what = self._one(connection, kind, number)
                except (OSError, http.client.HTTPException) as error:
                    what = type(error).__name__
                if kind == ABORTED or what.endswith(("Error", "Disconnected")):
                    connection.close()
                    connection = None
                with lock:
                    counts[kind, what] += 1
                    if (kind, what) == (VALID, "right"):
                        seconds.append(time.perf_counter() - start)
                if self.stopping and what == "ConnectionRefusedError":
                    return

        with ThreadPoolExecutor(num_clients) as pool:
            for done in [pool.submit(client) for _ in range(num_clients)]:
                done.result()
        return Load(counts, seconds, time.perf_counter() - began)

    def _one(self, connection: http.client.HTTPConnection, kind: str, number: int) -> str:
        which = number % len(self.files)
        body = self.files[which] if kind != GARBAGE else self.files[which][:50] + bytes(number % 997)
        connection.request("POST", "/predict?top=1", body)
        if kind == ABORTED:
            time.sleep((number // 100 % 10) / 100)
            return "hung up"
        response = connection.getresponse()
        told = json.loads(response.read())
        if response.status != 200:
            return f"{response.status}"
        output, probability = self.answers[which]
        is_right = told["classes"] == [output] and abs(told["probabilities"][0] - probability) < 1e-4
        return "right" if is_right else "wrong"


@contextmanager
def served(weights: Path, reducer: str, *flags: str):
    """(process, port)"""
    line = [sys.executable, "-m", "tif_jax", "serve", "--weights", str(weights), "--reducer", reducer, "--port", "0"]
    with subprocess.Popen([*line, *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, urlsplit(process.stdout.readline().strip()).port
        if process.poll() is None:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, default=data_root() / "deit_tiny_patch16_224.safetensors")
    parser.add_argument("--images", type=Path, default=data_root() / "imagenet_ccby")
    parser.add_argument("--reducer", default="full")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    arguments = parser.parse_args()
    paths = sorted(arguments.images.rglob("*.jpg"))
    files = [path.read_bytes() for path in paths]
    reducer = reducer_in(arguments.reducer)
    model = load(arguments.weights, reducer=reducer.pop("name"), **reducer)
    answers = [(one.classes[0], one.probabilities[0]) for one in model.predict_images(paths, top=1)]
    print("| server | requests | images/s | p50 ms | p99 ms | valid | others | MiB after 1/10, in the end |")
    print("|---|---|---|---|---|---|---|---|")
    for name, sizes, share in (("batches", "1,2,4,8,16,32", 1), ("batches of 1", "1", 10)):
        with served(arguments.weights, arguments.reducer, "--batch-sizes", sizes) as (process, port):
            clients = Clients(port, files, answers)
            number = arguments.requests // share
            with hanging(port):
                early = clients.together(number // 10, arguments.clients)
                before = psutil.Process(process.pid).memory_info().rss / 2**20
                found = clients.together(number - number // 10, arguments.clients)
            after = psutil.Process(process.pid).memory_info().rss / 2**20
            row(name, number, [early, found], before, after)
            if share == 1:
                amid = ending(process, clients, arguments.clients)
    print("\nSIGTERM amid requests:", amid)


@contextmanager
def hanging(port: int):
    """Two clients that keep the server waiting."""
    silent, half = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
    half.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nhalf")
    yield
    for one in (silent, half):
        with suppress(OSError):
            one.close()


def ending(process: subprocess.Popen, clients: Clients, num_clients: int) -> str:
    timer = threading.Timer(2.0, process.send_signal, (signal.SIGTERM,))
    clients.stopping = True
    timer.start()
    found = clients.together(10**9, num_clients)
    status = process.wait(_PATIENCE)
    return f"{told(found.counts, {VALID, GARBAGE, ABORTED})}; exit status {status}"


def told(counts: Counter, kinds: set[str]) -> str:
    return ", ".join(f"{kind}: {what} {n}" for (kind, what), n in sorted(counts.items()) if kind in kinds)


def row(name: str, number: int, loads: list[Load], before: float, after: float) -> None:
    counts = sum((one.counts for one in loads), Counter())
    seconds = np.concatenate([one.seconds for one in loads])
    valid, others = told(counts, {VALID}), told(counts, {GARBAGE, ABORTED})
    p50, p99 = 1000 * np.quantile(seconds, (0.5, 0.99))
    rate = len(seconds) / sum(one.took for one in loads)
    print(
        f"| {name} | {number} | {rate:.1f} | {p50:.0f} | {p99:.0f} | {valid} | {others} | {before:.0f}, {after:.0f} |"
    )


if __name__ == "__main__":
    main()
