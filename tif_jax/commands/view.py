"""What a model sees in your pictures, and what reducers leave of them: PNG files and one HTML page."""

import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tif_jax.commands import _arguments
from tif_jax.commands._parser import Parser
from tif_jax.commands._picture_files import check_ours, file_names
from tif_jax.commands._reducers import reducers_in
from tif_jax.commands._truth import truths_as_trained
from tif_jax.data.folder import as_id
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.folders import backbone_folder, finetune_folder
from tif_jax.figures.page import page
from tif_jax.figures.seen import OFF_THE_SHELF, Seen, ways_of
from tif_jax.figures.sheet import as_png, sheet
from tif_jax.figures.view import chosen, seen_in
from tif_jax.impact.oracle import check_options
from tif_jax.models import Model
from tif_jax.models.predictions import pictures_of
from tif_jax.reducers.full import Full
from tif_jax.runtime import files, records
from tif_jax.runtime.progress import Progress
from tif_jax.tasks import CLASSIFICATION
from tif_jax.weights.loading import load_with_fields

logger = logging.getLogger(__name__)

PAGE = "index.html"


class Found(NamedTuple):
    """What is compared: the model whose impacts are drawn, with all tokens, and what each reducer makes of it."""

    full: Model
    ways: dict[str, Model]
    about: str
    folder: Path | None = None  # what a stage left, if the model is of one


def main(argv: list[str]) -> None:
    arguments, overrides = _parsed(argv)
    _arguments.log_to_stderr()
    oracle = dict(estimator=arguments.estimator, num_samples=arguments.num_samples)
    check_options(arguments.estimator, None, "teacher", arguments.num_samples, 0.5)
    named = None if arguments.reducers is None else reducers_in(arguments.reducers)
    out = _out_folder(arguments)
    pictures = chosen(pictures_of(arguments.images), arguments.num_images)
    name_of = file_names()
    check_ours([out / PAGE, *(out / f"{name_of(as_id(name))}.png" for name, _ in pictures)], "tif view", "--out")
    found = _models(arguments, overrides, named)
    is_dense = found.full.task != CLASSIFICATION.name
    truth_of = truths_as_trained(found.full, found.folder) if is_dense and found.folder else lambda picture: None
    seen: list[Seen] = []
    names = file_names()
    with Progress("view", len(pictures), "image") as progress:
        for one in seen_in(found.full, found.ways, pictures, arguments.top, truth_of, **oracle):
            seen.append(one)
            files.write(out / f"{names(one.name)}.png", as_png(sheet([one])))
            progress.update(1)
    how = (
        "exact, each patch masked by zeros"
        if arguments.estimator == "exact"
        else f"{arguments.num_samples} random masks"
    )
    about = [found.about, f"Impact: {how}; target: the model's own prediction."]
    if unread := len(pictures) - len(seen):
        about.append(f"{unread} of {len(pictures)} pictures could not be read.")
        logger.warning(about[-1])
    files.write(out / PAGE, page("What the model sees", about, seen).encode("utf-8", "replace"))
    print(out / PAGE)


def _parsed(argv: list[str]) -> tuple[Namespace, list[str]]:
    """The line, and overrides of a config."""
    parser = Parser(prog="tif view", description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--workdir", metavar="DIR", help="what a run left: its reducers are compared; or a folder in it"
    )
    source.add_argument("--weights", metavar="FILE", help="a weight file (.safetensors, .npz, .pth) or a checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="folders are searched with those below them")
    parser.add_argument(
        "--config", metavar="NAME|FILE[:ARG]", help="with a workdir: the reducers of this config that are trained there"
    )
    parser.add_argument(
        "--reducers",
        metavar="NAME[:OPTION=VALUE...],...",
        help="put these on the weights of the model with all tokens, without training, as in tome:num_merged=8,random; "
        f"default without a workdir: the own one, or {','.join(OFF_THE_SHELF)}",
    )
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: WORKDIR/view, or ./view)")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="how many classes (default: 3)")
    parser.add_argument(
        "--num-images", type=int, default=12, metavar="N", help="of more pictures as many are drawn (12)"
    )
    parser.add_argument(
        "--estimator",
        default="sampled",
        metavar="NAME",
        help="of impact: sampled (default), or exact: about five times as long",
    )
    parser.add_argument("--num-samples", type=int, default=16, metavar="N", help="random masks of 'sampled' (16)")
    arguments, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if arguments.config and word.startswith(("--config.", "--noconfig."))]
    if stray := [word for word in rest if word not in overrides]:
        raise InputError(f"unknown flag {stray[0]}; `tif view --help` lists the flags")
    if arguments.config and not arguments.workdir:
        raise InputError("--config says what was trained in a workdir; give --workdir with it")
    if without := next((word for word in overrides if word.startswith("--config.") and "=" not in word), None):
        raise InputError(f"{without} has no value; write {without}=VALUE")
    _arguments.at_least_1("--top", arguments.top)
    _arguments.at_least_1("--num-images", arguments.num_images)
    return arguments, overrides


def _out_folder(arguments: Namespace) -> Path:
    out = Path(arguments.out or Path(arguments.workdir or ".") / "view").expanduser()
    files.check_writable(out)
    return out


def _models(arguments: Namespace, overrides: list[str], named: Sequence[Mapping[str, Any]] | None) -> Found:
    if not arguments.workdir:
        full = _load(arguments.weights)
        return Found(full, ways_of(full, named), _about(arguments.weights, full, named))
    workdir = Path(arguments.workdir).expanduser()
    if arguments.config:
        experiment = config_file.load(os.path.expanduser(arguments.config), overrides)
        entries = experiment.benchmark.reducers
        folders = {e.label: finetune_folder(experiment.under(e), workdir) for e in entries}
        modules = {module for entry in entries for module in entry.modules}
    else:
        folders, modules = _reported(workdir), set[str]()
    trained = {label: folder for label, folder in folders.items() if (folder / "checkpoints").is_dir()}
    if not trained and not (backbone_folder(workdir) / "checkpoints").is_dir():
        full = _load(workdir)
        return Found(full, ways_of(full, named), f"Weights: {workdir}.", workdir)
    of_full = next((trained.pop(label) for label in list(trained) if label.partition("-")[0] == "full"), None)
    of_full = of_full or backbone_folder(workdir)
    full = _load(of_full)
    if named is not None:
        return Found(full, ways_of(full, named), _about(of_full, full, named), of_full)
    if not trained:
        logger.warning("no reducer has been fine-tuned in %s; those that learn nothing are drawn", workdir)
        return Found(full, ways_of(full, None), _about(of_full, full, None), of_full)
    ways = {label: _load(folder, modules) for label, folder in trained.items()}
    fitted = workdir / "filter"
    if (fitted / "checkpoints").is_dir() and not any(label.partition("-")[0] == "tif" for label in ways):
        ways["filter, not fine-tuned"] = _load(fitted)
    return Found(full, ways, f"All tokens: {of_full}. Each reducer is fine-tuned: {workdir}/finetune.", of_full)


def _about(weights: str | Path, full: Model, named: Sequence[Mapping[str, Any]] | None) -> str:
    if named is None and not isinstance(full.reducer, Full):
        return f"Weights: {weights}, with the reducer that they were saved with."
    return f"Weights: {weights}, and what reducers make of them untrained."


def _reported(workdir: Path) -> dict[str, Path]:
    """The folder of the first seed of each reducer in the report, by label."""
    report = records.read(workdir / "report.json", "`tif run` writes it anew") or {}
    found: dict[str, Path] = {}
    for row in sorted(report.get("rows", ()), key=lambda row: row["seed"]):
        found.setdefault(row["label"], workdir / "finetune" / Path(row["directory"]).name)
    return found


def _load(path: str | Path, named: set[str] = frozenset()) -> Model:  # type: ignore[assignment]
    return load_with_fields(path, named=named, fresh_told_at=logging.WARNING)[0]
