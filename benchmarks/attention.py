"""Whole forward passes with attention written in several ways: which one the models should take, on this device.

    python -m benchmarks.attention [--model deit_tiny_patch16_224] [--dtype float32,bfloat16] [--batch 1,8,32] [--rounds 5]

*written out*: `models/vit_blocks`, as it is. *dot_product_attention*: jax.nn's, by XLA. *in groups of G*: written out, but
for G images at a time on each device, so that the logits of all heads, (G, heads, tokens, tokens), stay in a CPU's caches.
Every row has its turn in every round; medians, and the ratio to what is written out.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from benchmarks._common import Run, median_and_range, plain_forward, random_images, rates_of
from tif_jax import create_model
from tif_jax.__main__ import use_all_cores
from tif_jax.models import vit_blocks

GROUPS = (1, 2, 4, 8)
WRITTEN = vit_blocks._attend


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    arguments = parser.parse_args()
    use_all_cores()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.model}\n")
    print("| dtype | batch | attention | images/s | x written out |\n|---|---|---|---|---|")
    for dtype in arguments.dtype.split(","):
        for size in map(int, arguments.batch.split(",")):
            rows = {name: forward(arguments.model, dtype, size, attend) for name, attend in ways(size).items()}
            rates = rates_of(rows, arguments.rounds, arguments.seconds)
            base = statistics.median(rates["written out"])
            for name, of_row in rates.items():
                shown = f"{median_and_range(of_row)} | {statistics.median(of_row) / base:.2f}"
                print(f"| {dtype} | {size} | {name} | {shown} |", flush=True)


def ways(batch_size: int) -> dict[str, Callable[..., Any]]:
    """By their names. Groups are of the images on a device."""
    on_device = batch_size // jax.device_count() or 1
    groups = {f"in groups of {number}": partial(grouped, number) for number in GROUPS if number < on_device}
    return {"written out": WRITTEN, "dot_product_attention": by_jax, **groups}


def forward(name: str, dtype: str, batch_size: int, attend: Callable[..., Any]) -> Run:
    """The forward pass, compiled and run once, with that attention inside."""
    vit_blocks._attend = attend
    try:
        model = create_model(name, dtype=dtype)
        run = plain_forward(model, random_images(model, batch_size))
        run()
    finally:
        vit_blocks._attend = WRITTEN
    return lambda: len(run())


def by_jax(query, key, value, key_log_weight, key_weight):
    assert key_log_weight is None and key_weight is None
    return rearrange(jax.nn.dot_product_attention(query, key, value), "b t h c -> b h t c")


def grouped(number, query, key, value, key_log_weight, key_weight):
    assert key_log_weight is None and key_weight is None
    steps = len(query) // (number * jax.device_count())
    # Each group has images of every device, so that none waits for another's.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, steps, *x.shape[1:]), 1, 0), (query, key, value))
    mixed = jnp.moveaxis(jax.lax.map(lambda part: WRITTEN(*part, None, None), parts), 0, 1)
    return mixed.reshape(-1, *mixed.shape[2:])


if __name__ == "__main__":
    main()
