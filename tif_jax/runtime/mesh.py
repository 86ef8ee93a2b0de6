"""Which devices work on a batch, and how arrays get there."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp")


def make_mesh(batch_size: int, fsdp: int = 1, *, this_process_only: bool = False) -> Mesh:
    """A mesh with axes 'data' and 'fsdp' over as many devices of every process as divide the batch evenly.

    The batch is divided over all of them, parameters and what belongs to them over fsdp (see `shardings`).
    this_process_only: the other processes' devices are left out.
    Devices follow each other by process: so do the rows of a batch, and neighbours along fsdp share a host.
    Raises InputError if nothing fits.
    """
    owners = [jax.process_index()] if this_process_only else list(range(jax.process_count()))
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
    return Mesh(np.array(used).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


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


def shard(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Array]:
    """The batch's arrays, spread over the devices by their first axis; those of strings are left out.

    Of several processes each gives its own rows, in their order (`loader.Batches`); a mesh of one process takes all.
    """
    arrays = {name: array for name, array in batch.items() if array.dtype != object}
    by_row = NamedSharding(mesh, PartitionSpec(AXES))
    if mesh.is_multi_process:
        with jax.transfer_guard_host_to_device("allow"):  # it does not call them explicit, as device_put does
            return {name: jax.make_array_from_process_local_data(by_row, array) for name, array in arrays.items()}
    return jax.device_put(arrays, by_row)
