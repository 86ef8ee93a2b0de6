"""What scoring costs in time over tokens and images, and in memory over images.

    python -m benchmarks.scale time [--sizes 96 128 ...] [--plot FILE.png]
    python -m benchmarks.scale memory [--rows 1000000]

time: seconds per image of exact impacts of a DeiT-Ti (random weights) over N patch tokens, beside N + 1 plain forward
passes of the same size; then over the number of images. memory: peak resident set of `tif score` over the number of images
(each in a process of its own), and of writing and streaming back impact shards of 196 values a row.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks._common import plain_forward, random_images
from tif_jax import create_model
from tif_jax.__main__ import use_all_cores
from tif_jax.impact import shards
from tif_jax.impact.manifest import Manifest, open_manifest
from tif_jax.impact.scoring import Scorer
from tif_jax.models import Model

ROOT = Path(__file__).parents[1]
NUM_IMAGES = (256, 1024, 4096)  # of `tif score`


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("--sizes", type=int, nargs="+", default=(96, 128, 160, 192, 224, 288, 352, 448))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if arguments.what == "time":
        use_all_cores()
        points = time_over_tokens(arguments.sizes)
        time_over_images()
        if arguments.plot:
            plot(points, arguments.plot)
    else:
        memory_of_scoring()
        memory_of_shards(arguments.rows)


def time_over_tokens(sizes: Sequence[int]) -> list[tuple[int, float, float]]:
    """For each image size N, and seconds per image of exact impacts and of N + 1 plain forward passes."""
    num_devices = len(jax.devices())
    print(f"{num_devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, deit_tiny, float32\n")
    print("| image size | N | exact, s/image | N + 1 plain forwards, s/image | ratio |\n|---|---|---|---|---|")
    points = []
    for size in sizes:
        model = deit_tiny(size)
        exact = seconds(exact_impact(model, 1))  # its masks over all devices
        forward = plain_forward(model, random_images(model, 16 * num_devices))
        of_one = np.median([seconds(forward) for _ in range(3)]) / (16 * num_devices)
        tokens = (size // 16) ** 2
        plain = float(of_one) * (tokens + 1)
        points.append((tokens, exact, plain))
        print(f"| {size} | {tokens} | {exact:.3f} | {plain:.3f} | {plain / exact:.2f} |", flush=True)
    return points


def time_over_images() -> None:
    print("\n| images | seconds | s/image |\n|---|---|---|")
    for num_images in (1, 2, 4, 8, 16):
        elapsed = seconds(exact_impact(deit_tiny(96), num_images))
        print(f"| {num_images} | {elapsed:.2f} | {elapsed / num_images:.3f} |", flush=True)


def deit_tiny(image_size: int) -> Model:
    return create_model("deit_tiny_patch16_224", image_size=image_size)


def exact_impact(model: Model, num_images: int) -> Callable[[], object]:
    options = dict(estimator="exact", mask="zero", target="label", num_samples=1, keep_ratio=0.5)
    scorer = Scorer(model, num_images, **options)
    images = random_images(model, num_images)
    return lambda: scorer(images, np.zeros(num_images, np.int32))()


def seconds(run: Callable[[], object]) -> float:
    """Of the second call."""
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def plot(points: list[tuple[int, float, float]], file: Path) -> None:
    tokens, exact, plain = zip(*points, strict=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(tokens, plain, "o--", color="0.5", label="N + 1 plain forward passes")
    axes.loglog(tokens, exact, "o-", label="exact impacts")
    axes.set(xlabel="N, patch tokens of the image", ylabel="seconds per image", title="DeiT-Ti, image sizes 96 to 448")
    axes.set_xticks(tokens, labels=map(str, tokens))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(file, dpi=110)


def memory_of_scoring() -> None:
    """With four devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    print("| `tif score` of so many images | peak resident set, MB |\n|---|---|")
    for num_images in NUM_IMAGES:
        with tempfile.TemporaryDirectory() as work:
            config = ROOT / "configs" / "digits.py"
            command = [sys.executable, "-m", "benchmarks._score_job", work, str(config), str(num_images)]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )  # its errors are shown
        print(f"| {num_images} | {int(done.stdout) / 1e6:.0f} |", flush=True)


def memory_of_shards(num_rows: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        write_rows(Path(directory), num_rows, rows_per_part=4096)
        written = time.perf_counter()
        assert sum(len(table.index) for table in shards.iter_impact(directory)) == num_rows
        read = time.perf_counter()
        size = sum(path.stat().st_size for path in Path(directory).iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"\n{num_rows} rows of 196 values: {size / 1e6:.0f} MB on disk, written in {written - began:.0f} s, streamed back "
        f"in {read - written:.0f} s, peak resident set {peak / 1e6:.0f} MB"
    )


def write_rows(directory: Path, num_rows: int, rows_per_part: int) -> None:
    """Impact shards of random numbers."""
    num_parts = -(-num_rows // rows_per_part)
    manifest = Manifest(
        num_examples=num_rows, num_images=num_rows, num_tokens=196, views=1, num_parts=num_parts,
        estimator={"name": "exact"}, mask="drop", target="label", data={}, image_size=[224, 224], preprocessing={},
        backbone="", versions={},
    )  # fmt: skip
    open_manifest(directory, manifest)
    rng = np.random.default_rng(0)
    for part in range(1, num_parts + 1):
        index = np.array(shards.part_rows(num_rows, part, num_parts))
        columns = dict(index=index, view=0 * index, id=index.astype(str), label=index % 1000, prediction=index % 1000)
        columns["loss"] = rng.random(len(index), np.float32)
        columns["impact"] = rng.standard_normal((len(index), 196), np.float32)
        shards.write_part(directory, part, num_parts, columns)


if __name__ == "__main__":
    main()
