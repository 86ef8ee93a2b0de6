"""The table of docs/models.md: timm's models read by `tif_jax.load`, beside timm itself, with random weights.

python -m benchmarks.models --timm PYTHON [NAME ...]    PYTHON: one with torch and timm; NAME: these models alone

Each model is made by timm with random weights, saved as on the hub, and loaded. Compared are the logits of two images of
random numbers. Then each reducer runs in a small model of its form (`_SMALL`), with half of the tokens and with all, which
is compared with the plain model. Models that differ in sizes alone share that.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tif_jax import reducers
from tif_jax.errors import InputError
from tif_jax.models import blueprint
from tif_jax.weights.loading import load_with_fields

# timm's name -> what else it is told. Of large models the first blocks alone; a fresh head where timm has none.
_LARGE: dict[str, Any] = dict(depth=2)
_HEADLESS: dict[str, Any] = dict(num_classes=5)
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_224": {},
    "vit_base_patch16_224": _LARGE,
    "vit_large_patch16_384": _LARGE,
    "vit_wee_patch16_reg1_gap_256": {},
    "vit_medium_patch16_gap_240": _LARGE,
    "deit_tiny_patch16_224": {},
    "deit_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit_base_distilled_patch16_384": _LARGE,
    "deit3_small_patch16_224": {},
    "deit3_base_patch16_384": _LARGE,
    "deit3_large_patch16_224": _LARGE,
    "flexivit_small": {},
    "vit_small_patch14_dinov2": dict(img_size=224),
    "vit_base_patch14_dinov2": _LARGE | dict(img_size=224),
    "vit_small_patch14_reg4_dinov2": dict(img_size=224) | _HEADLESS,
    "vit_large_patch14_reg4_dinov2": _LARGE | dict(img_size=224) | _HEADLESS,
    "vit_giant_patch14_dinov2": _LARGE | dict(img_size=224) | _HEADLESS,
    "vit_small_patch16_dinov3": dict(img_size=224),
    "vit_base_patch16_dinov3": _LARGE | dict(img_size=224) | _HEADLESS,
    "vit_small_plus_patch16_dinov3": dict(img_size=224),
    "vit_small_plus_patch16_dinov3_qkvb": dict(img_size=224),
    "vit_large_patch16_dinov3": _LARGE | dict(img_size=224) | _HEADLESS,
    "eva02_tiny_patch14_224": _HEADLESS,
    "eva02_small_patch14_336": _HEADLESS,
    "eva02_base_patch14_448": _LARGE | _HEADLESS,
    "eva02_large_patch14_224": _LARGE | _HEADLESS,
    "eva02_base_patch16_clip_224": _LARGE,
    "eva_giant_patch14_224": dict(depth=1),
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_ape_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": _LARGE,
    "vit_base_patch32_clip_224": _LARGE,
    "vit_base_patch16_clip_quickgelu_224": _LARGE,
    "vit_large_patch14_clip_224": _LARGE,
    "vit_base_patch16_siglip_224": _LARGE,
    "vit_so400m_patch14_siglip_224": _LARGE,
    "vit_base_patch16_siglip_gap_224": _LARGE | _HEADLESS,
}
_SIZES = ("image_size", "patch_size", "width", "depth", "num_heads", "mlp_dim", "num_classes", "rotary_grid")
_FAST = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
_SMALL = dict(width=32, num_heads=2, mlp_dim=48, depth=3, patch_size=4, image_size=20, num_classes=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", required=True)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    print("| model | blocks | difference to timm | reducers | all tokens kept |\n|---|---|---|---|---|", flush=True)
    done: dict[str, str] = {}
    with _worker(arguments.timm) as write:
        for name in arguments.names or MODELS:
            print(f"| `{name}` | {_row(name, write, done)} |", flush=True)


@contextmanager
def _worker(python: str) -> Iterator[Callable[[str, Path], None]]:
    """A function of a model's name and a folder, which has the other process fill the folder."""
    command = [python, str(Path(__file__).with_name("_timm_worker.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        ask, answer = process.stdin, process.stdout

        def write(name: str, folder: Path) -> None:
            ask.write(json.dumps([name, MODELS[name], str(folder)]) + "\n")
            ask.flush()
            if answer.readline() != "done\n":
                raise SystemExit(f"timm's side failed at {name}")

        yield write
        ask.close()


def _row(name: str, write: Callable[[str, Path], None], done: dict[str, str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write(name, Path(folder))
        images, theirs = (np.load(Path(folder) / f"{part}.npy") for part in ("images", "logits"))
        try:
            model, fields = load_with_fields(Path(folder) / "model.safetensors")
        except InputError as error:
            return f"refused: {str(error).partition(': ')[2]} | | | "
        ours = np.asarray(jax.jit(lambda x: model(x)[0], compiler_options=_FAST)(images))
    largest = np.abs(theirs).max()
    form = json.dumps({key: value for key, value in fields.items() if key not in _SIZES}, sort_keys=True, default=str)
    if form not in done:
        done[form] = _reduced(fields)
    return f"{fields['depth']} | {np.abs(ours - theirs).max() / largest:.0e} | {done[form]}"


def _reduced(fields: dict[str, Any]) -> str:
    """Which reducers run in a small model of this form; keeping everything, how far they are from the plain model at most."""
    small = fields | _SMALL
    images = np.random.default_rng(0).standard_normal((2, small["image_size"], small["image_size"], 3), np.float32)

    def logits(name: str, **options: Any) -> np.ndarray:
        def call(key, x):
            model = blueprint(small, reducer=name, **options)(key)
            plain = nnx.state(blueprint(small)(key), nnx.Param)
            nnx.update(model, plain)  # what is not the reducer's is the same for all
            return model(x)[0]

        found = np.asarray(jax.jit(call, compiler_options=_FAST)(jax.random.key(0), images))
        if not np.isfinite(found).all():
            raise SystemExit(f"{name} gives logits that are not finite in {small}")
        return found

    plain = logits("full")
    run, refused, differences = [], [], []
    for name in sorted({*reducers.known()} - {"full"}):
        merges = "keep_ratio" not in reducers.options(name)
        option, half, none = ("num_merged", 4, 0) if merges else ("keep_ratio", 0.5, 1.0)
        try:
            logits(name, **{option: half})
        except InputError as error:
            if "class token" not in str(error):
                raise
            refused.append(name)
        else:
            run.append(name)
            differences.append(np.abs(logits(name, **{option: none}) - plain).max() / np.abs(plain).max())
    return f"{len(run)}" + (f", not {', '.join(refused)}" if refused else "") + f" | {max(differences):.0e}"


if __name__ == "__main__":
    main()
