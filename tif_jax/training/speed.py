"""How well a training step uses its devices: model FLOP/s utilisation and memory."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from tif_jax.models import Model
from tif_jax.models.cost import cost

# Dense bfloat16 TFLOP/s of one device, from its maker's data sheet, by how JAX calls it.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
}

Meter = Callable[[float], dict[str, float]]


def meter(model: Model | None, mesh: Mesh, peak_tflops: float = 0.0) -> Meter:
    """A function from images/s in training to `mfu` and `memory_bytes`, where they are known.

    mfu: the multiply-adds that forward and backward pass need (three times the forward pass's, two operations each), over
    what the mesh's devices could do at peak_tflops each; 0 stands for PEAK_TFLOPS of the device. None for a step that
    does not run the model. memory_bytes: the most that one device of this process has held so far.
    """
    device = mesh.local_mesh.devices.flat[0]
    peak = peak_tflops or PEAK_TFLOPS.get(device.device_kind, 0.0)
    tflops_per_image = 3 * 2 * cost(model).gmac / 1e3 if model is not None and peak else 0.0

    def measure(images_per_second: float) -> dict[str, float]:
        found = {}
        if tflops_per_image:
            found["mfu"] = images_per_second * tflops_per_image / (mesh.size * peak)
        if held := [memory for d in mesh.local_mesh.devices.flat if (memory := peak_memory(d)) is not None]:
            found["memory_bytes"] = float(max(held))
        return found

    return measure


def peak_memory(device: jax.Device) -> int | None:
    """Bytes that the device has held at most; None where it does not tell (a CPU)."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
