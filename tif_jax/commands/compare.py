"""Reducers side by side on your pictures: agreement with all tokens, KL, top-1, cost and speed; as a table and curves."""

import argparse
import logging

import numpy as np

from tif_jax.commands import _arguments, _compare_report
from tif_jax.commands._compare_kept import Kept, kept_in
from tif_jax.commands._compare_regret import measure_regrets
from tif_jax.commands._compare_rows import Asked, labels_of, rows_asked
from tif_jax.commands._compare_speed import speeds
from tif_jax.commands._compare_work import AT_ONCE, Work
from tif_jax.commands._pictures import class_index_of, opened
from tif_jax.commands._weights import read_weights
from tif_jax.errors import InputError
from tif_jax.impact.paired import beside
from tif_jax.models import Model, built_with
from tif_jax.models.cost import cost
from tif_jax.models.model import dtype_name
from tif_jax.models.params import params_of
from tif_jax.runtime.mesh import make_mesh
from tif_jax.runtime.workdir import begin_log, only_run

logger = logging.getLogger(__name__)

_NO_SPEED = "none"


def main(argv: list[str]) -> None:
    arguments = _parsed(argv)
    _arguments.log_to_stderr()
    sizes = _batch_sizes(arguments.batch_sizes)
    for flag, value in (
        ("--rounds", arguments.rounds),
        ("--num-images", arguments.num_images),
        ("--regret", arguments.regret),
    ):
        if value is not None:
            _arguments.at_least_1(flag, value)
    dtype_name(arguments.dtype)
    out = _arguments.writable_folder("--out", arguments.out)
    class_index = class_index_of(arguments.class_index)
    with only_run(out, "--out"):
        begin_log(out)
        weights = read_weights(arguments.weights, arguments.dtype, "a comparison")
        pictures = opened(arguments.images, arguments.labels, weights.full, class_index, arguments.num_images)
        asked = rows_asked(weights, arguments.reducer, arguments.budget, max(sizes, default=32))
        labels = dict(zip(labels_of(asked), asked, strict=True))
        _compare_report.reference_of(labels, arguments.reference)  # a mistake is told before the work
        kept = kept_in(out, weights, pictures)
        work = Work(weights, pictures, make_mesh(pictures.batch_size, this_process_only=True), kept)
        models, kept.data["left_out"] = _predict(work, labels)
        labels = {label: asked for label, asked in labels.items() if label in models}
        if arguments.regret is not None:
            measure_regrets(work, models, arguments.regret)
        _measure(models, sizes, arguments.rounds, kept)
        found = _compare_report.finish(out, kept, labels, sizes, arguments.reference)
    print("\n".join(_compare_report.text(found)))
    print(out / _compare_report.MARKDOWN)


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = _arguments.Parser(prog="tif compare", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    _arguments.add_weights_and_images(parser)
    add(
        "--labels",
        metavar="FILE.csv|folders",
        help="columns file and label; or the class is the folder an image lies in",
    )
    add("--class-index", metavar="JSON", help="which class is which output, as in '{\"cat\": 281}'; or a .json file")
    add("--num-images", type=int, metavar="N", help="how many images at most, evenly spaced (default: all)")
    add(
        "--reducer", action="append", default=[], metavar="REDUCER",
        help="tome, evit:keep_ratio=0.5, '{\"name\": \"tome\", ...}', FILE.json, a folder of these, own (the weights' "
        "own); may be repeated "
        "(default: own, and all that need no training)",
    )  # fmt: skip
    add(
        "--budget", action="append", default=[], metavar="BUDGET",
        help="GMAC (0.8), '120 images/s', or 1.5x: times the speed of all tokens; may be repeated; for reducers that do not "
        "say their amount",
    )  # fmt: skip
    add(
        "--reference",
        metavar="REDUCER",
        help="also differences to this one under the same budget, as given to --reducer",
    )
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="compare.json, compare.md, compare.png; finished rows are kept there",
    )
    add("--batch-sizes", default="1,16,256", metavar="N,...", help="of images/s (default: 1,16,256); none: no speeds")
    add(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="of speeds: in each all reducers have their turn (default: 5)",
    )
    add(
        "--regret", type=int, metavar="N",
        help="also how much worse the patches kept are than those of the highest impact, from N random masks of each image "
        "(16 is good); costs as much as 2 N predictions of it",
    )  # fmt: skip
    add("--dtype", default="float32", metavar="NAME", help="to compute in (default: float32)")
    return parser.parse_args(argv)


def _batch_sizes(text: str) -> list[int]:
    return [] if text == _NO_SPEED else _arguments.batch_sizes("--batch-sizes", text, f", or {_NO_SPEED}")


def _predict(work: Work, rows: dict[str, Asked]) -> tuple[dict[str, Model], dict[str, str]]:
    """The model of each row, and why rows are left out: their budgets are out of reach.

    What is not kept yet is predicted, some rows at a time, and kept when these are done. Raises InputError if no row is left.
    """
    kept, models, left_out = work.kept, {"full": work.weights.full}, {}
    missing = [label for label, asked in rows.items() if not kept.has(label, asked)]
    if missing:
        _ = work.whole  # that no image can be read is told before any model is made
    group: list[str] = []
    for label, asked in rows.items():
        if label != "full":
            logger.info("%s: %s", label, "the model is made" if label in missing else "kept from before")
            try:
                models[label] = work.weights.model(kept.reducer_of(label, asked) or asked.entry.described)
            except InputError as error:
                if not asked.budget:
                    raise
                logger.warning("%s is left out: %s", label, error)
                left_out[label] = str(error)
                continue
        group += [label] if label in missing else []
        if len(group) == AT_ONCE:
            _predict_group(work, group, rows, models)
            group = []
    if len(models) == 1 and left_out:
        raise InputError(next(iter(left_out.values())))
    if group:
        _predict_group(work, group, rows, models)
    return models, left_out


def _predict_group(work: Work, group: list[str], rows: dict[str, Asked], models: dict[str, Model]) -> None:
    found = beside([models[label] for label in group], work.read(", ".join(group)), work.mesh, work.whole)
    for label, (classes, kl) in zip(group, found, strict=True):
        counted, asked = cost(models[label]), rows[label]
        row = {
            "label": label,
            "asked": asked.key,
            "given": asked.given,
            "budget": asked.budget,
            "reducer": built_with(models[label])["reducer"],
            "gmac": counted.gmac,
            "parameters": counted.parameters,
            "tokens": list(counted.tokens),
            "has_learned_part": "reducer" in params_of(models[label]),
        }
        work.kept.add(row, np.asarray(classes), np.asarray(kl))
    work.kept.write()


def _measure(models: dict[str, Model], sizes: list[int], num_rounds: int, kept: Kept) -> None:
    """Speeds at every batch size. Those of fewer rows or rounds are not kept: they were of another time."""
    for size in sizes:
        if not kept.has_speeds(size, [*models], num_rounds):
            kept.add_speeds(size, speeds(models, size, num_rounds), num_rounds)
            kept.write()
