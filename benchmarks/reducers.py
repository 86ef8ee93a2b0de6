"""Accuracy and cost of every reducer off the shelf: a real DeiT-Ti, without fine-tuning, on photographs with ImageNet labels.

    python -m benchmarks.reducers [accuracy_cost.png] [--only REDUCER ...]

Needs imagenet_ccby and the DeiT-Ti weights in $TIF_DATA (default: ../shared/data). Speed, other weights
and pictures: `tif compare`.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

from benchmarks._common import data_root
from benchmarks.published import DIFFRATE_RATES
from tif_jax import cost, load
from tif_jax.__main__ import use_all_cores
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.figures.plots import accuracy_cost
from tif_jax.impact.paired import beside, estimate, terms, unreduced_logits
from tif_jax.reducers.diffrate import rates
from tif_jax.runtime.mesh import make_mesh

BATCH_SIZE = 32


def leaving(ratio: float) -> tuple[int, ...]:
    """How many of a DeiT-Ti's tokens leave in each block, if that ratio of all is left, rounded up."""
    left = [197]
    while len(left) <= 12:
        left.append(math.ceil(ratio * left[-1] - 1e-9))
    return tuple(before - after for before, after in pairwise(left))


ROWS = [
    ("full", {}),
    *[("evit", dict(keep_ratio=ratio)) for ratio in (0.7, 0.5)],
    *[("tome", dict(num_merged=number)) for number in (8, 13)],
    *[("tome", dict(num_merged=13, schedule=ramp)) for ramp in ("decreasing", "increasing")],
    ("mctf", dict(num_merged=16)),
    *[("mctf", dict(keep_ratio=ratio, one_step_ahead=True)) for ratio in (0.7, 0.65, 0.5)],
    *[("diffrate", rates(row.prune_kept_num, row.merge_kept_num)) for row in DIFFRATE_RATES if "tiny" in row.model],
    *[("tofu", dict(num_merged=leaving(ratio))) for ratio in (0.925, 0.88)],
    *[("pitome", dict(keep_ratio=ratio)) for ratio in (0.925, 0.88)],
    *[(name, dict(num_kept=n)) for n in ((137, 96, 67), (98, 49, 24)) for name in ("atc", "dpc_knn")],
    *[("bat", dict(keep_ratio=ratio)) for ratio in (0.7, 0.5)],
    *[("evo_vit", dict(keep_ratio=0.5, representative=choice)) for choice in (True, False)],
    ("evo_vit", dict(keep_ratio=0.5, stages=(4, 5, 6, 7, 8, 9, 10, 11))),
    *[("tosa", dict(keep_ratio=0.5, selector=choice)) for choice in ("copy", "oracle", "class", "random")],
    *[("random", dict(keep_ratio=ratio)) for ratio in (0.7, 0.5)],
    ("norm", dict(keep_ratio=0.7)),
    *[(name, dict(budget=budget)) for budget in (0.8, 0.61) for name in ("tome", "expediting", "ailurus")],
    *[(name, dict(budget=budget)) for budget in (0.8, 0.61) for name in ("evit", "as_vit", "zero_tprune")],
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("figure", nargs="?", type=Path)
    parser.add_argument("--only", nargs="+", default=[name for name, _ in ROWS])
    arguments = parser.parse_args()
    root = data_root()
    use_all_cores()
    data = dict(name="image_table", root=str(root / "imagenet_ccby"), test_split="labels.csv", num_test=0)
    batches = list(evaluation_batches(open_source(data, "test"), data, batch_size=BATCH_SIZE))
    mesh, weights = make_mesh(BATCH_SIZE), root / "deit_tiny_patch16_224.safetensors"
    whole, labels = unreduced_logits(load(weights), batches, mesh)
    print("| reducer | options | top-1 % | class of full % | KL nats | GMAC |\n|---|---|---|---|---|---|")
    rows = []
    for name, options in [row for row in ROWS if row[0] in ("full", *arguments.only)]:
        model = load(weights, reducer=name, **options)
        ((classes, kl),) = beside([model], batches, mesh, whole)
        found = {key: estimate(x) for key, x in terms(classes, kl, whole.argmax(axis=1), labels).items()}
        text = ", ".join(f"{key}={value}" for key, value in options.items())
        top1, same = (f"{100 * found[key].mean:.1f}" for key in ("top1", "agreement"))
        gmac = cost(model).gmac
        print(f"| {name} | {text} | {top1} | {same} | {found['kl'].mean:.3f} | {gmac:.3f} |", flush=True)
        rows.append({"label": f"{name} {text}", "gmac": gmac, "top1": found["top1"]})
    if arguments.figure:
        accuracy_cost(rows, arguments.figure)


if __name__ == "__main__":
    main()
