"""Checkpoints of a training state.

A checkpoint directory holds one folder per step with the Orbax items `params`, `opt`, `ema` (where there is one) and
`config`. Orbax notices files that are missing or cut short but not a flipped bit, so `config` is sealed (`records`) and
carries the digest of every item of arrays, beside the step and what else belongs to it. A checkpoint is **whole** if its
config is that of its folder and each item can be read and has its digest (`_read`): whoever reads one asks there.
"""

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from tif_jax.errors import InputError, WorkError, is_shortage
from tif_jax.models.params import Params
from tif_jax.runtime import files, processes, records, workdir
from tif_jax.runtime.digests import checksum, is_divided
from tif_jax.runtime.mesh import place
from tif_jax.training.state import State

logger = logging.getLogger(__name__)


class _Damaged(Exception):
    """A checkpoint can not be read, or not as it was written; the message says why, in one line."""


class Checkpoints:
    """The checkpoints of one run, newest last. Use as a context manager: leaving it waits for the last write."""

    def __init__(self, directory: str | Path, max_to_keep: int | None = 2):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep)
        workdir.check_name(self.directory)
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            # Orbax would remove what killed runs left in a thread, and may stumble over it while that is under way.
            if processes.is_first():
                workdir.remove_abandoned(self.directory)
            processes.wait_for_all("checkpoints cleared")
            self.manager = ocp.CheckpointManager(self.directory, options=options)
        # We ask ourselves (`processes.stop_asked`); asked by two, JAX loses count and with it the signal.
        self.manager.reached_preemption = lambda step: False  # type: ignore[method-assign]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_exc) -> None:
        with self._writing():
            self.manager.close()

    def save(self, state: State, config: Mapping[str, Any], position: Mapping[str, Any]) -> None:
        """Writes a checkpoint of state.step in the background.

        config: what the checkpoint says of itself; `of` in it is the number of steps of its stage. position: the input
        iterator's state. Raises WorkError if the disk is full; what goes wrong in the background is raised by the next call,
        `wait` or the end of the context.
        """
        step = int(jax.device_get(state.step))
        # From the host: of arrays with a copy on each device, Orbax would cut every device's share with a program of its
        # own. Arrays divided over several processes are written by all of these.
        arrays = jax.tree.map(lambda leaf: leaf if is_divided(leaf) else jax.device_get(leaf), _items(state))
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        digests = {name: checksum(tree) for name, tree in arrays.items()}
        said = {**config, "step": step, "digest": digests, "position": dict(position)}
        items["config"] = ocp.args.JsonSave(records.sealed(said))
        with self._writing():
            self.manager.save(step, args=ocp.args.Composite(**items))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not."""
        return sorted(self.manager.all_steps())

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        with self._writing():
            self.manager.wait_until_finished()

    def restore(self, template: State) -> tuple[State, dict[str, Any]] | None:
        """The newest whole checkpoint, and its config; None if there is no checkpoint.

        template: shapes and shardings (jax.ShapeDtypeStruct or arrays) of what is restored. A damaged checkpoint is named
        in a warning, and the one before it is tried; if that is whole, the damaged one is moved aside. Raises InputError if
        all are damaged, and leaves them: they may be whole for a version of optax whose states were others. WorkError where a
        disk does not answer. Of several processes all have to call this.
        """
        damaged: dict[int, str] = {}
        for step in self.steps()[::-1]:
            try:
                restored = self._restore_step(step, template)
            except _Damaged as damage:
                logger.warning("checkpoint %s/%d is damaged (%s)", self.directory, step, damage)
                damaged[step] = str(damage)
                continue
            for other in damaged:
                self._move_aside(other)
            return restored
        if damaged:
            step, why = next(iter(damaged.items()))
            raise InputError(
                f"no checkpoint in {self.directory} is whole (tried steps {[*damaged]}; of {step}: {why}): put back a copy, "
                "or delete that folder to start anew"
            )
        return None

    def _restore_step(self, step: int, template: State) -> tuple[State, dict[str, Any]]:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        arrays, config = _read(self.directory / str(step), _items(abstract), processes.all_say)
        step_array = place(np.int32(step), template.step.sharding)
        return State(step_array, arrays["params"], arrays.get("opt", template.opt_state), arrays.get("ema")), config

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
        except OSError as error:
            raise files.not_written(self.directory, error) from error
        except Exception as error:  # tensorstore has kinds of its own, whose messages are pages
            if not (failed := _of_system(error)):
                raise WorkError(
                    f"checkpoint not written to {self.directory}: {_first_line(error)}; what is finished is intact: check "
                    "the disk, then run the same command again"
                ) from error
            raise files.not_written(self.directory, failed) from error


def load_params(directory: str | Path) -> tuple[Params, dict[str, Any]]:
    """Parameters and config of the newest checkpoint in a checkpoint directory, or of one step's folder.

    Where the run kept a moving average of the parameters, the average is what is loaded. This process reads by itself.
    Raises InputError if there is no checkpoint, or if it is damaged: an older one, which is something else, has to be asked
    for.
    """
    folder = newest(directory)
    # Onto one device, whatever devices the arrays were written from.
    device = SingleDeviceSharding(jax.local_devices()[0])
    try:
        item = _loaded(_config_of(folder))
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), _shapes(folder / item)
        )
        arrays, config = _read(folder, {item: abstract})
    except Exception as error:  # `_Damaged`, or what Orbax raises for a damaged folder
        _check_tells_of_file(folder, error)
        raise _is_damaged(folder, error) from None
    if (which := identity(config))["step"] < which["of"]:
        logger.warning("%s is of step %d of %d: its stage is not finished", folder, which["step"], which["of"])
    return arrays[item], config


def newest(directory: str | Path) -> Path:
    """The folder of the newest checkpoint, damaged or not, in a checkpoint directory; or the directory, if it is one step's.

    Raises InputError naming the directory if there is none.
    """
    directory = Path(directory).absolute()
    if (directory / "params").is_dir():
        return directory
    if not (numbered := newest_first(directory)):
        raise InputError(f"no checkpoint in {directory}; run the stage that makes it first")
    return numbered[0]


def newest_first(directory: str | Path) -> list[Path]:
    """The folders of all checkpoints in a directory, damaged or not."""
    directory = Path(directory).absolute()
    numbered = [p for p in directory.iterdir() if p.is_dir() and p.name.isdigit()] if directory.is_dir() else []
    return sorted(numbered, key=lambda p: -int(p.name))


def read_config(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; its arrays are not read. Raises InputError if it is damaged."""
    try:
        return _config_of(folder)
    except Exception as error:
        _check_tells_of_file(folder, error)
        raise _is_damaged(folder, error) from None


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint with this config: its step, `of` how many, and the digest of the parameters that are loaded."""
    return {"step": config["step"], "of": config.get("of", config["step"]), "digest": config["digest"][_loaded(config)]}


def _check_tells_of_file(folder: Path, error: Exception) -> None:
    """Raises what says nothing of a checkpoint: a lack of memory, and WorkError where a disk does not answer."""
    if is_shortage(error) or isinstance(error, WorkError):
        raise error
    failed = _of_system(error)
    if failed and failed.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise WorkError(
            f"can not read checkpoint {folder}: {failed.strerror}; it may be whole: check the disk and who may read it, then "
            "run the same command again; or move that folder away to go on from the one before it"
        ) from error


def _of_system(error: Exception) -> OSError | None:
    """What the system said, also where tensorstore tells of it."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _is_damaged(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"checkpoint {folder} is damaged ({_first_line(error)}): run the stage that made it again, which goes on from the "
        "one before it, or put back a copy"
    )


def _loaded(config: Mapping[str, Any]) -> str:
    """The item that a model is loaded from."""
    return "ema" if "ema" in config["digest"] else "params"


def _read(
    folder: Path, wanted: Mapping[str, Any], all_say: Callable[[bool], bool] = bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The wanted items (trees of jax.ShapeDtypeStruct) and the config of a checkpoint. Raises _Damaged if it is not whole.

    all_say: whether something is true in all processes that read it: they have to agree, since each may find something
    else, and they work together from here on.
    """
    arrays, config, damage = {}, {}, None
    try:
        config = _config_of(folder)
        for name, tree in wanted.items():
            _shapes(folder / name)  # a later reader that has no template needs them
            arrays[name] = _array_reader().restore(folder / name, tree)
    except Exception as error:  # Orbax raises many kinds for a damaged folder
        _check_tells_of_file(folder, error)
        damage = _first_line(error)
    if not all_say(damage is None):
        raise _Damaged(damage or "as another process found")
    if changed := [name for name, tree in arrays.items() if checksum(tree) != config["digest"].get(name)]:
        damage = f"the arrays of {' and '.join(changed)} do not have the digest that was written with them"
    if not all_say(damage is None):
        raise _Damaged(damage or "as another process found")
    return arrays, config


def _shapes(item: Path) -> Any:
    """The tree of what describes the item's arrays. Raises an exception of some kind if it is damaged."""
    # A Checkpointer would look for a file that items of a checkpoint do not have, and warn.
    return ocp.StandardCheckpointHandler(multiprocessing_options=_by_this_process_only()).metadata(item).tree


def _config_of(folder: Path) -> dict[str, Any]:
    """The config. Raises an exception of some kind if it is damaged, or another step's."""
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=_by_this_process_only())
    read = ocp.Checkpointer(handler, multiprocessing_options=_by_this_process_only()).restore(folder / "config")
    config = records.opened(read)
    if folder.name.isdigit() and int(folder.name) != config["step"]:
        raise _Damaged(f"it is of step {config['step']}")
    return config


def _items(state: State) -> dict[str, Any]:
    """A state's arrays by the name of their Orbax item, which refuses to be empty: an imported backbone has no `opt`."""
    items = {"params": state.params, "opt": state.opt_state, "ema": state.ema}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _array_reader() -> ocp.StandardCheckpointer:
    return ocp.StandardCheckpointer(multiprocessing_options=_by_this_process_only())


def _by_this_process_only() -> ocp.options.MultiprocessingOptions:
    """Options to read with, whatever the other processes of the run are doing."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, {own}, barrier_sync_key_prefix=f"process_{own}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
