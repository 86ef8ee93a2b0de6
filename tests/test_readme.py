"""Runs the Python of README.md and docs/python.md in one namespace, with tiny files and models where it names big ones."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from cases import call
from PIL import Image
from reference import random_timm_tensors

import tif_jax
from tif_jax.figures import seen
from tif_jax.impact import shards
from tif_jax.impact.manifest import Manifest, open_manifest
from tif_jax.models.names import SIZES
from tif_jax.models.params import params_of
from tif_jax.runtime import records
from tif_jax.runtime.mesh import make_mesh, replicate
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State
from tif_jax.weights.conventions import NUM_HEADS

ROOT = Path(__file__).parents[1]
PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "docs/python.md")}
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for page, text in PAGES.items()}
FLAX_ALONE = BLOCKS["docs/python.md"][-1]
WEIGHTS = "deit_tiny_patch16_224.safetensors"
RUN = dict(image_size=16, patch_size=4, width=16, depth=1, num_heads=2, num_classes=10, pool="mean", class_token=False)
TIF = dict(name="tif", keep_ratio=0.25)
COMPARISON = """
import jax, numpy as np

images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
loaded = tif_jax.load("runs/digits")
(logits, aux), (expected, expected_aux) = jax.jit(lambda images: (restored(images), loaded(images)))(images)
np.testing.assert_array_equal(logits, expected)
np.testing.assert_array_equal(aux["kept"], expected_aux["kept"])
assert np.ptp(logits) > 0  # the older checkpoint holds zeros
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What is defined after the last line of both pages."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(SIZES, "tiny", dict(width=16, depth=1, num_heads=2))
        patch.setitem(NUM_HEADS, (64, 2), 2)  # of the file that is loaded
        patch.setattr(seen, "OFF_THE_SHELF", ("tome",))  # one of those that `view` draws
        _write_files(folder)
        namespace: dict = {"folder": folder}
        patch.syspath_prepend(folder)
        for block in itertools.chain(*BLOCKS.values()):
            if file := re.match(r'"""(\w+/\w+\.py)"""', block):
                (folder / file[1]).parent.mkdir()
                (folder / file[1]).write_text(block)
            else:
                exec(block, namespace)
        yield namespace


def test_the_pages_have_their_blocks():
    assert {page: len(blocks) for page, blocks in BLOCKS.items()} == {"README.md": 1, "docs/python.md": 5}
    assert not [page for page, text in PAGES.items() if "tif_jax.commands" in text]
    assert "tif_jax.load" not in FLAX_ALONE


def test_flax_and_orbax_alone_give_the_same_model(names):
    """In a process with one device, where the checkpoint was written from eight."""
    program = FLAX_ALONE + COMPARISON
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=names["folder"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_shapes_are_those_of_the_comments(names):
    num_patches = 9
    assert names["predict"](names["images"]).shape == names["logits"].shape == (2, 1000)
    assert names["impact"].shape == (2, num_patches)
    assert names["aux"]["kept"].shape == (2, round(num_patches / 2))
    assert names["table"].impact.shape == (6, 16)


def test_the_reducer_of_ones_own(names):
    mine, plain, images = names["mine"], names["model"], names["images"]
    kept = call(mine, images)[1]["kept"]
    assert kept.shape == (2, round(0.7 * 9))
    everything = tif_jax.load(names["folder"] / WEIGHTS, reducer="my_reducers.key_norm", keep_ratio=1.0)
    np.testing.assert_array_equal(everything(images)[0], plain(images)[0])
    keys = np.linalg.norm(
        np.asarray(plain.blocks[0].attend(plain.embed(images), plain.tokens(2))[1].key)[:, 1:], axis=(2, 3)
    )
    np.testing.assert_array_equal(kept, np.sort(np.argsort(-keys, axis=1)[:, :6], axis=1))


@pytest.mark.parametrize("name", ["my_reducers.no_such_file", "no_such_package.file", "my_reducers.empty"])
def test_a_reducer_that_is_not_there(names, name):
    (names["folder"] / "my_reducers" / "empty.py").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(names["folder"])
        with pytest.raises(tif_jax.InputError, match=f"in a module {name} that can be imported"):
            tif_jax.create_model(RUN, reducer=name)


def _write_files(folder: Path) -> None:
    tensors = random_timm_tensors(np.random.default_rng(0), width=64, depth=2, num_classes=1000)
    safetensors.numpy.save_file(tensors, WEIGHTS)
    for name in ("cat.jpg", "dog.jpg"):
        Image.new("RGB", (20, 30), "orange").save(name)
    run = folder / "runs/digits"
    options = {key: value for key, value in TIF.items() if key != "name"}
    _write_checkpoint(run / "backbone", tif_jax.create_model(RUN, seed=1), {"name": "full"})
    reduced = tif_jax.create_model(RUN, reducer="tif", seed=2, **options)
    for stage in ("filter", "finetune/tif-0.25-0"):
        _write_checkpoint(run / stage, reduced, TIF)
    records.write(run / "report.json", {"best": "finetune/tif-0.25-0"})
    _write_impact(run / "impact")


def _write_checkpoint(directory: Path, model, reducer: dict) -> None:
    with Checkpoints(directory / "checkpoints") as checkpoints:
        params = replicate(params_of(model), make_mesh(8))
        for step in (9, 10):  # the newest is not the last in alphabetical order
            saved = params if step == 10 else jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), params)
            checkpoints.save(State(np.int32(step), saved, ()), {"model": RUN, "reducer": reducer}, {})
            checkpoints.wait()


def _write_impact(directory: Path) -> None:
    manifest = Manifest(
        num_examples=6, num_images=6, num_tokens=16, views=1, num_parts=1, estimator={"name": "exact"}, mask="drop",
        target="label", data={"name": "digits", "split": "train"}, image_size=[16, 16], preprocessing={}, backbone="",
        versions={},
    )  # fmt: skip
    open_manifest(directory, manifest)
    index = np.arange(6)
    columns = dict(index=index, view=0 * index, id=[str(i) for i in index], label=index, prediction=index)
    columns |= dict(loss=np.ones(6, np.float32), impact=np.ones((6, 16), np.float32))
    shards.write_part(directory, 1, 1, columns)
