"""What impact would be if float32 factors of matrix products were rounded, as JAX has TPUs and GPUs do by default: emulated.

    python -m benchmarks.precision [NUM_IMAGES]

Needs imagenet_ccby and the DeiT-Ti weights in $TIF_DATA (default: ../shared/data). Prints the mean per-image Spearman
correlation of `exact` (zero, label) with itself in float32, how much of the best 98 of 196 tokens is the same, and the
largest difference and impact in nats.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._common import data_root
from tif_jax import load, token_impact
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.impact.rankings import mean_spearman

FRACTION_BITS = {"float32": 23, "TF32 (GPUs)": 10, "bfloat16 (TPUs)": 7}


def main() -> None:
    root, num_images = data_root(), int(sys.argv[1]) if len(sys.argv) > 1 else 8
    data = dict(name="image_table", root=str(root / "imagenet_ccby"), test_split="labels.csv", num_test=num_images)
    batch = next(evaluation_batches(open_source(data, "test"), data, batch_size=num_images))
    model = load(root / "deit_tiny_patch16_224.safetensors")
    print("| factors | rho | best 98 | largest difference | largest impact |\n|---|---|---|---|---|")
    exact = None
    for name, bits in FRACTION_BITS.items():
        with rounded_factors(bits):
            found = np.asarray(token_impact(model, batch["image"], batch["label"]))
        exact = found if exact is None else exact
        best, ours = (np.sort(np.argsort(-x, axis=1)[:, :98], axis=1) for x in (exact, found))
        same = np.mean([len(np.intersect1d(*pair)) / 98 for pair in zip(best, ours, strict=True)])
        numbers = mean_spearman(exact, found), same, np.abs(found - exact).max(), np.abs(exact).max()
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in numbers)} |", flush=True)


@contextmanager
def rounded_factors(bits: int) -> Iterator[None]:
    """Programs traced in it round both float32 factors of every matrix product to so many bits of fraction."""
    bind = jax.lax.dot_general_p.bind

    def rounding(*factors, **options):
        return bind(
            *(jax.lax.reduce_precision(x, 8, bits) if x.dtype == jnp.float32 else x for x in factors), **options
        )

    jax.clear_caches()
    jax.lax.dot_general_p.bind = rounding
    try:
        yield
    finally:
        jax.lax.dot_general_p.bind = bind
        jax.clear_caches()


if __name__ == "__main__":
    main()
