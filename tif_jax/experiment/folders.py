"""Where in a workdir the stages of an experiment leave what they make."""

from pathlib import Path

from tif_jax.experiment.schema import Experiment


def division_note(workdir: Path) -> Path:
    """Says which images are for what, where training and test images are divided here."""
    return workdir / "split.json"


def backbone_folder(workdir: Path) -> Path:
    return workdir / "backbone"


def impact_folder(workdir: Path) -> Path:
    return workdir / "impact"


def heldout_folder(workdir: Path, target: str) -> Path:
    """Impacts of test images by the oracle of this target."""
    return workdir / f"heldout-{target}"


def filter_folder(experiment: Experiment, workdir: Path) -> Path:
    """DIR/filter for tif; for other reducers their name and options follow, and for further seeds the seed."""
    return workdir / _of_seed(experiment.reducer.fitted_name, experiment)


def adapter_folder(experiment: Experiment, workdir: Path) -> Path:
    return workdir / _of_seed("adapter", experiment)


def finetune_folder(experiment: Experiment, workdir: Path) -> Path:
    """DIR/finetune/LABEL-SEED."""
    return workdir / "finetune" / f"{experiment.reducer.label}-{experiment.seed}"


def _of_seed(name: str, experiment: Experiment) -> str:
    return f"{name}-{experiment.seed}" if experiment.seed else name
