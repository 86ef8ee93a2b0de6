"""Progress of long work: a bar where a person watches a terminal, a plain line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from tqdm import tqdm

from tif_jax.runtime import log_file

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


def told(
    batches: Iterator[dict[str, Any]], title: str, total: int, batch_size: int | None = None
) -> Iterator[dict[str, Any]]:
    """The batches, told as progress over `total` images, and closed in the end. The last one may be filled up.

    batch_size: of all processes together, where each has a share of a batch.
    """
    with Progress(title, total, "image") as progress, closing(batches):  # type: ignore[type-var]
        for batch in batches:
            yield batch
            progress.update(min(batch_size or len(batch["weight"]), total - progress.done))


class Progress:
    """Counts `total` units of work, `start` of which an earlier run did. Use as a context manager."""

    def __init__(self, title: str, total: int, unit: str, start: int = 0):
        self.title, self.total, self.unit, self.start = title, total, unit, start
        self.done = start
        self.began = self.spoke = time.monotonic()
        self.bar = tqdm(total=total, initial=start, desc=title, unit=unit, disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_exc) -> None:
        self.bar.close()

    def skip(self, n: int) -> None:
        """n units turned out to be done already; they do not count as speed."""
        self.start += n
        self.done += n
        self.bar.update(n)

    def update(self, n: int, **shown: float) -> None:
        """n more units are done; `shown` are figures to print beside."""
        self.done += n
        figures = {name: f"{value:.4g}" for name, value in shown.items()}
        if not self.bar.disable:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update(n)
        if (now := time.monotonic()) - self.spoke > _SECONDS_BETWEEN_LINES or self.done == self.total:
            self.spoke = now
            left = (now - self.began) / max(1, self.done - self.start) * (self.total - self.done)
            extra = "".join(f", {name} {value}" for name, value in figures.items())
            line = f"{self.title}: {self.done} of {self.total} {self.unit}{extra}, {tqdm.format_interval(left)} left"
            if self.bar.disable:
                logger.info("%s", line)
            else:  # the terminal has the bar
                log_file.note(line)
