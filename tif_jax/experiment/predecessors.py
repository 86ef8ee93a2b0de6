"""What a stage is made from: which checkpoint, and whether its own stage is finished."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from tif_jax.errors import InputError
from tif_jax.experiment.folders import (
    adapter_folder,
    backbone_folder,
    filter_folder,
    finetune_folder,
    heldout_folder,
    impact_folder,
)
from tif_jax.experiment.reducer_entry import ReducerEntry
from tif_jax.experiment.schema import Experiment
from tif_jax.impact.manifest import read_manifest
from tif_jax.impact.oracle import TARGETS
from tif_jax.models.budget import SOLVED
from tif_jax.runtime import records
from tif_jax.training.checkpoints import identity, newest, newest_first, read_config
from tif_jax.weights.where import checkpoint_directory, located

_RECIPE = ("estimator", "mask", "target", "num_images", "views")  # of impacts; who computed them does not matter


def standing(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a stage, and which it is: {"step", "of", "digest"}, as the results made from it say.

    Raises InputError if there is none, or if it is damaged.
    """
    return _newest_of(folder / "checkpoints")


def finished(folder: Path) -> tuple[Path, dict[str, Any]]:
    """`standing` of a stage that other stages begin with. Raises InputError if it has steps to go."""
    checkpoint, which = standing(folder)
    _check(folder, which)
    return checkpoint, which


def check_finished(weights: str) -> None:
    """Raises InputError if weights to begin with are those of a run that is still being trained: they would change.

    A file, or one step's folder of a run, stays what it is.
    """
    path = located(weights)
    if path.is_dir() and not (path / "params").is_dir():
        _check(path, _newest_of(checkpoint_directory(path))[1])


def _newest_of(directory: Path) -> tuple[Path, dict[str, Any]]:
    checkpoint = newest(directory)
    return checkpoint, identity(read_config(checkpoint))


def _check(folder: Path, which: dict[str, Any]) -> None:
    if which["step"] < which["of"]:
        raise InputError(
            f"{folder} stands at step {which['step']} of {which['of']}: finish that stage first, with its `tif train` or "
            "with `tif run`"
        )


def start_folder(experiment: Experiment, workdir: Path) -> Path:
    """Of the stage that fine-tuning begins with."""
    entry = experiment.reducer
    if not entry.is_fitted_first:
        return backbone_folder(workdir)
    return (adapter_folder if entry.has_adapter else filter_folder)(experiment, workdir)


def made_from(experiment: Experiment, workdir: Path, stage: str) -> dict[str, Any]:
    """What a stage would now be made from: digests of checkpoints, how impacts were measured, and by what they are labels.

    The folder of a stage is claimed for it. Raises InputError if a stage before it is not finished.
    """
    folders, reads_impact = {"backbone": backbone_folder(workdir)}, False
    if stage == "backbone":
        return {}
    if stage == "filter":
        reads_impact = experiment.reducer.name == "tif"
    if stage == "adapter":
        folders["filter"] = filter_folder(experiment, workdir)
    if stage == "finetune":
        folders["start"] = start_folder(experiment, workdir)
        reads_impact = experiment.reducer.name == "prior"
    found: dict[str, Any] = {name: finished(folder)[1]["digest"] for name, folder in folders.items()}
    if reads_impact:
        found["impact"] = recipe_of(impact_folder(workdir))
    if (
        reads_impact and stage == "finetune"
    ):  # the prior is read off the labels; the recipe of a filter says them itself
        noted = records.read(finetune_folder(experiment, workdir) / "config.json")
        if noted is None or "labels" in noted.get("made_from", {}):  # folders from before do not say them
            labels = experiment.filter
            decides = "keep_ratio" if labels.labels == "top" else "rho"
            found["labels"] = {"labels": labels.labels, decides: getattr(labels, decides)}
    return found


def as_begun(entry: ReducerEntry, folder: Path) -> ReducerEntry:
    """The reducer of a stage, its budget replaced by the amount that the stage's newest readable checkpoint was trained with.

    A speed is measured anew on another machine, and another version may count GMAC otherwise: both would go on with another
    number of tokens.
    """
    for checkpoint in newest_first(folder / "checkpoints") if entry.budget is not None else ():
        with suppress(InputError):  # a damaged one is told where checkpoints are restored
            trained = read_config(checkpoint)["reducer"]
            return entry.replaced(**{name: trained[name] for name in SOLVED if trained.get(name) is not None})
    return entry


def recipe_of(folder: Path) -> dict[str, Any]:
    """How the impacts in a folder were measured."""
    manifest = read_manifest(folder)
    return {key: manifest[key] for key in _RECIPE}


def oracles_of(workdir: Path) -> dict[str, Any]:
    """How the impacts of test images were measured, by the oracle's target: what the ranking table was made from."""
    folders = {target: heldout_folder(workdir, target) for target in TARGETS}
    return {target: recipe_of(folder) for target, folder in folders.items() if folder.exists()}
