"""Images/s, GMAC, parameters and peak memory of the listed reducers, measured interleaved in one process."""

import logging
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import jax

from tif_jax.commands import _arguments
from tif_jax.commands._tables import Column, aligned, fixed
from tif_jax.experiment.folders import backbone_folder, finetune_folder
from tif_jax.experiment.predecessors import as_begun, standing
from tif_jax.experiment.schema import Experiment
from tif_jax.models.compiled import compile_forward, peak_memory, random_images
from tif_jax.models.cost import cost
from tif_jax.runtime import records, timing
from tif_jax.runtime.machine import machine
from tif_jax.runtime.mesh import make_mesh
from tif_jax.runtime.workdir import begin_log, only_run
from tif_jax.weights.loading import load_with_fields

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
    with only_run(arguments.workdir):
        begin_log(arguments.workdir)
        result = benchmark(arguments.config, arguments.workdir)
    print(table(result["rows"]))


def benchmark(config: Experiment, workdir: Path) -> dict[str, Any]:
    """DIR/benchmark.json: a row per reducer; images/s is the median of rounds in random order, all on the same batch."""
    recipe = config.benchmark
    mesh = make_mesh(recipe.batch_size, this_process_only=True)
    checkpoint, which = standing(backbone_folder(workdir))
    rows, turns = [], []
    for entry in recipe.reducers:
        # What was fine-tuned under a budget is measured with the amount that it has.
        begun = as_begun(entry, finetune_folder(config.under(entry), workdir))
        given = {**config.finetune.model, **begun.arguments}
        model, _ = load_with_fields(checkpoint, reducer=entry.name, dtype=recipe.dtype, **given)
        program, arguments = compile_forward(model, random_images(model, recipe.batch_size), mesh)
        jax.block_until_ready(program(*arguments))
        turns.append(partial(_images_per_second, program, arguments))
        counted = cost(model)
        rows.append(
            {
                "reducer": entry.name,
                "label": entry.label,
                "options": entry.arguments,
                "batch_size": recipe.batch_size,
                "dtype": recipe.dtype,
                "gmac": counted.gmac,
                "parameters": counted.parameters,
                "peak_memory_bytes": peak_memory(program, mesh),
            }
        )
        logger.info("benchmark: %s compiled", rows[-1]["label"])
    for i, rates in timing.in_rounds(dict(enumerate(turns)), _ROUNDS).items():
        row = rows[i]
        row["images_per_second"] = statistics.median(rates)
        row["images_per_second_range"] = [min(rates), max(rates)]
    result = {"checkpoint": which, **_measured_on(recipe.batch_size), "rows": rows}
    records.write(workdir / "benchmark.json", result)
    return result


def is_measured(config: Experiment, workdir: Path) -> bool:
    """Whether DIR/benchmark.json has the rows of this config: this backbone, reducers, batch size, dtype; on this machine."""
    recipe = config.benchmark
    made_from = {"checkpoint": standing(backbone_folder(workdir))[1], **_measured_on(recipe.batch_size)}
    rows = (records.read_result(workdir / "benchmark.json", made_from) or {}).get("rows", [])
    wanted = [(entry.label, recipe.batch_size, recipe.dtype) for entry in recipe.reducers]
    return wanted == [(row.get("label"), row["batch_size"], row["dtype"]) for row in rows]


def _measured_on(batch_size: int) -> dict[str, Any]:
    """What decides on speeds beside the programs."""
    device = f"{make_mesh(batch_size, this_process_only=True).size} x {jax.devices()[0].device_kind}"
    return {"device": device, "machine": machine(), "versions": records.versions()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text. The column `of GMAC` is the measured speed-up over the one that the multiply-adds promise."""
    full = next((row for row in rows if row["reducer"] == "full"), None)

    def beside_full(row: dict[str, Any]) -> dict[str, float]:
        if full is None:
            return {"speed_up": math.nan, "of_gmac": math.nan}
        speed_up = row["images_per_second"] / full["images_per_second"]
        return {"speed_up": speed_up, "of_gmac": speed_up * row["gmac"] / full["gmac"]}

    return "\n".join(aligned(_COLUMNS, [row | beside_full(row) for row in rows]))


def _images_per_second(program: Any, arguments: tuple) -> float:
    return timing.rate(lambda: len(jax.block_until_ready(program(*arguments))), _SECONDS_PER_ROUND)
