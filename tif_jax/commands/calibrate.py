"""How many tokens are to go where in your model, from some hundred of your pictures, without labels or training."""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from tif_jax.calibration.apart import Schedule
from tif_jax.calibration.calibrate import Calibrated, Calibration, Models
from tif_jax.commands import _arguments
from tif_jax.commands._found import check_replaceable, found_from
from tif_jax.commands._pictures import opened, read_all
from tif_jax.commands._reducers import entry_in
from tif_jax.commands._weights import Weights, read_weights
from tif_jax.data import remote
from tif_jax.errors import InputError
from tif_jax.experiment.reducer_entry import ReducerEntry, option_kinds, read_entry
from tif_jax.models import Model
from tif_jax.models.budget import AMOUNTS, Speed, label_of, read_budget
from tif_jax.runtime import files, records

logger = logging.getLogger(__name__)

_DEFAULT = '{"name": "even", "then": {"name": "importance_merge"}}'
_BUDGET = (
    "GMAC (0.8), '120 images/s', or 1.5x: times the speed of all tokens; may be repeated: a further one takes less time"
)
_OUT = "the schedule: a reducer for --reducer, load and configs; of several budgets, a folder: 0.8.json, 1.5x.json"


def main(argv: list[str]) -> None:
    parser = _arguments.Parser(prog="tif calibrate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    _arguments.add_weights_and_images(parser)
    add("--budget", required=True, action="append", help=_BUDGET)
    add("--out", required=True, metavar="FILE.json", help=_OUT)
    add(
        "--reducer",
        default=_DEFAULT,
        help="whose schedule: importance_merge, tome, mctf or a `Stepwise` of yours, with options; as `then` of even or tif, "
        f"how many tokens go in front of the first block is found, too, unless keep_ratio says it (default: {_DEFAULT})",
    )
    add("--num-images", type=int, default=512, metavar="N", help="at most, evenly spaced; all are held in memory (512)")
    arguments = parser.parse_args(argv)
    _arguments.log_to_stderr()
    _arguments.at_least_1("--num-images", arguments.num_images)
    budgets = {label_of(budget): budget for budget in (read_budget(text, "--budget") for text in arguments.budget)}
    entry, paths = _entry(arguments.reducer), _paths(arguments.out, list(budgets))
    weights = read_weights(arguments.weights, "float32", "a calibration")
    pictures = opened(arguments.images, None, weights.full, None, arguments.num_images)
    began = time.monotonic()
    images = read_all(pictures)
    calibration = Calibration(_models(weights, entry), images)
    for budget, path in zip(budgets.values(), paths, strict=True):
        found = calibration.within(budget)
        how = {name: value for name, value in found._asdict().items() if name != "schedule"}
        how |= found_from(weights, pictures, len(images), time.monotonic() - began) | {"budget": str(budget)}
        reducer = _simplest(_scheduled(entry, found.schedule, math.prod(weights.full.grid)))
        files.write(path, records.text({"reducer": reducer, "calibration": how}))
        print("\n".join([*_summary(found, budget, _searches_front(entry)), str(path)]), flush=True)
        began = time.monotonic()


def _entry(text: str) -> ReducerEntry:
    entry = entry_in(text)
    where = f"--reducer is {text}"
    walks = read_entry(entry.options["then"], f"--reducer {text}: then") if entry.options.get("then") else entry
    if "num_merged" not in option_kinds(walks.name):
        raise InputError(f"{where}, which merges no number of tokens in each block (num_merged)")
    if given := sorted({*AMOUNTS} & walks.arguments.keys()):
        raise InputError(f"{where}; {', '.join(given)} is what a calibration finds: leave it out")
    if entry.budget is not None:
        raise InputError(
            f"{where}; leave its budget out: --budget says it, and keep_ratio, if you like, what is kept in front"
        )
    return entry


def _searches_front(entry: ReducerEntry) -> bool:
    """Whether how many tokens go in front of the first block is to be found."""
    has_front = bool(entry.options.get("then")) and "keep_ratio" in option_kinds(entry.name)
    return has_front and "keep_ratio" not in entry.options


def _scheduled(entry: ReducerEntry, schedule: Schedule, num_patches: int) -> dict[str, Any]:
    """The reducer as data, with this schedule: its own, or that of what follows it, with what goes in front."""
    if not (then := entry.options.get("then")):
        return {**entry.described, "num_merged": schedule}
    if not _searches_front(entry):
        return {**entry.described, "then": {**then, "num_merged": schedule}}
    kept, of_blocks = (num_patches - schedule[0]) / num_patches, schedule[1:]
    return {**entry.described, "keep_ratio": kept, "then": {**then, "num_merged": of_blocks}}


def _simplest(reducer: dict[str, Any]) -> dict[str, Any]:
    """Without a front that leaves nothing out."""
    return reducer["then"] if reducer.get("keep_ratio") == 1 and reducer.get("then") else reducer


def _paths(out: str, labels: list[str]) -> list[Path]:
    """The file of each budget."""
    one = len(labels) == 1
    if out.endswith(".json") != one or remote.is_url(out):
        kind = "file on this machine whose name ends in .json" if one else "folder on this machine, for several budgets"
        raise InputError(f"--out is {out!r}; it is a {kind}")
    path = Path(os.path.expanduser(out))
    files.check_writable(path.parent if one else path)
    paths = [path] if one else [path / f"{label}.json" for label in labels]
    for path in paths:
        check_replaceable(path)
    return paths


def _models(weights: Weights, entry: ReducerEntry) -> Models:
    def with_schedule(schedule: Schedule) -> Model:
        return weights.model(_scheduled(entry, schedule, math.prod(weights.full.grid)))

    return Models(weights.full, with_schedule, _searches_front(entry))


def _summary(found: Calibrated, budget: float | Speed, searches_front: bool) -> list[str]:
    gone, of_blocks = found.schedule[:searches_front], found.schedule[searches_front:]
    before = f"left out before the first block: {gone[0]}; " if gone else ""
    lines = [f"{before}merged in each block: {' '.join(map(str, of_blocks))}; {found.gmac:.4f} GMAC"]
    for name, judged in (("pictures searched on", found.searched), ("pictures held out", found.held_out)):
        lines.append(f"{name}: agreement {100 * judged['agreement']:.1f} %, logits move by {judged['distance']:.4f}")
    if found.images_per_second is not None:
        rates = found.images_per_second
        lines.append(f"{rates['reduced']:.1f} images/s, all tokens {rates['full']:.1f} (wished: {budget})")
    return lines
