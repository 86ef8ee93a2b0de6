"""A program for tests that kill a scoring job, or start several: `tif score` in the current folder, with small parts.

`forks.Server` runs it: run(FLAGS...), which lists in the file `written` the parts that it wrote, or run("lock", PART).
"""

import sys
import time
from pathlib import Path

from tif_jax.__main__ import program
from tif_jax.data.digits import Digits
from tif_jax.experiment import scoring
from tif_jax.impact import job, shards

ROWS_PER_PART, NUM_PARTS = 8, 10


def prepare():
    """What every run would spend seconds on: scikit-learn is imported, and its digits are drawn."""
    Digits("train", 1)


def run(*flags):
    """Ends as `tif score` does."""
    if flags[0:1] == ("lock",):
        with shards.lock_part("run/impact", int(flags[1]), NUM_PARTS) as ours:
            assert ours
            Path("locked").touch()
            time.sleep(60)
    write_part, columns = shards.write_part, job._columns

    def slow(*arguments):
        time.sleep(0.03)
        return columns(*arguments)

    def listed(directory, part, *rest):
        write_part(directory, part, *rest)
        with open("written", "a") as file:
            print(part, file=file)

    # Each batch is kept at once, and takes a moment.
    scoring._ROWS_PER_PART, job._SECONDS_BETWEEN_SAVES = ROWS_PER_PART, 0
    job._columns, shards.write_part = slow, listed
    sys.argv[1:] = ["score", "--config", "config.py", "--workdir", "run", *flags]
    program()
