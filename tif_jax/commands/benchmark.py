"""Images/s, GMAC, parameters and peak memory of the listed reducers, measured interleaved in one process."""

import importlib.metadata
import logging
import math
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tif_jax import reducers
from tif_jax.commands import _arguments, train
from tif_jax.commands._tables import Column, aligned, fixed
from tif_jax.errors import InputError
from tif_jax.models import Model
from tif_jax.models.budget import AMOUNTS
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of, with_params
from tif_jax.runtime import records, timing
from tif_jax.runtime.mesh import make_mesh, replicate, shard
from tif_jax.weights.loading import load

logger = logging.getLogger(__name__)

_ROUNDS = 7
_SECONDS_PER_ROUND = 0.4
_COLUMNS = (
    Column("reducer", ("label",)),
    Column("GMAC", ("gmac",), fixed(4)),
    Column("params M", ("parameters",), fixed(3, 1e-6)),
    Column("images/s", ("images_per_second",), fixed(1)),
    Column("x full", ("speed_up",), fixed(2)),
    Column("of GMAC", ("of_gmac",), fixed(2)),
    Column("peak MiB", ("peak_memory_bytes",), fixed(1, 2**-20)),
)


def main(argv: list[str]) -> None:
    arguments = _arguments.parse("benchmark", __doc__, argv)
    print(table(benchmark(arguments.config, arguments.workdir)["rows"]))


def benchmark(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """DIR/benchmark.json: a row per reducer; images/s is the median of rounds in random order, all on the same batch."""
    recipe = config.benchmark
    mesh = make_mesh(recipe.batch_size, this_process_only=True)
    rows, turns = [], []
    for of_row in [with_reducer(config, entry) for entry in recipe.reducers]:
        name, options = train.reducer_options(of_row)
        fields = config.finetune.get("model", {})
        model = load(workdir / "backbone", reducer=name, dtype=recipe.dtype, **fields, **options)
        images = np.random.default_rng(0).normal(size=(recipe.batch_size, *model.image_size, 3)).astype(np.float32)
        program, arguments = compile_forward(model, images, mesh)
        jax.block_until_ready(program(*arguments))
        turns.append(partial(_images_per_second, program, arguments))
        counted = cost(model)
        rows.append(
            {
                "reducer": name,
                "label": train.label(of_row),
                "options": options,
                "batch_size": recipe.batch_size,
                "dtype": recipe.dtype,
                "gmac": counted.gmac,
                "parameters": counted.parameters,
                "peak_memory_bytes": _peak_memory(program) * mesh.size,
            }
        )
        logger.info("benchmark: %s compiled", rows[-1]["label"])
    for i, rates in timing.in_rounds(dict(enumerate(turns)), _ROUNDS).items():
        row = rows[i]
        row["images_per_second"] = statistics.median(rates)
        row["images_per_second_range"] = [min(rates), max(rates)]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "tif_jax")}
    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    result = {"device": device, "versions": versions, "rows": rows}
    records.write(workdir / "benchmark.json", result)
    return result


def compile_forward(model: Model, images: Float[np.ndarray, "B Y X 3"], mesh: Mesh) -> tuple[Any, tuple[Any, Array]]:
    """The plain forward pass, compiled, and its arguments on the mesh's devices: parameters and images. It gives logits."""
    arguments = replicate(params_of(model), mesh), shard({"image": images}, mesh)["image"]
    graphdef = nnx.split(model)[0]
    predict = jax.jit(lambda params, images: with_params(graphdef, params)(images)[0])
    return predict.lower(*arguments).compile(), arguments


def is_measured(config: ConfigDict, workdir: Path) -> bool:
    """Whether DIR/benchmark.json is what `benchmark` would measure again."""
    rows = (records.read(workdir / "benchmark.json") or {}).get("rows", [])
    recipe = config.benchmark
    wanted = [(train.label(with_reducer(config, entry)), recipe.batch_size, recipe.dtype) for entry in recipe.reducers]
    return wanted == [(row.get("label"), row["batch_size"], row["dtype"]) for row in rows]


def with_reducer(config: ConfigDict, entry: str | Mapping[str, Any], seed: int | None = None) -> ConfigDict:
    """The config with another reducer, and another seed. entry: its name, or dict(name=..., ...) with its own options.

    Of the options in config.reducer another reducer takes over only how much to keep: names of others may mean something
    else to it. An entry's own amount stands instead of that. Raises InputError for options that the reducer lacks.
    """
    own = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    if "name" not in own:
        raise InputError(f"benchmark.reducers has {entry!r}; allowed: a name, or dict(name='evit', keep_ratio=0.5)")
    known = {*reducers.options(own["name"]), "name", "budget"}
    if unknown := sorted(set(own) - known):
        raise InputError(
            f"benchmark.reducers: {own['name']!r} takes {', '.join(sorted(known))}; got {', '.join(unknown)}"
        )
    taken_over = config.reducer.to_dict()
    if own["name"] != config.reducer.name:
        taken_over = {key: value for key, value in taken_over.items() if key in AMOUNTS}
    if not own.keys().isdisjoint(AMOUNTS):
        taken_over = {key: value for key, value in taken_over.items() if key not in AMOUNTS}
    settings = config.to_dict()
    settings |= {"reducer": taken_over | own, "seed": config.seed if seed is None else seed}
    return ConfigDict(settings).lock()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text. of GMAC: the share of the speed-up that the multiply-adds promise which is there."""
    full = next((row for row in rows if row["reducer"] == "full"), None)

    def beside_full(row: dict[str, Any]) -> dict[str, float]:
        if full is None:
            return {"speed_up": math.nan, "of_gmac": math.nan}
        speed_up = row["images_per_second"] / full["images_per_second"]
        return {"speed_up": speed_up, "of_gmac": speed_up * row["gmac"] / full["gmac"]}

    return "\n".join(aligned(_COLUMNS, [row | beside_full(row) for row in rows]))


def _peak_memory(program: Any) -> int:
    """Bytes on one device while the program runs, as its compiler planned them."""
    return program.memory_analysis().peak_memory_in_bytes


def _images_per_second(program: Any, arguments: tuple) -> float:
    return timing.rate(lambda: len(jax.block_until_ready(program(*arguments))), _SECONDS_PER_ROUND)
