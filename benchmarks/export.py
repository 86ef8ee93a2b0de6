"""Exported models beside the models: are they the same, and how long do they take? One core; real photographs.

    python -m benchmarks.export FORMAT [NUM_IMAGES] [ROUNDS]

Of each reducer, as ONNX (onnxruntime) or as StableHLO (JAX): for how many of NUM_IMAGES (default: 32) photographs, half from
Imagenette and half from imagenet_ccby, the likeliest class and the tokens kept are the model's; the largest difference of a
logit, where the tokens are the same; and the CPU time of batches of 1 and 32 (medians of ROUNDS, default 7, interleaved with
the plain model in the same format), and how many times as fast that is as the plain model. FORMAT: onnx or stablehlo.
DeiT-Ti's weights; what tif, dynamic_vit and tosa learn is drawn at random, and so are the LeViTs. Needs imagenette,
imagenet_ccby and the weights in $TIF_DATA (default: ../shared/data).
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import onnxruntime

from benchmarks._common import data_root
from tif_jax import InputError, cost, create_model, load
from tif_jax.export import FORMATS
from tif_jax.export.artifact import Call, forward

WEIGHTS = "deit_tiny_patch16_224.safetensors"
ROWS = [
    (WEIGHTS, "full", {}),
    (WEIGHTS, "tif", dict(keep_ratio=0.5)),
    (WEIGHTS, "tif", dict(keep_ratio=0.5, adapter=48, then=dict(name="tome", num_merged=8))),
    (WEIGHTS, "norm", dict(keep_ratio=0.5)),
    (WEIGHTS, "prior", dict(keep_ratio=0.5)),
    (WEIGHTS, "random", dict(keep_ratio=0.5)),
    (WEIGHTS, "evit", dict(keep_ratio=0.5)),
    (WEIGHTS, "bat", dict(keep_ratio=0.5)),
    (WEIGHTS, "tome", dict(num_merged=13)),
    (WEIGHTS, "dynamic_vit", dict(keep_ratio=0.7)),
    (WEIGHTS, "evo_vit", dict(keep_ratio=0.5)),
    (WEIGHTS, "tosa", dict(keep_ratio=0.5)),
    *[(WEIGHTS, name, dict(keep_ratio=0.43)) for name in ("expediting", "ailurus")],
    ("levit_128s", "full", {}),
    ("evo_levit_128s", "evo_levit", {}),
]  # fmt: skip


def main() -> None:
    form, *numbers = sys.argv[1:]
    num_images, rounds = (int(word) for word in (*numbers, *(32, 7)[len(numbers) :]))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    listed = [sorted((data_root() / name).rglob("*.[jJ]*")) for name in ("imagenette/val", "imagenet_ccby")]
    half = num_images // 2
    photographs = [str(path) for paths in listed for path in paths[:: len(paths) // half][:half]]
    print("| reducer | GMAC | max. difference | same class | same tokens | batch 1, ms | x | batch 32, ms | x |")
    print("|---|---|---|---|---|---|---|---|---|")
    plain: dict[str, Call] = {}  # of each network
    for source, reducer, options in ROWS:
        known = {"reducer": reducer, **options}
        model = load(data_root() / source, **known) if source == WEIGHTS else create_model(source, **known)
        text = ", ".join([reducer, *(f"{key}={value}" for key, value in options.items())])
        text += "" if source == WEIGHTS else f" ({source})"
        cells = row(model, form, np.asarray(model.preprocess(photographs)), plain, source, rounds)
        print(f"| {text} | {cost(model).gmac:.3f} | {cells} |", flush=True)


def row(model, form: str, images: np.ndarray, plain: dict[str, Call], source: str, rounds: int) -> str:
    """The cells of a row. plain: by network what the others are compared with; the first of a network joins it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            manifest = FORMATS[form](model, Path(folder) / "made")
        except InputError as error:
            return f"{error} | | | | | |"
        call = loaded(Path(folder) / "made" / manifest["model"], form)
    expected = {name: np.asarray(value) for name, value in jax.jit(forward(model))(images).items()}
    found = {name: np.asarray(value) for name, value in call(images).items()}
    tokens = [(found[name] == expected[name]).all(axis=1) for name in expected if name != "logits"]
    alike = tokens[0] if tokens else np.ones(len(images), bool)
    difference = np.abs(found["logits"] - expected["logits"])[alike].max()
    same = (found["logits"].argmax(1) == expected["logits"].argmax(1)).sum()
    kept = f"{alike.sum()} of {len(images)}" if tokens else "all are kept"
    beside = plain.setdefault(source.removeprefix("evo_"), call)
    batches = (images[:1], np.resize(images, (32, *images.shape[1:])))
    figures = [times(call, beside, batch, rounds) for batch in batches]
    speed = " | ".join(f"{1000 * own:.1f} | {other / own:.2f}" for own, other in figures)
    return f"{difference:.1e} | {same} of {len(images)} | {kept} | {speed}"


def loaded(path: Path, form: str):
    """The model's file as a function from images to outputs by name, on one core."""
    if form == "onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))
    call = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: jax.block_until_ready(call(images))


def times(call, beside, images, rounds: int) -> tuple[float, float]:
    """Median CPU seconds of either, in turns: on a busy machine they say more than the time on the wall."""
    seconds: tuple[list[float], list[float]] = ([], [])
    if len(images) == 1:  # others are compiled, if there are 32 photographs
        call(images), beside(images)
    for _ in range(rounds):
        for function, taken in zip((call, beside), seconds, strict=True):
            start = time.process_time()
            function(images)
            taken.append(time.process_time() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
