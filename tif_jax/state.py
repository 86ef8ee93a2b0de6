"""State is data: parameters as nested dicts of arrays, their place on the devices, and their checkpoints.

A checkpoint directory holds one folder per step with the Orbax items `params`, `opt`, `config` and `data`. Orbax notices
files that are missing or cut short but not a flipped bit, so `config` also carries a digest of the arrays.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from tif_jax.errors import InputError, WorkError
from tif_jax.layers import WEIGHTS
from tif_jax.models import Model

logger = logging.getLogger(__name__)

Params = dict[str, Any]


class State(NamedTuple):
    """Everything a training step changes."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any


def params_of(model: Model) -> Params:
    """The model's parameters, and running statistics if it has any, as a nested dict of arrays with string keys."""
    return nnx.to_pure_dict(nnx.state(model, WEIGHTS))


def with_params(graphdef: Any, params: Params) -> Model:
    """The model of `nnx.split(model)[0]` with these parameters; inside jit this costs nothing at run time."""
    return nnx.merge(graphdef, nnx.State(params))


def statistics_of(model: Model) -> Params:
    """The part of `params_of` that training does not learn but measures; empty for a ViT."""
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def with_statistics(params: Params, statistics: Params) -> Params:
    """The parameters with these statistics in the place of theirs."""
    merged = {**traverse_util.flatten_dict(params), **traverse_util.flatten_dict(statistics)}
    return traverse_util.unflatten_dict(merged)


def make_mesh(batch_size: int) -> Mesh:
    """A mesh with axis 'data' over as many devices as divide the batch evenly."""
    devices = jax.devices()
    used = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return jax.make_mesh((used,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:used])


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies of the arrays on every device; never an alias, so that the result may be donated."""
    return jax.device_put(jax.tree.map(np.asarray, tree), NamedSharding(mesh, PartitionSpec()))


def shard(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Array]:
    """The batch's arrays, spread over the devices by their first axis; those of strings are left out."""
    arrays = {name: array for name, array in batch.items() if array.dtype != object}
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))


class Checkpoints:
    """The checkpoints of one run, newest last. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, directory: str | Path, max_to_keep: int | None = 2):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.directory, options=options)
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
        # From the host: of arrays with a copy on each device, Orbax would cut every device's share with a program of its own.
        step, params, opt_state = jax.device_get(state)
        digests = {"params": _digest(params), "opt": _digest(opt_state)}
        items = {
            "params": ocp.args.StandardSave(params),
            "config": ocp.args.JsonSave({**config, "digest": digests}),
            "data": ocp.args.JsonSave(dict(data)),
        }
        if jax.tree.leaves(opt_state):  # an imported backbone has none, and Orbax refuses empty items
            items["opt"] = ocp.args.StandardSave(opt_state)
        with self._named():
            self.manager.save(int(step), args=ocp.args.Composite(**items))

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
            try:
                return self._restore(step, template)
            except Exception as error:  # Orbax raises many kinds for a damaged folder
                logger.warning("checkpoint %s/%d is damaged (%s)", self.directory, step, _first_line(error))
                self._move_aside(step)
        if steps:
            raise InputError(
                f"no checkpoint in {self.directory} is whole (tried steps {steps}, now {self.directory.parent}/damaged-*): "
                "put back a copy, or run again to start anew"
            )
        return None

    def _restore(self, step: int, template: State) -> tuple[State, dict[str, Any]]:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt=ocp.args.StandardRestore(abstract.opt_state),
            config=ocp.args.JsonRestore(),
            data=ocp.args.JsonRestore(),
        )
        restored = self.manager.restore(step, args=items)
        _verify(restored.config, params=restored.params, opt=restored.opt)
        step_array = jax.device_put(np.int32(step), template.step.sharding)
        return State(step_array, restored.params, restored.opt), restored.data

    def _move_aside(self, step: int) -> None:
        aside = self.directory.parent / f"damaged-{step}"
        if not aside.exists():
            (self.directory / str(step)).rename(aside)
        self.manager.reload()


def load_params(directory: str | Path) -> tuple[Params, dict[str, Any]]:
    """Parameters and config of the newest whole checkpoint in a checkpoint directory, or of one step's folder.

    Raises InputError naming the directory when there is none.
    """
    directory = Path(directory).absolute()
    steps = [directory] if (directory / "params").is_dir() else _step_folders(directory)
    for folder in steps:
        try:
            checkpointer = ocp.StandardCheckpointer()
            shapes = checkpointer.metadata(folder / "params").item_metadata.tree
            params = checkpointer.restore(folder / "params", jax.tree.map(_on_one_device, shapes))
            config = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "config")
            _verify(config, params=params)
            return params, config
        except Exception as error:
            logger.warning("checkpoint %s is damaged (%s)", folder, _first_line(error))
    raise InputError(f"no checkpoint that is whole in {directory}" if steps else f"no checkpoint in {directory}")


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
