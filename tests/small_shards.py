"""Impact shards for tests: a small folder in which every number is known."""

import os

import numpy as np

from tif_jax.impact.manifest import open_manifest
from tif_jax.impact.shards import part_rows, write_part

NUM_EXAMPLES, VIEWS, NUM_PARTS, NUM_TOKENS = 10, 2, 3, 5


def manifest(**changes):
    return {
        "num_examples": NUM_EXAMPLES,
        "num_images": NUM_EXAMPLES,
        "num_tokens": NUM_TOKENS,
        "views": VIEWS,
        "num_parts": NUM_PARTS,
        "estimator": {"name": "sampled", "num_samples": 16},
        "mask": "drop",
        "target": "label",
        "data": {"name": "digits", "split": "train"},
        "image_size": (64, 64),
        "preprocessing": {"crop": "centre"},
        "backbone": "b" * 64,
        "versions": {"jax": "0.10.0"},
    } | changes


def rows_of(index, view, num_tokens=NUM_TOKENS, dtype=np.float32):
    """Columns in which every number is a function of (index, view)."""
    index, view = np.asarray(index), np.asarray(view)
    impact = (index[:, None] + 100 * view[:, None] + 0.1 * np.arange(num_tokens)).astype(dtype)
    return {
        "index": index,
        "view": view,
        "id": [f"train/ß {i}.jpg" for i in index],
        "label": index % 3 - 1,
        "prediction": index % 4,
        "loss": np.asarray(index / 7, np.float32),
        "impact": impact,
    }


def part_columns(part, dtype=np.float32):
    rows = np.array(part_rows(NUM_EXAMPLES * VIEWS, part, NUM_PARTS))
    return rows_of(rows // VIEWS, rows % VIEWS, dtype=dtype)


def write_all(workdir, dtype=np.float32):
    open_manifest(workdir / "impact", manifest())
    for part in range(1, NUM_PARTS + 1):
        write_part(workdir / "impact", part, NUM_PARTS, part_columns(part, dtype))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def error_numbered(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail
