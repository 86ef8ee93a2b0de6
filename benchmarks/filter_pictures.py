"""Draws what a fitted filter keeps of CC-BY photographs, where it does well and where it fails, and prints whose they are.

    python -m benchmarks.filter_pictures runs/filters/ours/filter runs/filters/judge-photographs docs/filter_pictures.png

The first folder holds the filter's checkpoints, the second the photographs' oracle. Both are made by

    python -m benchmarks.filters --workdir runs/filters --scored runs/imagenette \\
        --judge "photographs: configs/imagenette.py:photographs" -- "ours: configs/imagenette.py"

where `tif score --config configs/imagenette.py --workdir runs/imagenette` came first.
"""

import csv
import sys
from pathlib import Path

import jax
import numpy as np

from tif_jax import data, load
from tif_jax.__main__ import use_all_cores
from tif_jax.commands._report import pictures
from tif_jax.data.loader import evaluation_batches
from tif_jax.experiment import config as config_file
from tif_jax.figures.plots import picture_page
from tif_jax.impact import shards
from tif_jax.impact.judge import unreduced
from tif_jax.impact.rankings import mean_spearman

NUM_PICTURES = 3  # of each kind


def main(checkpoint: str, judge: str, out: str) -> None:
    use_all_cores()
    config = config_file.load("configs/imagenette.py:photographs", [])
    model = load(checkpoint, keep_ratio=0.5, then=None)
    oracle = shards.read_impact(Path(judge) / "heldout-teacher")
    found = []
    call = jax.jit(lambda x: (*model(x), unreduced(model, x)))
    for batch in evaluation_batches(data.open_source(config.data, "test"), config.data, batch_size=20):
        logits, aux, whole = jax.device_get(call(batch["image"]))
        found.append((logits.argmax(1), whole.argmax(1), aux["filter_logits"], batch["label"]))
    said, whole, ranking, label = (np.concatenate(column)[: len(oracle.index)] for column in zip(*found, strict=True))
    rho = np.array([mean_spearman(a[None], b[None]) for a, b in zip(ranking, oracle.impact, strict=True)])
    right = whole == label
    successes = np.flatnonzero(right & (said == whole))
    failures = np.flatnonzero(right & (said != whole))
    best = successes[np.argsort(-rho[successes])][:NUM_PICTURES]
    worst = failures[np.argsort(rho[failures])][:NUM_PICTURES]
    chosen = np.concatenate([best, worst])
    credits = list(csv.DictReader((Path(config.data.root) / config.data.test_split).open()))
    for i in chosen:
        who = credits[oracle.index[i]]
        verdict = "kept its class" if said[i] == whole[i] else "lost its class"
        print(f"{verdict}, rho {rho[i]:.2f}: {who['author']}, {who['source']}")
    picture_page(pictures(model, config, oracle, chosen), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
