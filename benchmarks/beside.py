"""Forward pass, training step and exact oracle beside timm's and captum's, on the same cores, in one run.

    python -m benchmarks.beside PYTHON [--model deit_tiny_patch16_224] [--rounds 5] [--seconds 3]

PYTHON has torch, timm and captum, and works in a process of its own, idle out of its turn. Every row has its turn in every
round, for a few seconds; medians over the rounds. The last column is of the medians; where there are several settings of one
thing (captum's masks at once, parts of a batch), of the best of each. Weights are random: they do not change the speed.
"""

import argparse
import statistics

import jax

from benchmarks._common import Run, in_torch, median_and_range, rates_of
from benchmarks.masked import CAPTUM_CHUNKS, exact, from_python, plain
from benchmarks.step import ours as own_step
from benchmarks.step import random_batch
from tif_jax import create_model
from tif_jax.__main__ import use_all_cores
from tif_jax.models import Model

FORWARD, STEP = (1, 8, 32), (16, 32)  # batch sizes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("python", metavar="PYTHON")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    use_all_cores()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.model}, float32\n")
    rows = rows_of(create_model(arguments.model), in_torch(arguments.python, arguments.model))
    rates = rates_of(rows, arguments.rounds, arguments.seconds)
    medians = {row: statistics.median(of_row) for row, of_row in rates.items()}
    print("| what, images/s | tif_jax | theirs | tif_jax / theirs |\n|---|---|---|---|")
    for what in dict.fromkeys(what for what, _, _ in rows):
        best = [
            max((r for r in rows if r[:2] == (what, whose)), key=medians.__getitem__) for whose in ("ours", "theirs")
        ]
        shown = [f"{median_and_range(rates[row])}{f', {row[2]}' if row[2] else ''}" for row in best]
        print(f"| {what} | {' | '.join(shown)} | {medians[best[0]] / medians[best[1]]:.2f} |")


def rows_of(model: Model, theirs) -> dict[tuple[str, str, str], Run]:
    """By what is done, whose, and with which setting."""
    rows: dict[tuple[str, str, str], Run] = {}
    for size in FORWARD:
        rows[f"forward, batch {size}", "ours", ""] = plain(model, size)
        rows[f"forward, batch {size}", "theirs", ""] = theirs("forward", size)
    for size in STEP:
        for parts in (1, size // (4 * jax.device_count()) or 1):  # four images at once on a device, or all
            rows[f"training step, batch {size}", "ours", f"in {parts}"] = trained(model, size, parts)
        rows[f"training step, batch {size}", "theirs", ""] = theirs("step", size)
    oracle = "exact oracle (masked forward passes)"
    rows[oracle, "ours", "tif score"] = exact(model, "zero", 7)
    rows[oracle, "ours", "token_impact"] = from_python(model, estimator="exact")
    for number in CAPTUM_CHUNKS:
        rows[oracle, "theirs", f"{number} at once"] = theirs("ablate", number)
    return rows


def trained(model: Model, batch_size: int, parts: int) -> Run:
    """One step, as `tif train` takes it with accumulate=parts."""
    loop = own_step(model, random_batch(model, batch_size), batch_size // parts, parts).loop

    def run() -> int:
        loop(1)
        return batch_size

    return run


if __name__ == "__main__":
    main()
