"""State is data: parameters as nested dicts of arrays, their place on the devices, and their checkpoints.

A checkpoint directory holds one folder per step with the Orbax items `params`, `opt`, `ema` (where there is one), `config`
and `data`. Orbax notices files that are missing or cut short but not a flipped bit, so `config` also carries a digest of
the arrays.
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
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from tif_jax import optim, processes
from tif_jax.errors import InputError, WorkError
from tif_jax.layers import WEIGHTS
from tif_jax.models import Model

logger = logging.getLogger(__name__)

Params = dict[str, Any]

_AXES = ("data", "fsdp")
FSDP: optim.Table = ((r"kernel$|embedding$", -1),)  # which axis of which parameters is divided over 'fsdp'


class State(NamedTuple):
    """Everything a training step changes."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None = None  # exponential moving average of params, where the recipe keeps one


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


def make_mesh(batch_size: int, fsdp: int = 1, processes: int | None = None) -> Mesh:
    """A mesh with axes 'data' and 'fsdp' over as many devices of every process as divide the batch evenly.

    The batch is divided over all of them, parameters and what belongs to them over fsdp (see `shardings`).
    processes: 1 stands for this process and its devices alone; default: all there are.
    Devices follow each other by process: so do the rows of a batch, and neighbours along fsdp share a host.
    Raises InputError if nothing fits.
    """
    own = processes == 1 or jax.process_count() == 1
    owners = [jax.process_index()] if own else list(range(jax.process_count()))
    local = jax.local_device_count()
    if fsdp < 1:
        raise InputError(f"sharding.fsdp is {fsdp}; it is a number of devices, at least 1")
    fitting = [n for n in range(1, local + 1) if batch_size % (n * len(owners)) == n * len(owners) % fsdp == 0]
    if not fitting:
        raise InputError(
            f"a batch of {batch_size} can not be divided over {len(owners)} processes with up to {local} devices each and "
            f"sharding.fsdp {fsdp}: the devices used have to divide the batch_size, and sharding.fsdp the devices"
        )
    by_owner = {owner: [d for d in jax.devices() if d.process_index == owner] for owner in owners}
    if max(fitting) < local and jax.default_backend() != "cpu":
        logger.warning(
            "a batch of %d is divided over %d of %d devices of each process", batch_size, max(fitting), local
        )
    used = [device for owner in owners for device in by_owner[owner][: max(fitting)]]
    return Mesh(np.array(used).reshape(-1, fsdp), _AXES, axis_types=(AxisType.Auto,) * 2)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies of the arrays on every device; never an alias, so that the result may be donated."""
    return place(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def place(tree: Any, where: Any) -> Any:
    """Copies of the arrays on the devices, as a tree of shardings says; never an alias, so that they may be donated."""

    def put(array, sharding):
        array = np.asarray(array)
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return jax.tree.map(put, tree, where)


def shardings(state: State, mesh: Mesh, table: optim.Table = FSDP) -> Any:
    """Where the arrays of a State (or their shapes) lie: parameters as the table says, and alike what the optimiser and
    the moving average hold for each; everything else on every device.

    table: (pattern, axis), see `optim.match`: the axis of such parameters that is divided over the mesh's 'fsdp'. Where it
    can not be divided evenly, and where no pattern matches, each device has the whole.
    """
    size = mesh.shape["fsdp"]

    def divided(leaf, axis):
        even = axis is not None and -leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] % size == 0
        spec = PartitionSpec(*("fsdp" if i == axis % leaf.ndim else None for i in range(leaf.ndim)) if even else ())
        return NamedSharding(mesh, spec if size > 1 else PartitionSpec())

    axes = optim.match(table if size > 1 else (), state.params, None)
    # None is a leaf here, not the absence of one.
    params = jax.tree.map(lambda axis, leaf: divided(leaf, axis), axes, state.params, is_leaf=lambda x: x is None)
    of_parameter = {_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params)}

    def alike(path, _leaf):
        return of_parameter.get(_names(path), NamedSharding(mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(alike, state)


def _names(path) -> tuple[str, ...]:
    """The dictionary keys of a path: of a parameter, and of what an optimiser holds for it."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def shard(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Array]:
    """The batch's arrays, spread over the devices by their first axis; those of strings are left out.

    Of several processes each gives its own rows, in their order (`loader.Batches`); a mesh of one process takes all.
    """
    arrays = {name: array for name, array in batch.items() if array.dtype != object}
    by_row = NamedSharding(mesh, PartitionSpec(_AXES))
    if mesh.is_multi_process:
        with jax.transfer_guard_host_to_device("allow"):  # it does not call them explicit, as device_put does
            return {name: jax.make_array_from_process_local_data(by_row, array) for name, array in arrays.items()}
    return jax.device_put(arrays, by_row)


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
