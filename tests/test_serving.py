"""The server: answers as of direct calls, whatever else clients do; mistakes, and a quiet end."""

import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from cases import numpy_model, write_safetensors
from PIL import Image
from reference import random_timm_tensors
from test_batcher import waited_for

from tif_jax import Adaptive, predict_images
from tif_jax.__main__ import main
from tif_jax.adaptive.routing import ALWAYS, Route
from tif_jax.data.preprocess import Preprocessing
from tif_jax.errors import InputError
from tif_jax.serving import listening
from tif_jax.serving.app import Limits, Service
from tif_jax.serving.classifier import Classifier
from tif_jax.serving.listening import bound, serve

ROOT = Path(__file__).parents[1]
FIELDS = dict(image_size=32, patch_size=8, width=16, depth=2, num_heads=2, num_classes=5)


@contextmanager
def served(classifier, limits=None):
    """(port, what to set to stop it, the thread)"""
    stop, listener = threading.Event(), bound("127.0.0.1", 0)
    seconds = {size: 0.01 * size**0.5 for size in classifier.sizes}
    service = Service(classifier, seconds, limits or Limits(patience=0.01), {"num_classes": 5})
    thread = threading.Thread(target=serve, args=(service, listener, stop))
    thread.start()
    try:
        yield listener.getsockname()[1], stop, thread
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def asked(port, method="GET", path="/", body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def png(seed, size=(40, 36)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def classifier():
    model = numpy_model(FIELDS, reducer="norm", keep_ratio=0.5)
    model.preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model.class_names = ("a", "b", "c", "d", "e")
    return Classifier(model, [1, 4])


def test_answers_are_those_of_direct_calls_whatever_else_comes(classifier):
    pictures = [png(i) for i in range(24)]
    direct = predict_images(classifier.model, pictures, top=3)
    with served(classifier) as (port, _, _), ThreadPoolExecutor(12) as clients:
        hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        hanging[1].sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        hanging[2].sendall(b"\x16\x03\x01 garbage\r\n\r\n")
        noise = [clients.submit(asked, port, "POST", "/predict", b"no picture %d" % i) for i in range(6)]
        found = [clients.submit(asked, port, "POST", "/predict?top=3&tokens=true", body) for body in pictures]
        answers = [f.result() for f in found]
        for one in hanging:
            one.close()
        assert all(f.result()[0] == 400 for f in noise)
        text = asked(port, path="/metrics")[1].decode()
    for (status, body), expected in zip(answers, direct, strict=True):
        told = json.loads(body)
        assert status == 200 and tuple(told["classes"]) == expected.classes and tuple(told["names"]) == expected.names
        np.testing.assert_allclose(told["probabilities"], expected.probabilities, rtol=2e-5)
        assert len(told["kept"]) == 8 and told["gmac"] > 0
    assert 'tif_requests_total{status="200"} 24.0' in text and 'tif_requests_total{status="400"} 6.0' in text
    assert "tif_batch_images_sum 24.0" in text


def test_mistakes_are_answered_with_a_line(classifier):
    with served(classifier, Limits(num_bytes=10_000, seconds=0.3)) as (port, _, _):
        assert asked(port) == (200, b'{"num_classes":5}')
        assert asked(port, path="/health") == (200, b'{"status":"ok"}')
        assert asked(port, path="/predict") == (405, b'{"error":"Method Not Allowed"}')
        assert asked(port, path="/nothing") == (404, b'{"error":"Not Found"}')
        for path, body, status, said in [
            ("/predict", b"", 400, "the body is empty"),
            ("/predict", b"GIF89a", 400, "cannot read image"),
            ("/predict", b"x" * 10_001, 413, "10000 bytes are the most"),
            ("/predict?top=0", b"x", 400, "top is '0'"),
            ("/predict?tokens=1", b"x", 400, "tokens is '1'"),
            ("/predict?topp=1", b"x", 400, "topp is not known"),
            ("/predict", iter([b"x" * 6000, b"x" * 6000]), 413, "too large"),  # no length said
        ]:
            found, told = asked(port, "POST", path, body)
            assert found == status and said in json.loads(told)["error"], (path, told)
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
            assert b"408" in slow.recv(1000).splitlines()[0]


def test_a_small_file_of_huge_size_is_refused(classifier):
    file = io.BytesIO()
    Image.new("1", (9000, 8000)).save(file, "PNG")
    with served(classifier) as (port, _, _):
        status, told = asked(port, "POST", "/predict", file.getvalue())
    assert status == 400 and b"9000 x 8000 pixels" in told


class Slow(Classifier):
    """Answers when it is let go."""

    def __init__(self, other):
        super().__init__(other.model, other.sizes)
        self._forwards = other._forwards
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, views):
        self.began.set()
        assert self.go.wait(30)
        return super().__call__(views)


def test_beyond_what_it_bears_it_says_so_and_answers_the_rest_before_it_ends(classifier):
    slow = Slow(classifier)
    with served(slow, Limits(requests=3, patience=0.0)) as (port, stop, thread), ThreadPoolExecutor(4) as clients:
        found = [clients.submit(asked, port, "POST", "/predict", png(i)) for i in range(3)]
        waited_for(lambda: b"tif_requests_in_progress 3.0" in asked(port, path="/metrics")[1])
        status, told = asked(port, "POST", "/predict", png(4))
        assert status == 503 and b"try again" in told
        stop.set()
        waited_for(lambda: not _listens(port))
        assert thread.is_alive()
        slow.go.set()
        assert [f.result()[0] for f in found] == [200] * 3


def _listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def test_who_hangs_up_is_not_computed(classifier):
    slow = Slow(classifier)
    with served(slow, Limits(patience=0.0)) as (port, _, _), ThreadPoolExecutor(1) as clients:
        first = clients.submit(asked, port, "POST", "/predict", png(0))
        assert slow.began.wait(30)
        body = png(1)
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        waited_for(lambda: b"tif_waiting_images 1.0" in asked(port, path="/metrics")[1])
        gone.close()
        waited_for(lambda: b'status="499"} 1.0' in asked(port, path="/metrics")[1])
        slow.go.set()
        assert first.result()[0] == 200
        assert b"tif_batch_images_sum 1.0" in asked(port, path="/metrics")[1]


def test_a_failed_batch_is_told(classifier, caplog):
    class Broken(Slow):
        def __call__(self, views):
            raise ValueError("no device")

    with served(Broken(classifier)) as (port, _, _):
        assert asked(port, "POST", "/predict", png(0))[0] == 500
        assert asked(port, path="/health")[0] == 200
    assert "no device" in caplog.text


def test_connections_without_a_request_are_closed(classifier, monkeypatch):
    monkeypatch.setattr(listening, "_SECONDS", 0.2)
    with served(classifier) as (port, _, _):
        silent = socket.create_connection(("127.0.0.1", port), timeout=20)
        slow = socket.create_connection(("127.0.0.1", port), timeout=20)
        slow.sendall(b"POST /predict HTTP/1.1\r\nHos")
        for one in (silent, slow):
            with (
                pytest.raises(ConnectionResetError) if one is slow else pytest.raises((ConnectionResetError, EOFError))
            ):
                if one.recv(100) == b"":
                    raise ConnectionResetError


def test_a_request_behind_another_may_take_its_time(classifier, monkeypatch):
    """Both lie in one packet; the second begins when the first is answered, and takes longer than a silence may."""
    monkeypatch.setattr(listening, "_SECONDS", 0.2)
    monkeypatch.setattr(listening, "_SECONDS_BETWEEN", 1.0)
    slow, body = Slow(classifier), png(0)
    one = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with served(slow, Limits(patience=0.0)) as (port, _, _), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(30)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + one)
        assert slow.began.wait(30)
        time.sleep(1.5)
        slow.go.set()
        found = b""
        while found.count(b"HTTP/1.1 200 OK") < 2:
            part = client.recv(1000)
            assert part, found
            found += part


def test_a_ladder_is_compiled_before_it_serves():
    model = numpy_model(FIELDS)
    ladder = [numpy_model(FIELDS, reducer="random", keep_ratio=keep) for keep in (0.25, 0.5)]
    adaptive = Adaptive.with_route(model, ladder, Route((0, 2), (0.3, ALWAYS)), batch_size=4)
    classifier = Classifier(adaptive, [4])
    assert {*classifier.seconds()} == {1, 4} == {*classifier.sizes}
    assert [sorted(program._programs) for program in adaptive._forwards] == [[1, 4], [], [1, 4]]
    with served(classifier) as (port, _, _):
        status, told = asked(port, "POST", "/predict?tokens=true", png(0))
        assert status == 400 and b"models of its own" in told
        assert asked(port, "POST", "/predict", png(0))[0] == 200


def test_ports_that_can_not_be_had():
    with bound("127.0.0.1", 0) as taken, pytest.raises(InputError, match="can not listen on 127"):
        bound("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="can not listen on no such host"):
        bound("no such host", 80)
    with pytest.raises(InputError, match="can not listen on a"):
        bound("a..b", 80)
    with pytest.raises(InputError, match="port 70000"):
        bound("127.0.0.1", 70_000)


def test_the_program_ends_quietly_when_told_to(tmp_path):
    tensors = random_timm_tensors(np.random.default_rng(0), width=64, depth=1, patch_size=8, grid=(2, 2), num_classes=3)
    weights = write_safetensors(tmp_path / "model.safetensors", tensors)
    how = {"input_size": [3, 16, 16], "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    described = {"architecture": "own", "num_classes": 3, "model_args": {"num_heads": 4}, "pretrained_cfg": how}
    (tmp_path / "config.json").write_text(json.dumps(described))
    line = [
        "serve",
        "--weights",
        str(weights),
        "--port",
        "0",
        "--batch-sizes",
        "1,2",
        "--reducer",
        "norm:keep_ratio=0.5",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "tif_jax", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as program:
        url = urlsplit(program.stdout.readline().strip())
        told = json.loads(asked(url.port)[1])
        assert told["num_classes"] == 3 and told["image_size"] == [16, 16]
        assert told["reducers"] == [{"name": "norm", "keep_ratio": 0.5}]
        body, clients = png(0), [socket.create_connection(("127.0.0.1", url.port), timeout=30) for _ in range(8)]
        for one in clients:  # accepted, and not there yet
            one.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:50])
        waited_for(lambda: b"tif_requests_in_progress 8.0" in asked(url.port, path="/metrics")[1])
        program.send_signal(signal.SIGTERM)
        waited_for(lambda: not _listens(url.port))
        for one in clients:
            one.sendall(body[50:])
        assert [one.recv(100).split(b"\r\n")[0] for one in clients] == [b"HTTP/1.1 200 OK"] * 8
        assert program.wait(30) == 0, program.stderr.read()


@pytest.mark.parametrize(
    "line, said",
    [
        (["--max-requests", "0"], "--max-requests is 0; it is at least 1"),
        (["--patience-ms", "-1"], "--patience-ms is -1; it is from 0 to 60000"),
        (["--batch-sizes", "none"], "--batch-sizes is 'none'; it is as in 1,16,256"),
        (["--reducer", "nothing"], "nothing"),
    ],
)
def test_mistakes_of_the_line(line, said, capsys):
    assert main(["serve", "--weights", "none.safetensors", *line]) == 2
    assert said in capsys.readouterr().err
