"""How well a training step uses its devices: model FLOP/s utilisation and memory."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from tif_jax.models import Model
from tif_jax.models.cost import gmac

# Dense bfloat16 FLOP/s of a chip, and those of float32 (GPUs: without tensor cores; TPUs: six bfloat16 products for each), as
# their makers publish them.
PEAK = {
    "a100": (312e12, 19.5e12), "h100": (989e12, 67e12), "h200": (989e12, 67e12), "l4": (121e12, 30.3e12),
    "v4": (275e12, 275e12 / 6), "v5e": (197e12, 197e12 / 6), "v5p": (459e12, 459e12 / 6), "v6e": (918e12, 918e12 / 6),
    "tpu7x": (2307e12, 2307e12 / 6),
}  # fmt: skip
# How JAX calls them. v4 and v5p are chips of two cores that are one device.
_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "NVIDIA A100-SXM4-40GB": "a100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200", "NVIDIA L4": "l4",
}  # fmt: skip

Meter = Callable[[float], dict[str, float]]


def meter(model: Model | None, mesh: Mesh, peak_tflops: float = 0.0) -> Meter:
    """A function from images/s in training to `mfu` and `memory_bytes`, where they are known.

    mfu: the multiply-adds that forward and backward pass need (three times the forward pass's, two operations each), over
    what the mesh's devices could do at peak_tflops each; 0 stands for the bfloat16 peak of the device, where it is known.
    model: None for a step that does not run it. memory_bytes: the most that one device of this process has held so far.
    """
    device = mesh.local_mesh.devices.flat[0]
    known = _KINDS.get(device.device_kind)
    peak = peak_tflops or (PEAK[known][0] / 1e12 if known else 0.0)
    tflops_per_image = 3 * 2 * gmac(model, training=True) / 1e3 if model is not None and peak else 0.0

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
