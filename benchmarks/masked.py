"""Exact masked forward passes per second beside plain forward passes, and beside captum's, on the same cores.

    python -m benchmarks.masked [--model NAME] [--dtype float32] [--rounds 3] [--captum PYTHON]

Every row has its turn in every round, for a few seconds, in one process; the median over the rounds is printed, and the
ratio to the best plain row. `token_impact` is the call from Python, of 2 images. Then: how much longer than that the same
call takes with a seed and with a number of images that are new to it. Weights are random: they do not change the speed.
--captum: a Python with torch, timm and captum, which runs captum's FeatureAblation over the patches of the same model in a
process of its own, idle out of its turn.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks._common import Run, in_torch, median_and_range, plain_forward, random_images, rates_of
from tif_jax import create_model, token_impact
from tif_jax.__main__ import use_all_cores
from tif_jax.impact.scoring import Scorer
from tif_jax.models import Model

PLAIN_BATCHES = {"cpu": (8, 16, 32, 64), "gpu": (64, 256, 1024), "tpu": (64, 256, 1024)}
CHUNKS = {"cpu": (7, 14, 28), "gpu": (196, 392, 784, 1568), "tpu": (196, 392, 784, 1568)}
CAPTUM_CHUNKS = (8, 16, 32)
SECONDS_PER_TURN = 4.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--captum", default="", metavar="PYTHON")
    arguments = parser.parse_args()
    use_all_cores()
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, {arguments.model}, {arguments.dtype}\n")
    model = create_model(arguments.model, dtype=arguments.dtype)
    rows = {f"plain, batch {size}": plain(model, size) for size in PLAIN_BATCHES[jax.default_backend()]}
    for mask in ("zero", "drop"):
        for chunk in CHUNKS[jax.default_backend()]:
            rows[f"exact, {mask}, chunk {chunk}"] = exact(model, mask, chunk)
    rows["token_impact"] = from_python(model, estimator="exact")
    if arguments.captum:
        theirs = in_torch(arguments.captum, arguments.model)
        for number in CAPTUM_CHUNKS:
            rows[f"captum FeatureAblation, perturbations_per_eval={number}"] = theirs("ablate", number)
    rates = rates_of(rows, arguments.rounds, SECONDS_PER_TURN)
    best = max(statistics.median(of_row) for name, of_row in rates.items() if name.startswith("plain"))
    print("| row | forward passes/s | x plain |\n|---|---|---|")
    for name, of_row in rates.items():
        print(f"| {name} | {median_and_range(of_row)} | {statistics.median(of_row) / best:.2f} |")
    print("\n| token_impact, sampled, 16 masks | s | longer than with what is known, s |\n|---|---|---|")
    for name, seconds, longer in anew(model):
        print(f"| {name} | {seconds:.2f} | {longer:+.2f} |")


def plain(model: Model, batch_size: int) -> Run:
    forward = plain_forward(model, random_images(model, batch_size))
    return lambda: len(forward())


def exact(model: Model, mask: str, chunk: int) -> Run:
    """One image on each device."""
    images = random_images(model, len(jax.devices()))
    labels = np.zeros(len(images), np.int32)
    options = dict(estimator="exact", mask=mask, target="label", num_samples=1, keep_ratio=0.5)
    scorer = Scorer(model, len(images), chunk=chunk, **options)

    def run() -> int:
        scorer(images, labels)()
        return len(images) * scorer.units_per_image

    return run


def from_python(model: Model, num_images: int = 2, seed: int = 0, **options) -> Run:
    images, labels = random_images(model, num_images), np.zeros(num_images, np.int32)

    def run() -> int:
        jax.block_until_ready(token_impact(model, images, labels, seed=seed, **options))
        return num_images * math.prod(model.grid)

    return run


def anew(model: Model) -> Iterator[tuple[str, float, float]]:
    """Seconds of a first call, and of calls that differ from it, beside those of the same calls again."""
    cases = {"the first call, 2 images": (2, 0), "another seed": (2, 1), "4 images": (4, 0), "3 images": (3, 0)}
    for name, (number, seed) in cases.items():
        run = from_python(model, number, seed, estimator="sampled")
        took = [seconds_of(run) for _ in range(4)]
        yield name, took[0], took[0] - statistics.median(took[1:])


def seconds_of(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
