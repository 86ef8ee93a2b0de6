"""Exact masked forward passes per second beside plain forward passes, and beside captum's, on the same cores.

    python tests/benchmark_masked.py [--model NAME] [--dtype float32] [--rounds 3] [--captum PYTHON]

Every row has its turn in every round, for a few seconds, in one process; the median over the rounds is printed, and the
ratio to the best plain row. Weights are random: they do not change the speed. --captum: a Python with torch, timm and
captum, which runs captum's FeatureAblation over the patches of the same model in a process of its own, idle out of its turn.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PLAIN_BATCHES = {"cpu": (8, 16, 32, 64), "gpu": (64, 256, 1024), "tpu": (64, 256, 1024)}
CHUNKS = {"cpu": (7, 14, 28), "gpu": (196, 392, 784, 1568), "tpu": (196, 392, 784, 1568)}
SECONDS_PER_TURN = 4.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--captum", default="", metavar="PYTHON")
    parser.add_argument("--captum-worker", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.captum_worker:
        return _captum_worker(arguments.model, arguments.captum_worker)
    rows = _rows(arguments.model, arguments.dtype)
    if arguments.captum:
        for n in (8, 16, 32):
            rows[f"captum FeatureAblation, perturbations_per_eval={n}"] = _captum(arguments.captum, arguments.model, n)
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for run in rows.values():
        run()
    for _ in range(arguments.rounds):
        for name, run in rows.items():
            count, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < SECONDS_PER_TURN:
                count += run()
            rates[name].append(count / elapsed)
    median = {name: sorted(rate)[len(rate) // 2] for name, rate in rates.items()}
    best = max(rate for name, rate in median.items() if name.startswith("plain"))
    print("| row | forward passes/s: median | lowest to highest | x plain |\n|---|---|---|---|")
    for name, rate in median.items():
        print(f"| {name} | {rate:.1f} | {min(rates[name]):.1f} to {max(rates[name]):.1f} | {rate / best:.2f} |")


def _rows(name: str, dtype: str) -> dict[str, Callable[[], int]]:
    """Row name -> a function that runs some forward passes and returns how many."""
    import jax
    import numpy as np
    from flax import nnx

    from tif_jax import create_model
    from tif_jax.__main__ import use_all_cores
    from tif_jax.impact.scoring import Scorer
    from tif_jax.models.params import params_of, with_params
    from tif_jax.runtime.mesh import make_mesh, replicate, shard

    use_all_cores()
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, {name}, {dtype}\n")
    model = create_model(name, dtype=dtype)
    graphdef = nnx.split(model)[0]
    draw = np.random.default_rng(0).normal
    rows: dict[str, Callable[[], int]] = {}
    for size in PLAIN_BATCHES[jax.default_backend()]:
        mesh = make_mesh(size)
        images = shard({"image": draw(size=(size, *model.image_size, 3)).astype(np.float32)}, mesh)["image"]
        params = replicate(params_of(model), mesh)
        forward = jax.jit(lambda params, x: with_params(graphdef, params)(x)[0])

        def plain(forward=forward, params=params, images=images) -> int:
            jax.block_until_ready(forward(params, images))
            return len(images)

        rows[f"plain, batch {size}"] = plain
    images = draw(size=(len(devices), *model.image_size, 3)).astype(np.float32)
    for mask in ("zero", "drop"):
        for chunk in CHUNKS[jax.default_backend()]:
            options = dict(estimator="exact", mask=mask, target="label", num_samples=1, keep_ratio=0.5)
            scorer = Scorer(model, len(images), chunk=chunk, **options)

            def exact(scorer=scorer) -> int:
                scorer(images, np.zeros(len(images), np.int32))()
                return len(images) * scorer.units_per_image

            rows[f"exact, {mask}, chunk {chunk}"] = exact
    return rows


def _captum(python: str, model: str, perturbations: int) -> Callable[[], int]:
    """One image of masked forward passes in the other process, at each call."""
    command = [python, str(Path(__file__)), "--model", model, "--captum-worker", str(perturbations)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None and worker.stdout is not None
    pipe_in, pipe_out = worker.stdin, worker.stdout

    def run() -> int:
        pipe_in.write("go\n")
        pipe_in.flush()
        return int(pipe_out.readline())

    return run


def _captum_worker(name: str, perturbations: int) -> None:
    import timm
    import torch
    from captum.attr import FeatureAblation

    model = timm.create_model(name).eval()
    image = torch.randn(1, 3, 224, 224)
    patches = torch.arange(196).reshape(1, 1, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3)
    ablation = FeatureAblation(model)
    for _ in sys.stdin:
        with torch.no_grad():
            ablation.attribute(image, target=0, feature_mask=patches, perturbations_per_eval=perturbations)
        print(196, flush=True)


if __name__ == "__main__":
    main()
