"""Where weights are: a weight file, a folder of ours, or a name on the Hugging Face hub."""

from pathlib import Path

from tif_jax.errors import InputError
from tif_jax.models import model_fields
from tif_jax.runtime import records
from tif_jax.weights import folders, hub, pretrained


def located(source: str | Path) -> Path:
    """Where the weights are: a weight file, or a folder of ours. A folder that is none of ours stands for the file in it.

    What the hub has (hf:OWNER/NAME) is downloaded.
    """
    path = hub.folder_of(str(source)) if hub.is_name(source) else Path(source).expanduser()
    ours = ("params", "checkpoints", "report.json")
    if path.is_dir() and not any((path / name).exists() for name in ours) and not _with_steps(path):
        return folders.weight_file(path) or path
    return path


def checkpoint_directory(path: Path) -> Path:
    """Where in `path` the checkpoints are: a checkpoint's own folder, a folder of checkpoints, a stage, or a workdir."""
    if (path / "params").is_dir():
        return path
    if (found := _with_steps(path)) or (found := _best(path)):
        return found
    if not path.exists():
        raise InputError(
            f"no checkpoint in {path}, which is not there; weights on the Hugging Face hub are hf:OWNER/NAME"
        )
    raise InputError(
        f"no checkpoint in {path}: neither checkpoints/ nor a report.json that names the best run; "
        "run the stage that makes it first"
    )


def is_checkpoint(path: Path) -> bool:
    """Whether this is, or would be if it existed, a folder of ours and no weight file."""
    if path.is_dir():
        return True
    if path.exists() or pretrained.is_weight_file(path):
        return False
    try:
        model_fields(str(path))
    except InputError:
        return True
    raise InputError(
        f"{path} is the name of a model, and no such file is here; tif_jax.load takes the path of weights, "
        f"tif_jax.create_model({str(path)!r}) makes random ones"
    )


def _with_steps(path: Path) -> Path | None:
    """Where checkpoints are, in `path` or its `checkpoints`."""
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir()):
            return folder
    return None


def _best(workdir: Path) -> Path | None:
    """The checkpoints of the run that report.json calls best. Raises InputError if that lies outside of the workdir."""
    report = records.read(workdir / "report.json", "`tif run` writes it anew")
    best = report.get("best") if isinstance(report, dict) else None
    if not best:
        return None
    if not isinstance(best, str) or Path(best).is_absolute() or ".." in Path(best).parts:
        raise InputError(f"{workdir}/report.json: best is {best!r}, no folder of this workdir; run `tif run` again")
    return _with_steps(workdir / best)
