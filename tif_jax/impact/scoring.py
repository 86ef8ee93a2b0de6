"""The oracle over all devices of a process, within their memory.

Legend: B images, N patch tokens.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, Num

from tif_jax.errors import WorkError
from tif_jax.impact.objective import label_key, label_shape
from tif_jax.impact.oracle import Scores, Units, check_options, default_chunk, num_units, shared_scores
from tif_jax.models import Model, plain_vit
from tif_jax.models.gradients import for_gradients

logger = logging.getLogger(__name__)


class Scorer:
    """Scores batches of a fixed size. Masked images (image x mask) are spread over the devices, which never communicate.

    The images go to as many groups of devices as divide them evenly, their masks to the devices of the group: two images
    fill eight devices. Called with images and labels it starts the work, and returns a function that waits for it.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        *,
        devices: Sequence[jax.Device] | None = None,
        seed: int = 0,
        chunk: int | None = None,
        **options,
    ):
        """devices: by default those of this process. chunk, options: as for `token_impact`, the options without defaults.

        The chunk, of each device, is halved until the compiled program fits into the memory that is free.
        """
        devices = jax.local_devices() if devices is None else devices
        model = for_gradients(plain_vit(model, "impact"), devices)
        self._options = check_options(**options)
        self.units_per_image = num_units(self._options, model.grid[0] * model.grid[1])
        self.mesh = spread(devices, batch_size, self.units_per_image)
        graphdef, params = nnx.split(model)
        self._params = jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))
        self._data = NamedSharding(self.mesh, PartitionSpec("data"))
        self._seed = jax.device_put(np.int32(seed), NamedSharding(self.mesh, PartitionSpec()))
        groups, shares = self.mesh.devices.shape
        units = np.broadcast_to(in_shares(self.units_per_image, shares), (groups, shares, 2))
        self._units = jax.device_put(units, NamedSharding(self.mesh, PartitionSpec("data", "mask")))
        self._graphdef = graphdef
        self.label_key, label = label_key(model), label_shape(model, batch_size)  # of a batch, what the loss reads
        self._inputs = (
            jax.ShapeDtypeStruct((batch_size, *model.image_size, 3), jnp.float32, sharding=self._data),
            {self.label_key: label.update(sharding=self._data)},
        )
        self._compile(chunk or default_chunk(self._options["estimator"], model.task))

    def __call__(self, images: Float[np.ndarray, "B Y X 3"], labels: Num[np.ndarray, "B ..."]) -> Callable[[], Scores]:
        """Starts; the function returned waits for the Scores (numpy), and at a lack of memory halves the chunk and repeats.

        labels: classes (B,), or of a dense task label maps (B, Y, X). Raises WorkError, on waiting, if a single masked image
        does not fit.
        """
        inputs = jax.device_put((images, {self.label_key: labels}), self._data)
        program, outcome = self.program, self._start(*inputs)

        def wait() -> Scores:
            nonlocal program, outcome
            while True:
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    scores = jax.device_get(outcome)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    if program is self.program:  # else an earlier batch has met this already
                        self._halve(error)
                    program, outcome = self.program, self._start(*inputs)
                else:
                    return scores._replace(impact=scores.impact.sum(axis=1))

        return wait

    def _start(self, images, batch) -> Scores | Exception:
        try:
            return self.program(self._params, self._seed, self._units, images, batch)
        except jax.errors.JaxRuntimeError as error:  # a device may notice at once or only when it comes to the work
            return error

    def _halve(self, error: Exception) -> None:
        if self.chunk == 1:
            raise WorkError(
                "one masked image does not fit into the device's memory: score on a larger device"
            ) from error
        logger.warning("out of memory with %d masked images at once on a device: going on with half", self.chunk)
        self._compile(self.chunk // 2)

    def _compile(self, chunk: int) -> None:
        free = min(map(_free_memory, self.mesh.local_mesh.devices.flat))
        self.chunk, self.program = chunk, self._compiled(chunk)
        while self.chunk > 1 and _memory_needed(self.program) > free:
            self.chunk //= 2
            self.program = self._compiled(self.chunk)

    def _compiled(self, chunk: int) -> jax.stages.Compiled:
        program = scores_on(self._graphdef, self.mesh, self.mesh.shape["mask"], chunk=chunk, **self._options)
        return program.lower(self._params, self._seed, self._units, *self._inputs).compile()


def spread(devices: Sequence[jax.Device], num_images: int, units_per_image: int) -> Mesh:
    """The images go to as many groups of devices ('data') as divide them evenly, their masks to the devices of the group
    ('mask'), no more than there are masks."""
    groups = math.gcd(num_images, len(devices))
    shares = min(units_per_image, len(devices) // groups)
    used = np.array(devices[: groups * shares]).reshape(groups, shares)
    return Mesh(used, ("data", "mask"), axis_types=(AxisType.Auto,) * 2)


def in_shares(num_units: int, num_shares: int) -> Int[np.ndarray, "S 2"]:
    """An image's units in shares of equal size, the last ones perhaps smaller: `Units` of each."""
    size = -(-num_units // num_shares)
    ends = np.minimum(size * np.arange(num_shares + 1), num_units)
    return np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int32)


@lru_cache(maxsize=32)
def scores_on(graphdef: Any, mesh: Mesh, num_shares: int | None, **options: Any) -> Any:
    """The oracle, jitted, on a mesh from `spread`: (params, seed, units, images, batch) -> Scores.

    units: int32 (groups, shares, 2), `Units` of each device. The impacts come as (B, shares, N), which add up to the whole.
    num_shares, options: of `shared_scores`, but the seed.
    """
    logger.info("a program for the oracle (%s) on %d devices is compiled", options["estimator"], mesh.size)

    def score(params, seed, units, images, batch):
        model = nnx.merge(graphdef, params)
        own = Units(units[0, 0, 0], units[0, 0, 1])
        scores = shared_scores(model, images, batch, own, num_shares, seed=seed, **options)
        return scores._replace(impact=scores.impact[:, None])

    whole, data, each = PartitionSpec(), PartitionSpec("data"), PartitionSpec("data", "mask")
    out_specs: Any = Scores(each, data, data)  # type: ignore[arg-type]
    in_specs = (whole, whole, each, data, data)
    return jax.jit(jax.shard_map(score, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def _memory_needed(program: jax.stages.Compiled) -> int:
    """Bytes on each device beyond what is there already: parameters and images."""
    analysis = program.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def _free_memory(device: jax.Device) -> float:
    """Bytes; a CPU's memory is divided among the devices made of it."""
    if device.platform == "cpu":
        return psutil.virtual_memory().available / jax.local_device_count()
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", math.inf) - statistics.get("bytes_in_use", 0)
