"""metrics.jsonl: one line of JSON per log step; TensorBoard events beside it where tensorboardX is installed."""

import json
from pathlib import Path
from typing import Any

from tif_jax.runtime import files

_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to DIRECTORY/metrics.jsonl. What an interrupted run wrote after step `start` will come again and is dropped."""

    def __init__(self, directory: Path, start: int):
        self.path = directory / _NAME
        kept = [line for line in read(directory) if line["step"] <= start]
        files.write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.events = _tensorboard(directory, start)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.events:
            for name, value in metrics.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()


def read(directory: Path) -> list[dict[str, Any]]:
    """The lines of DIRECTORY/metrics.jsonl; empty if there is none."""
    path = directory / _NAME
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(_parsed, lines) if line is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed
        return None


def _tensorboard(directory: Path, start: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=start + 1)
