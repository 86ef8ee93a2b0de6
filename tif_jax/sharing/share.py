"""Where to: a new folder, or a repository on the Hugging Face hub."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tif_jax.errors import InputError
from tif_jax.models import Model
from tif_jax.runtime import files
from tif_jax.sharing import impact_set, model_folder
from tif_jax.sharing.facts import Facts, of_workdir
from tif_jax.training.checkpoints import newest
from tif_jax.weights import hub
from tif_jax.weights.loading import load
from tif_jax.weights.where import checkpoint_directory

Contents = Mapping[str, bytes | Path]  # by name: what is in the file, or the file to copy
_IMPACTS = "impacts are those of a workdir; give its path"
_HOME = "hf:OWNER/NAME"  # stands in a card for a name that is not known yet
# What not every such folder has. Left over from an earlier commit, it would be read as part of a later one.
_OURS = re.compile(r"data/part-[^/]+\.parquet|reducer\.safetensors|parameters\.json")


def save_pretrained(model: Any, folder: str | os.PathLike[str], *, license: str = "", base_model: str = "") -> Path:
    """Writes a model, or the one that a workdir stands for, as a folder that `tif_jax.load` reads back bit for bit.

    The reducer goes with it: its options and what it has learned. timm reads the backbone where it has such a model. Of a
    workdir the model card (README.md) tells the images and what was measured. license: a name as hubs know it, 'apache-2.0';
    base_model: hf:OWNER/NAME of the weights that these were made from, where they do not say it. There must be no such folder
    yet. Raises InputError for a model that timm's layout can not hold.
    """
    files.check_new(folder)
    return _write(_model(model, license, base_model, _HOME), folder)


def save_impact(source: Any, folder: str | os.PathLike[str], *, license: str = "") -> Path:
    """Writes the impacts of a workdir (or of an impact folder) as a data set: data/*.parquet, manifest.json and a card.

    The card (README.md) says the columns with their units and signs, how it was measured, of which network and images; the
    images are not included. There must be no such folder yet. Raises InputError for impacts that are not complete.
    """
    files.check_new(folder)
    return _write(impact_set.contents_of(_workdir(source, _IMPACTS), license, _HOME), folder)


def push_to_hub(
    source: Any,
    name: str,
    *,
    impact: bool = False,
    private: bool = False,
    license: str = "",
    base_model: str = "",
) -> str:
    """What `save_pretrained` writes (impact: what `save_impact` writes), as a commit on the Hugging Face hub; its address.

    name: OWNER/NAME; the repository is made if need be, private as said. Needs `hf auth login` or HF_TOKEN, and the extra
    `hub`. Raises InputError where that may not be written, WorkError where the network fails.
    """
    name = f"hf:{name.removeprefix('hf:')}"
    repository, revision = hub.repository_of(name)
    if revision or "/" not in repository:
        raise InputError(f"{name!r} is no place to push to; it is OWNER/NAME, without a revision")
    library, kind = hub.library(), "dataset" if impact else "model"
    if library.constants.HF_HUB_OFFLINE:
        raise InputError(f"{name} can not be written: HF_HUB_OFFLINE is set; unset it")
    if not impact:
        contents = _model(source, license, base_model, name)
    else:
        contents = impact_set.contents_of(_workdir(source, _IMPACTS), license, name)
    add = [
        library.CommitOperationAdd(path, data if isinstance(data, bytes) else str(data))
        for path, data in contents.items()
    ]
    with hub.failures(name, hub.page_of(repository, "datasets" if impact else ""), writing=True):
        api = library.HfApi()
        api.create_repo(repository, private=private, repo_type=kind, exist_ok=True)
        if private and not api.repo_info(repository, repo_type=kind).private:
            raise InputError(f"{name} is there already and public; make it private on the hub, or leave private out")
        there = api.list_repo_files(repository, repo_type=kind)
        stale = [path for path in there if _OURS.fullmatch(path) and path not in contents]
        changes = [*add, *map(library.CommitOperationDelete, stale)]
        said = api.create_commit(repository, changes, commit_message="Written by tif_jax", repo_type=kind)
    return said.commit_url


def _workdir(source: Any, wanted: str) -> Path:
    """The path. Raises InputError for what is none; wanted: the remedy."""
    if not isinstance(source, str | os.PathLike) or hub.is_name(source):
        said = repr(source) if isinstance(source, str) else f"a {type(source).__name__}"
        raise InputError(f"{said} is no workdir: {wanted}")
    return Path(source).expanduser()


def _model(model: Any, license: str, base_model: str, name: str) -> Contents:
    if isinstance(model, Model):
        facts = Facts(base_model=model.origin)
    else:
        source = _workdir(model, "give the path of one, or a model that tif_jax.load returns")
        checkpoint = newest(
            checkpoint_directory(source)
        )  # one for both: a run that trains may write the next meanwhile
        facts, model = of_workdir(source, checkpoint), load(checkpoint)
    return model_folder.contents_of(model, facts.with_(license, base_model), name)


def _write(contents: Contents, folder: str | os.PathLike[str]) -> Path:
    folder = Path(folder).expanduser()
    with files.appearing(folder) as partial:
        for name, data in contents.items():
            files.write(partial / name, data if isinstance(data, bytes) else files.read(data))
    return folder
