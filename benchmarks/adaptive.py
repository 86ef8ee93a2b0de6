"""Adaptive budgets (`tif_jax.Adaptive`): what a ladder of schedules comes to on other photographs, and what knows when to
climb.

    python -m benchmarks.adaptive SCHEDULES [--num-images 500] [--taus 0.95,0.97,...] [--rounds 0]

SCHEDULES is a folder of `tif calibrate`. The rungs are DeiT-Ti under each of them and with all tokens. Routes are found on
unlabelled photographs of one set and followed on another: Imagenette's training part, its test part, and CC-BY, in $TIF_DATA
(default: ../shared/data). Prints: for each signal of the cheap models the area under the ROC curve for answers that differ;
for each tau agreement, mean GMAC and the paired difference to the two schedules nearest to that cost, mixed so that it is the
same, whatever the image; with --rounds images/s beside what the mean GMAC promise.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from benchmarks._common import data_root, median_and_range
from tif_jax import Adaptive, cost, load
from tif_jax.__main__ import use_all_cores
from tif_jax.adaptive.routing import Route, confidence, expected, promised, rung_of
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.impact.judge import over_batches
from tif_jax.impact.paired import difference
from tif_jax.runtime.mesh import make_mesh
from tif_jax.runtime.timing import in_rounds, rate

WEIGHTS = "deit_tiny_patch16_224.safetensors"
SETS = {
    "Imagenette, training": dict(name="image_folder", root="imagenette", train_split="train", test_split="train"),
    "Imagenette, test": dict(name="image_folder", root="imagenette", test_split="val"),
    "CC-BY": dict(name="image_table", root="imagenet_ccby", test_split="labels.csv"),
}
FOUND_ON = (
    ("Imagenette, training", "Imagenette, test"),
    ("Imagenette, training", "CC-BY"),
    ("CC-BY", "Imagenette, test"),
)
BATCH_SIZE = 32
ALONE = Route((0,), (-np.inf,))  # of one model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("schedules", type=Path)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--taus", default="0.95,0.97,0.98,0.99")
    parser.add_argument("--rounds", type=int, default=0)
    arguments = parser.parse_args()
    use_all_cores()
    full = load(data_root() / WEIGHTS)
    ladder = [load(data_root() / WEIGHTS, reducer=str(path)) for path in sorted(arguments.schedules.glob("*.json"))]
    ladder.sort(key=lambda model: cost(model).gmac)
    costs = [cost(model).gmac for model in (*ladder, full)]
    logits = {name: logits_of([*ladder, full], name, arguments.num_images) for name in SETS}
    signals(logits["CC-BY"], costs)
    for found_on, followed_on in FOUND_ON:
        for tau in map(float, arguments.taus.split(",")):
            row(logits[found_on], logits[followed_on], costs, tau, f"{found_on} -> {followed_on}")
    if arguments.rounds:
        speeds(full, ladder, logits["Imagenette, training"], costs, arguments)


def logits_of(models: list[Any], name: str, num_images: int) -> Float[np.ndarray, "M I L"]:
    data = dict(SETS[name], num_test=num_images)
    data["root"] = str(data_root() / data["root"])
    batches = evaluation_batches(open_source(data, "test"), data, batch_size=BATCH_SIZE)
    mesh = make_mesh(BATCH_SIZE)
    found, _ = over_batches(lambda models, images, _: [model(images)[0] for model in models], models, batches, mesh)
    return np.stack(found)


def signals(logits: Float[np.ndarray, "M I L"], costs: list[float]) -> None:
    """How well what a cheap model says tells that its class is not that of the whole one."""
    print("| rung, GMAC | differs % | margin of logits | largest probability | entropy |\n|---|---|---|---|---|")
    for rung, gmac in zip(logits[:-1], costs, strict=False):
        differs = rung.argmax(axis=1) != logits[-1].argmax(axis=1)
        log_p = log_softmax(rung, axis=1)
        entropy = -(np.exp(log_p) * log_p).sum(axis=1)
        second, first = np.sort(rung, axis=1)[:, -2:].T
        areas = [roc_auc_score(differs, unsure) for unsure in (second - first, -confidence(rung), entropy)]
        print(
            f"| {gmac:.4f} | {100 * differs.mean():.1f} | {' | '.join(f'{area:.3f}' for area in areas)} |", flush=True
        )
    print(
        "\n| found on -> followed on | tau | rungs, GMAC | promised | agreement | mean GMAC | any image alike | less that |"
    )
    print("|---|---|---|---|---|---|---|---|")


def row(here, there, costs: list[float], tau: float, label: str) -> None:
    known, others = ((confidence(x[:-1]), x[:-1].argmax(-1) == x[-1].argmax(-1)) for x in (here, there))
    route, promise, error = promised(*known, costs, tau)
    found = expected(route, *others, costs)
    always = np.concatenate([others[1], np.ones((1, others[1].shape[1]), bool)])
    own = always[rung_of(route, others[0]), np.arange(always.shape[1])].astype(float)
    above = next((i for i, gmac in enumerate(costs) if gmac >= found.cost), len(costs) - 1)
    below = max(above - 1, 0)
    share = max(0.0, (costs[above] - found.cost) / (costs[above] - costs[below])) if above else 0.0
    fixed = share * always[below] + (1 - share) * always[above]  # at the same mean cost, whatever the image
    less = difference(own, fixed)
    rungs = ", ".join(f"{costs[rung]:.3f}" for rung in route.rungs)
    one = f"{100 * fixed.mean():.1f}"
    print(
        f"| {label} | {tau} | {rungs} | {100 * promise.agreement:.1f} ± {100 * error:.1f} | {100 * found.agreement:.1f} | "
        f"{found.cost:.4f} | {one} | {100 * less.mean:+.1f} ± {100 * less.error:.1f} |",
        flush=True,
    )


def speeds(full: Any, ladder: list[Any], known, costs: list[float], arguments: argparse.Namespace) -> None:
    """Of all test photographs in one stream, in rounds with the whole model and with every model of the route alone.

    The last column compares with what these would take, each for the images that come to it: what grouping, padding and
    waiting cost.
    """
    data = dict(SETS["CC-BY"], root=str(data_root() / "imagenet_ccby"), num_test=arguments.num_images)
    read = evaluation_batches(open_source(data, "test"), data, batch_size=BATCH_SIZE)
    batches = [batch["image"] for batch in read]
    models = [*ladder, full]
    print("\n| tau | mean GMAC | images/s | x full | x GMAC | of the promise | of what its models alone would take |")
    print("|---|---|---|---|---|---|---|")
    for tau in map(float, arguments.taus.split(",")):
        route, _, _ = promised(confidence(known[:-1]), known[:-1].argmax(-1) == known[-1].argmax(-1), costs, tau)
        adaptive = Adaptive.with_route(full, ladder, route, batch_size=BATCH_SIZE)

        def run(one: Adaptive) -> int:
            return sum(len(answers.rung) for answers in one.stream(batches))

        answers = [*adaptive.stream(batches)]
        gmac, on = (np.concatenate([getattr(one, name) for one in answers]) for name in ("gmac", "rung"))
        alone = {r: Adaptive.with_route(models[r], [], ALONE, batch_size=BATCH_SIZE) for r in route.rungs}
        if len(ladder) not in alone:
            alone[len(ladder)] = Adaptive.with_route(full, [], ALONE, batch_size=BATCH_SIZE)
        for one in alone.values():
            run(one)
        turns = {name: partial(rate, partial(run, one), 0.0, 1) for name, one in {**alone, "own": adaptive}.items()}
        found = {name: np.array(rates) for name, rates in in_rounds(turns, arguments.rounds).items()}
        ratio, promise = float(np.median(found["own"] / found[len(ladder)])), costs[-1] / gmac.mean()
        seconds = sum((on >= rung).mean() / found[rung] for rung in route.rungs)
        print(
            f"| {tau} | {gmac.mean():.4f} | {median_and_range(list(found['own']))} | {ratio:.2f} | {promise:.2f} | "
            f"{ratio / promise:.2f} | {float(np.median(found['own'] * seconds)):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
