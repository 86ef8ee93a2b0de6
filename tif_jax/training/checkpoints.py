"""Checkpoints of a training state.

A checkpoint directory holds one folder per step with the Orbax items `params`, `opt`, `ema` (where there is one), `config`
and `data`. Orbax notices files that are missing or cut short but not a flipped bit, so `config` also carries the digest of
every item of arrays.
"""

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
from tif_jax.runtime.digests import digest
from tif_jax.runtime.mesh import place
from tif_jax.training.state import State

logger = logging.getLogger(__name__)


class _Damaged(Exception):
    """A checkpoint can not be read, or not as it was written; the message says why, in one line."""


class Checkpoints:
    """The checkpoints of one run, newest last. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, directory: str | Path, max_to_keep: int | None = 2):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.directory, options=options)
            # We ask ourselves (`processes.stop_asked`); asked by two, JAX loses count and with it the signal.
            self.manager.reached_preemption = lambda step: False  # type: ignore[method-assign]
        except OSError as error:
            raise InputError(
                f"can not write checkpoints to {self.directory}: {error.strerror}; choose another workdir"
            ) from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_exc) -> None:
        with self._writing():
            self.manager.close()

    def save(self, state: State, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Writes a checkpoint of state.step in the background.

        config: what the checkpoint says of itself. data: the input iterator's state. Raises WorkError if the disk is full;
        what goes wrong in the background is raised by the next call, `wait` or the end of the context.
        """
        arrays = _items(state)
        on_host = jax.tree.map(_on_host, arrays)
        # From the host: of arrays with a copy on each device, Orbax would cut every device's share with a program of its
        # own. Arrays divided over several processes are written by all of these.
        written = jax.tree.map(lambda leaf, copy: leaf if _is_divided(leaf) else copy, arrays, on_host)
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in written.items()}
        digests = {name: digest(tree) for name, tree in on_host.items()}
        items["config"] = ocp.args.JsonSave({**config, "digest": digests})
        items["data"] = ocp.args.JsonSave(dict(data))
        with self._writing():
            self.manager.save(int(jax.device_get(state.step)), args=ocp.args.Composite(**items))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not."""
        return sorted(self.manager.all_steps())

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        with self._writing():
            self.manager.wait_until_finished()

    def restore(self, template: State) -> tuple[State, dict[str, Any]] | None:
        """The newest undamaged checkpoint, on template's devices, and its `data`; None if there is no checkpoint.

        A damaged checkpoint is named in a warning and moved aside, and the one before it is tried. Raises InputError if
        all are damaged. Of several processes all have to call this.
        """
        steps = self.steps()[::-1]
        for step in steps:
            try:
                return self._restore_step(step, template)
            except _Damaged as damage:
                logger.warning("checkpoint %s/%d is damaged (%s)", self.directory, step, damage)
                self._move_aside(step)
        if steps:
            raise InputError(
                f"no checkpoint in {self.directory} is whole (tried steps {steps}, now {self.directory.parent}/damaged-*): "
                "put back a copy, or run again to start anew"
            )
        return None

    def _restore_step(self, step: int, template: State) -> tuple[State, dict[str, Any]]:
        folder, damage = self.directory / str(step), None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        try:
            arrays = {name: _read_arrays(folder / name, tree) for name, tree in _items(abstract).items()}
            config, data = _read_json(folder / "config"), _read_json(folder / "data")
        except Exception as error:  # Orbax raises many kinds for a damaged folder
            damage = _first_line(error)
        # Each process has read by itself and may have found something else. Now they have to agree, since from here on
        # they work together.
        if not processes.all_say(damage is None):
            raise _Damaged(damage or "as another process found")
        _verify(jax.tree.map(_on_host, arrays), config)
        step_array = place(np.int32(step), template.step.sharding)
        return State(step_array, arrays["params"], arrays.get("opt", template.opt_state), arrays.get("ema")), data

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

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors of writing become one that names the directory."""
        try:
            yield
        except (OSError, ValueError) as error:  # on a full disk tensorstore raises a ValueError
            raise WorkError(
                f"checkpoint not written to {self.directory}: {error}; make room and run the same command again"
            ) from None


def load_params(directory: str | Path) -> tuple[Params, dict[str, Any]]:
    """Parameters and config of the newest undamaged checkpoint in a checkpoint directory, or of one step's folder.

    Where the run kept a moving average of the parameters, the average is what is loaded. This process reads by itself.
    Raises InputError naming the directory if there is no undamaged checkpoint.
    """
    directory = Path(directory).absolute()
    folders = [directory] if (directory / "params").is_dir() else _step_folders(directory)
    for folder in folders:
        try:
            return _load_step(folder)
        except Exception as error:  # `_Damaged`, or what Orbax raises for a damaged folder
            logger.warning("checkpoint %s is damaged (%s)", folder, _first_line(error))
    raise InputError(f"no checkpoint that is whole in {directory}" if folders else f"no checkpoint in {directory}")


def _load_step(folder: Path) -> tuple[Params, dict[str, Any]]:
    item = "ema" if (folder / "ema").is_dir() else "params"
    # Onto one device, whatever devices the arrays were written from.
    device = SingleDeviceSharding(jax.local_devices()[0])
    stored = _array_reader().metadata(folder / item).item_metadata.tree
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
    params, config = _read_arrays(folder / item, abstract), _read_json(folder / "config")
    _verify({item: params}, config)
    return params, config


def _items(state: State) -> dict[str, Any]:
    """A state's arrays by the name of their Orbax item, which refuses to be empty: an imported backbone has no `opt`."""
    items = {"params": state.params, "opt": state.opt_state, "ema": state.ema}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _is_divided(leaf: Any) -> bool:
    """Whether no process has the whole array."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _on_host(leaf: Any) -> np.ndarray:
    """The whole array on this host; of a divided one, all processes have to ask for it."""
    return multihost_utils.process_allgather(leaf, tiled=True) if _is_divided(leaf) else jax.device_get(leaf)


def _verify(items: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises _Damaged unless the items, whole on this host, have the digests that were written with them."""
    if damaged := [name for name, tree in items.items() if digest(tree) != config["digest"][name]]:
        raise _Damaged(f"the arrays of {' and '.join(damaged)} do not have the digest that was written with them")


def _array_reader() -> ocp.StandardCheckpointer:
    return ocp.StandardCheckpointer(multiprocessing_options=_by_this_process_only())


def _read_arrays(folder: Path, abstract: Any) -> Any:
    return _array_reader().restore(folder, abstract)


def _read_json(folder: Path) -> dict[str, Any]:
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=_by_this_process_only())
    return ocp.Checkpointer(handler, multiprocessing_options=_by_this_process_only()).restore(folder)


def _by_this_process_only() -> ocp.options.MultiprocessingOptions:
    """Options to read with, whatever the other processes of the run are doing."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, {own}, barrier_sync_key_prefix=f"process_{own}")


def _step_folders(directory: Path) -> list[Path]:
    """The newest first."""
    numbered = [p for p in directory.iterdir() if p.is_dir() and p.name.isdigit()] if directory.is_dir() else []
    return sorted(numbered, key=lambda p: int(p.name), reverse=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
