"""What scoring costs in time over tokens and images, and in memory over images.

    python tests/benchmark_scale.py time [--sizes 96 128 ...] [--plot FILE.png]
    python tests/benchmark_scale.py memory [--rows 1000000]

time: seconds per image of exact impacts of a DeiT-Ti (random weights) over N patch tokens, beside N + 1 plain forward
passes of the same size; then over the number of images. memory: peak resident set of `tif score` over the number of images
(each in a process of its own), and of writing and streaming back impact shards of 196 values a row.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from tif_jax.impact import shards

NUM_IMAGES = (256, 1024, 4096)
JOB = """
import os, resource, sys
from pathlib import Path
os.environ |= dict(JAX_NUM_CPU_DEVICES="4", JAX_CPU_ENABLE_ASYNC_DISPATCH="false")  # `main` comes after the first use of JAX
import jax.numpy as jnp
from tif_jax.__main__ import main
from tif_jax.models import create_model
from tif_jax.state import Checkpoints, State, params_of
work, config, num_images = sys.argv[1:]
fields = dict(image_size=64, patch_size=8, width=96, depth=2, num_heads=3, num_classes=10, pool="mean", class_token=False)
with Checkpoints(Path(work) / "backbone" / "checkpoints") as checkpoints:
    state = State(jnp.zeros((), jnp.int32), params_of(create_model(fields)), ())
    checkpoints.save(state, dict(model=fields, reducer=dict(name="full")), {})
flags = ["--config.score.num_images=" + num_images, "--config.score.estimator=gradient"]
if status := main(["score", "--config", config, "--workdir", work, *flags]):
    sys.exit(status)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("--sizes", type=int, nargs="+", default=(96, 128, 160, 192, 224, 288, 352, 448))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if arguments.what == "time":
        measure_time(arguments.sizes, arguments.plot)
    else:
        measure_memory(arguments.rows)


def measure_time(sizes: list[int], plot: Path | None) -> None:
    import jax
    from flax import nnx

    from tif_jax import create_model
    from tif_jax.__main__ import use_all_cores
    from tif_jax.impact.scoring import Scorer
    from tif_jax.models.params import params_of, with_params
    from tif_jax.runtime.mesh import make_mesh, replicate, shard

    use_all_cores()
    num_devices = len(jax.devices())
    draw = np.random.default_rng(0).normal

    def seconds(run) -> float:
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def model_and_scorer(size: int, num_images: int):
        model = create_model("deit_tiny_patch16_224", image_size=size)
        options = dict(estimator="exact", mask="zero", target="label", num_samples=1, keep_ratio=0.5)
        scorer = Scorer(model, num_images, **options)
        images = draw(size=(num_images, size, size, 3)).astype(np.float32)
        return model, lambda: scorer(images, np.zeros(num_images, np.int32))()

    print(f"{num_devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, deit_tiny, float32\n")
    print("| image size | N | exact, s/image | N + 1 plain forwards, s/image | ratio |\n|---|---|---|---|---|")
    points = []
    for size in sizes:
        model, score = model_and_scorer(size, 1)  # its masks over all devices
        graphdef, batch = nnx.split(model)[0], 16 * num_devices
        mesh = make_mesh(batch)
        params = replicate(params_of(model), mesh)
        images = shard({"image": draw(size=(batch, size, size, 3)).astype(np.float32)}, mesh)["image"]
        forward = jax.jit(lambda params, x, graphdef=graphdef: with_params(graphdef, params)(x)[0])
        tokens = (size // 16) ** 2
        exact = seconds(score)
        run = partial(_finish, forward, params, images)
        plain = np.median([seconds(run) for _ in range(3)]) / batch
        points.append((tokens, exact, (tokens + 1) * plain))
        print(f"| {size} | {tokens} | {exact:.3f} | {points[-1][2]:.3f} | {points[-1][2] / exact:.2f} |", flush=True)
    print("\n| images | seconds | s/image |\n|---|---|---|")
    for num_images in (1, 2, 4, 8, 16):
        elapsed = seconds(model_and_scorer(96, num_images)[1])
        print(f"| {num_images} | {elapsed:.2f} | {elapsed / num_images:.3f} |", flush=True)
    if plot:
        _plot(points, plot)


def _finish(function, *arguments) -> None:
    import jax

    jax.block_until_ready(function(*arguments))


def _plot(points: list[tuple[int, float, float]], file: Path) -> None:
    from matplotlib.figure import Figure

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


def measure_memory(num_rows: int) -> None:
    config = Path(__file__).parent.parent / "configs" / "digits.py"
    print("| `tif score` of so many images | peak resident set, MB |\n|---|---|")
    for num_images in NUM_IMAGES:
        with tempfile.TemporaryDirectory() as work:
            command = [sys.executable, "-c", JOB, work, str(config), str(num_images)]
            peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"| {num_images} | {peak / 1e6:.0f} |", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        write_rows(Path(directory), num_rows, rows_per_part=4096)
        written = time.perf_counter()
        assert sum(len(table.index) for table in shards.iter_impact(directory)) == num_rows
        read = time.perf_counter()
        size = sum(path.stat().st_size for path in Path(directory).iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"\n{num_rows} rows of 196 values: {size / 1e6:.0f} MB on disk, written in {written - started:.0f} s, ", end=""
    )
    print(f"streamed back in {read - written:.0f} s, peak resident set {peak / 1e6:.0f} MB")


def write_rows(directory: Path, num_rows: int, rows_per_part: int) -> None:
    """Impact shards of random numbers."""
    num_parts = -(-num_rows // rows_per_part)
    manifest = shards.Manifest(
        num_examples=num_rows, num_images=num_rows, num_tokens=196, views=1, num_parts=num_parts,
        estimator={"name": "exact"}, mask="drop", target="label", data={}, image_size=224, preprocessing={}, backbone="",
        versions={},
    )  # fmt: skip
    shards.open_manifest(directory, manifest)
    rng = np.random.default_rng(0)
    for part in range(1, num_parts + 1):
        index = np.array(shards.part_rows(num_rows, part, num_parts))
        columns = dict(index=index, view=0 * index, id=index.astype(str), label=index % 1000, prediction=index % 1000)
        columns["loss"] = rng.random(len(index), np.float32)
        columns["impact"] = rng.standard_normal((len(index), 196), np.float32)
        shards.write_part(directory, part, num_parts, columns)


if __name__ == "__main__":
    main()
