"""DIR/run.json: what `tif run` is to make in a workdir, by which command and config. `tif status` and reports read it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.folders import (
    adapter_folder,
    backbone_folder,
    division_note,
    filter_folder,
    finetune_folder,
    heldout_folder,
    impact_folder,
)
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.scoring import heldout_targets
from tif_jax.runtime import files, log_file, processes, records
from tif_jax.runtime.machine import machine

NAME = "run.json"


def write(
    experiment: Experiment,
    workdir: Path,
    runs: Sequence[Experiment],
    filters: Sequence[Experiment],
    earlier: Path | None = None,
) -> None:
    """Writes it anew where something but the date has changed.

    runs: one config per fine-tuning; filters: one per token filter. earlier: the workdir that stages are taken over from.
    """
    noted = {
        "command": log_file.command,
        "config": config_file.to_json(experiment),
        "label": experiment.reducer.label,
        "from": earlier and str(earlier.absolute()),
        "versions": records.versions(),
        "machine": machine(),
        "stages": stages(experiment, workdir, runs, filters),
    }
    before = records.read_result(workdir / NAME, {}) or {}
    if records.differences({key: value for key, value in before.items() if key != "date"}, noted):
        records.write(workdir / NAME, {"date": time.strftime(log_file.TIME), **noted})


@contextmanager
def kept(workdir: Path) -> Iterator[None]:
    """Around a run: where that is refused, what an earlier one had written is put back, for that is what the folder holds.

    Where nothing was written and no stage has begun, nothing is left.
    """
    paths = [workdir / NAME, division_note(workdir)]
    before = {path: path.read_bytes() if path.is_file() else b"" for path in paths}
    try:
        yield
    except InputError:
        if processes.is_first():
            for path, content in before.items():
                if content:
                    files.write(path, content)
                elif not backbone_folder(workdir).exists():
                    path.unlink(missing_ok=True)
        raise


def stages(
    experiment: Experiment, workdir: Path, runs: Sequence[Experiment], filters: Sequence[Experiment]
) -> list[dict[str, Any]]:
    """The stages that leave a folder, in order: its name in the workdir, whether it is trained or scored, the seed.

    Of fine-tunings also `reducer` and `label`; of token filters `ranked`: their metrics are a table of rankings.
    """
    seed = {"seed": experiment.seed}
    found: list[tuple[Path, str, dict[str, Any]]] = [(backbone_folder(workdir), "train", seed)]
    if filters or any(of_run.reducer.name == "prior" for of_run in runs):
        found.append((impact_folder(workdir), "score", seed))
    if filters:
        found += [(heldout_folder(workdir, target), "score", seed) for target in heldout_targets(experiment)]
    found += [(filter_folder(of, workdir), "train", {"seed": of.seed, "ranked": True}) for of in filters]
    for of_run in runs:
        entry, seed = of_run.reducer, {"seed": of_run.seed}
        if entry.is_fitted_first:
            found.append((filter_folder(of_run, workdir), "train", seed))
        if entry.has_adapter:
            found.append((adapter_folder(of_run, workdir), "train", seed))
        of_what = {"reducer": entry.name, "label": entry.label}
        found.append((finetune_folder(of_run, workdir), "train", seed | of_what))
    listed: dict[str, dict[str, Any]] = {}  # several reducers of a seed share a filter and an adapter
    for folder, kind, of_what in found:
        name = str(folder.relative_to(workdir))
        listed.setdefault(name, {"folder": name, "kind": kind, **of_what})
    return [*listed.values()]
