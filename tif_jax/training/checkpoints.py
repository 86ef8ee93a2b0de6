"""Checkpoints of a training state.

A checkpoint directory holds one folder per step with the Orbax items `params`, `opt`, `ema` (where there is one), `config`
and `data`. Orbax notices files that are missing or cut short but not a flipped bit, so `config` also carries a digest of
the arrays.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from tif_jax.errors import InputError, WorkError
from tif_jax.models.params import Params
from tif_jax.runtime import processes
from tif_jax.runtime.mesh import place
from tif_jax.training.state import State

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, newest last. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, directory: str | Path, max_to_keep: int | None = 2):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.directory, options=options)
            # We ask ourselves (`processes.preemption`); asked by two, JAX loses count and with it the signal.
            self.manager.reached_preemption = lambda step: False  # type: ignore[method-assign]
        except OSError as error:
            raise InputError(
                f"can not write checkpoints to {self.directory}: {error.strerror}; choose another workdir"
            ) from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_exc) -> None:
        with self._named():
            self.manager.close()

    def save(self, state: State, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Writes a checkpoint of that step in the background. data: the input iterator's state."""
        step, params, opt_state, ema = state
        arrays = {"params": params, "opt": opt_state, "ema": ema}
        # An imported backbone has no optimiser state, and Orbax refuses empty items.
        arrays = {name: tree for name, tree in arrays.items() if jax.tree.leaves(tree)}
        whole = {name: jax.tree.map(_whole, tree) for name, tree in arrays.items()}
        digests = {name: _digest(tree) for name, tree in whole.items()}
        # From the host: of arrays with a copy on each device, Orbax would cut every device's share with a program of its
        # own. Arrays divided over several processes are written by all of these.
        items = {name: jax.tree.map(_to_write, tree, whole[name]) for name, tree in arrays.items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        items["config"] = ocp.args.JsonSave({**config, "digest": digests})
        items["data"] = ocp.args.JsonSave(dict(data))
        with self._named():
            self.manager.save(int(jax.device_get(step)), args=ocp.args.Composite(**items))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or not."""
        return sorted(self.manager.all_steps())

    def wait(self) -> None:
        """Until everything saved is on disk."""
        with self._named():
            self.manager.wait_until_finished()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # on a full disk tensorstore raises a ValueError
            raise WorkError(
                f"checkpoint not written to {self.directory}: {error}; make room and run the same command again"
            ) from None

    def restore(self, template: State) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that is whole and its `data`, on template's devices; None if there is none at all.

        A damaged one is named in a warning and moved aside, and the one before it is tried. Raises InputError if there
        are checkpoints but none is whole.
        """
        steps = self.steps()[::-1]
        for step in steps:
            found, problem = None, "as another process found"
            try:
                found = self._read(step, template)
            except Exception as error:  # Orbax raises many kinds for a damaged folder
                problem = _first_line(error)
            # Agreed on before anything that all processes have to do together.
            if processes.all_say(found is not None):
                assert found is not None
                try:
                    return self._verified(found, template, step)
                except ValueError as error:
                    problem = _first_line(error)
            logger.warning("checkpoint %s/%d is damaged (%s)", self.directory, step, problem)
            self._move_aside(step)
        if steps:
            raise InputError(
                f"no checkpoint in {self.directory} is whole (tried steps {steps}, now {self.directory.parent}/damaged-*): "
                "put back a copy, or run again to start anew"
            )
        return None

    def _read(self, step: int, template: State) -> dict[str, Any]:
        """The items of a checkpoint, read by this process without the others: what it finds damaged, they may not."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        arrays = {"params": abstract.params, "opt": abstract.opt_state, "ema": abstract.ema}
        folder = self.directory / str(step)
        found = {name: _read_arrays(folder / name, tree) for name, tree in arrays.items() if jax.tree.leaves(tree)}
        return {**found, "config": _read_json(folder / "config"), "data": _read_json(folder / "data")}

    def _verified(self, found: dict[str, Any], template: State, step: int) -> tuple[State, dict[str, Any]]:
        config, data = found.pop("config"), found.pop("data")
        _verify(config, **{name: jax.tree.map(_whole, tree) for name, tree in found.items()})
        step_array = place(np.int32(step), template.step.sharding)
        opt_state = found.get("opt", template.opt_state)
        return State(step_array, found["params"], opt_state, found.get("ema")), data

    def _move_aside(self, step: int) -> None:
        processes.wait_for_all("checkpoint read")
        if processes.is_first():
            aside, number = self.directory.parent / f"damaged-{step}", 1
            while aside.exists():
                number += 1
                aside = aside.with_name(f"damaged-{step}-{number}")
            (self.directory / str(step)).rename(aside)
        processes.wait_for_all("checkpoint moved")
        self.manager.reload()


def _whole(leaf: Any) -> np.ndarray:
    """The array on this host, fetched from others where it is divided among them."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(leaf)


def _to_write(leaf: Any, whole: np.ndarray) -> Any:
    divided = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    return leaf if divided else whole


def load_params(directory: str | Path) -> tuple[Params, dict[str, Any]]:
    """Parameters and config of the newest whole checkpoint in a checkpoint directory, or of one step's folder.

    Where the run kept a moving average of the parameters, that is what it was for: it stands in their place.
    Raises InputError naming the directory when there is none.
    """
    directory = Path(directory).absolute()
    steps = [directory] if (directory / "params").is_dir() else _step_folders(directory)
    for folder in steps:
        try:
            item = "ema" if (folder / "ema").is_dir() else "params"
            shapes = _reader().metadata(folder / item).item_metadata.tree
            params = _read_arrays(folder / item, jax.tree.map(_on_one_device, shapes))
            config = _read_json(folder / "config")
            _verify(config, **{item: params})
            return params, config
        except Exception as error:
            logger.warning("checkpoint %s is damaged (%s)", folder, _first_line(error))
    raise InputError(f"no checkpoint that is whole in {directory}" if steps else f"no checkpoint in {directory}")


def _reader() -> ocp.StandardCheckpointer:
    return ocp.StandardCheckpointer(multiprocessing_options=_alone())


def _read_arrays(folder: Path, abstract: Any) -> Any:
    return _reader().restore(folder, abstract)


def _read_json(folder: Path) -> dict[str, Any]:
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=_alone())
    return ocp.Checkpointer(handler, multiprocessing_options=_alone()).restore(folder)


def _alone() -> ocp.options.MultiprocessingOptions:
    """For a process that reads by itself, whatever the other processes of its run do."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, {own}, barrier_sync_key_prefix=f"process_{own}")


def _on_one_device(leaf: Any) -> jax.ShapeDtypeStruct:
    """Where a parameter goes, whatever devices it was written from."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))


def _step_folders(directory: Path) -> list[Path]:
    numbered = [p for p in directory.iterdir() if p.is_dir() and p.name.isdigit()] if directory.is_dir() else []
    return sorted(numbered, key=lambda p: int(p.name), reverse=True)


def _verify(config: Mapping[str, Any], **arrays: Any) -> None:
    if any(_digest(tree) != config["digest"][item] for item, tree in arrays.items()):
        raise ValueError("the arrays do not have the digest that was written with them")


def _digest(tree: Any) -> str:
    """sha256 over paths, types, shapes and bytes of the leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
