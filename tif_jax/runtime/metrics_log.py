"""metrics.jsonl: one line of JSON per log step; TensorBoard events beside it where tensorboardX is installed.

Lines are only ever appended. A run that was cut does some steps again, whose lines then come again: a line stands in the
place of those before it of the same and of later steps. Each ends with a checksum of what it says.
"""

import json
import logging
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tif_jax.runtime import files, records

logger = logging.getLogger(__name__)

_NAME = "metrics.jsonl"
_SUM = "crc32"


class MetricsLog:
    """Appends to DIRECTORY/metrics.jsonl. start: the step at which the run begins."""

    def __init__(self, directory: Path, start: int):
        self.path = directory / _NAME
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            self._append("\n")  # after the line that a killed run was writing
        self.events = _tensorboard(directory, start)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._append(_line(records.strict({"step": step, **metrics})) + "\n")
        self.events(step, metrics)

    def _append(self, text: str) -> None:
        files.append(self.path, text.encode())


def read(directory: Path) -> list[dict[str, Any]]:
    """The lines of DIRECTORY/metrics.jsonl, one per step, in their order; empty if there is none."""
    path = directory / _NAME
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        line = _parsed(text)
        if line is None:
            if text.endswith(b"}"):  # others are half written, by a run that was killed
                logger.warning("%s: line %d is damaged and left out", path, number)
            continue
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines


def _line(metrics: dict[str, Any]) -> str:
    return json.dumps(metrics | {_SUM: f"{zlib.crc32(json.dumps(metrics).encode()):08x}"})


def _parsed(text: bytes) -> dict[str, Any] | None:
    """What the line says; None if it is not as it was written."""
    try:
        metrics = json.loads(text)
        metrics.pop(_SUM)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return metrics if _line(metrics).encode() == text else None


def _tensorboard(directory: Path, start: int) -> Callable[[int, dict[str, float]], None]:
    """What writes the metrics of a step; nothing without tensorboardX."""
    try:
        # Not its SummaryWriter: that has a thread of its own, and once a full disk has ended it, waits for it for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar
    except ImportError:
        return lambda step, metrics: None
    with files.writing(directory / "events"):
        events = EventsWriter(str(directory / "events"))
    # What an interrupted run wrote from this step on is not shown.
    again = Event(step=start + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))

    def write(step: int, metrics: dict[str, float]) -> None:
        with files.writing(directory / "events"):
            for name, value in metrics.items():
                events.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
            events.flush()

    events.write_event(again)
    return write
