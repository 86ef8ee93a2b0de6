"""A model as a folder that others read: bit for bit with its reducer, by plain Flax, by timm; and what its card says."""

import json
import logging
import re
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
import yaml
from cases import lively, mostly_long, numpy_images
from flax import nnx

import tif_jax
from tif_jax.__main__ import main
from tif_jax.data.preprocess import Preprocessing
from tif_jax.errors import InputError
from tif_jax.models import built_with
from tif_jax.models.fresh_heads import with_fresh_heads
from tif_jax.models.params import params_of
from tif_jax.runtime import records
from tif_jax.sharing import card
from tif_jax.training.checkpoints import identity, newest, read_config

TINY = dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3)
HOW = Preprocessing(crop_fraction=0.9, mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 0.5), interpolation="bilinear")
NAMES = ("cat", "cow", "dog")
LEVIT = dict(family="levit", image_size=32, widths=(16, 24), depths=(1, 1), num_heads=(2, 3), key_dim=8, num_classes=3)
MODELS = {
    "plain": TINY,
    "mean": TINY | dict(pool="mean", class_token=False, norm_eps=1e-2),
    "normed mean": TINY | dict(pool="normed_mean", gelu="tanh", layer_scale=0.1, qk_norm=True),
    "distilled": TINY | dict(distillation_token=True),
    "registers": TINY | dict(num_registers=2, special_positions=False, qkv_bias=False, mlp_dim=24),
    "CLIP": TINY | dict(pre_norm=True, gelu="quick", norm_eps=1e-5),
    "SigLIP": TINY | dict(pool="attention", class_token=False),
    "RoPE-ViT": TINY | dict(rotary="rope_vit"),  # whose tensors are those of a plain one
    "whole last block": TINY | dict(lean_last_block=False),
    "levit": LEVIT | dict(activation="silu"),
}  # fmt: skip


def logits(model):
    return jax.jit(lambda x: model(x)[0])(numpy_images(2, model.image_size))


def made(fields, **reducer):
    model = lively(fields, **reducer)
    model.preprocessing, model.class_names = HOW, NAMES
    return model


def assert_same(model, other):
    """Every parameter, and what no parameter tells."""
    jax.tree.map(np.testing.assert_array_equal, params_of(model), params_of(other))
    built, again = (built_with(each) for each in (model, other))
    unsaid = {"mlp_dim", "layer_scale"}  # which the shapes say
    assert {**again["model"], **{key: built["model"][key] for key in unsaid & built["model"].keys()}} == built["model"]
    assert (again["reducer"], other.preprocessing, other.class_names) == (built["reducer"], HOW, NAMES)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_read_back_bit_for_bit(tmp_path, fields, caplog):
    model = made(fields)
    folder = tif_jax.save_pretrained(model, tmp_path / "a" / "b")
    assert_same(model, tif_jax.load(folder))
    assert_same(model, tif_jax.load(folder / "model.safetensors"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_converted_from_it_has_no_reducer(tmp_path, capsys):
    for name, options in (("tif", dict(keep_ratio=0.5)), ("tome", dict(num_merged=1))):
        tif_jax.save_pretrained(made(TINY, reducer=name, **options), tmp_path / name)
        file = tmp_path / f"{name}.safetensors"
        assert main(["convert", str(tmp_path / name), str(file), "--to", "safetensors"]) == 0
        assert_same(made(TINY), tif_jax.load(file))


def test_no_other_positions_than_those_of_the_file(tmp_path):
    """They have no parameters, so that nothing else would notice."""
    folder = tif_jax.save_pretrained(made(MODELS["RoPE-ViT"]), tmp_path / "a")
    with pytest.raises(InputError, match=r"rotary='eva02' contradicts .*which says 'rope_vit'"):
        tif_jax.load(folder, rotary="eva02")


@pytest.mark.parametrize(
    "reducer",
    mostly_long(
        [
            dict(reducer="tif", keep_ratio=0.5, adapter=4, then=dict(name="evo_vit", keep_ratio=0.5)),
            dict(reducer="dynamic_vit", budget=1e-4, sites=(1,)),
            dict(reducer="tome", num_merged=1),
        ],
        short=(0, 2),
    ),
    ids=lambda reducer: reducer["reducer"],
)
def test_the_reducer_goes_with_it(tmp_path, reducer):
    model = made(TINY, **reducer)
    folder = tif_jax.save_pretrained(model, tmp_path / "shared")
    assert_same(model, tif_jax.load(folder))
    assert (folder / "reducer.safetensors").exists() == (reducer["reducer"] != "tome")
    assert_same(made(TINY), tif_jax.load(folder, reducer="full"))


def test_a_head_of_ones_own_is_told(tmp_path):
    """As `tif_jax.fit` gives models."""
    model = with_fresh_heads(made(TINY | dict(distillation_token=True)), 5, seed=0)
    folder = tif_jax.save_pretrained(model, tmp_path / "shared")
    told = json.loads((folder / "config.json").read_text())
    assert told["num_classes"] == told["tif_jax"]["model"]["num_classes"] == 5 and "label_names" not in told
    model.class_names = NAMES  # which the file has none of
    again = tif_jax.load(folder)
    again.class_names = NAMES
    assert_same(model, again)


def test_plain_flax_reads_it(tmp_path, monkeypatch):
    model = made(TINY, reducer="tif", keep_ratio=0.5, adapter=4)
    folder = tif_jax.save_pretrained(model, tmp_path / "shared")
    # What the card says of Flax without tif_jax.load is true.
    (code,) = re.findall(r"```python\n(import json\n.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    monkeypatch.delattr(tif_jax, "load")
    read = {}
    exec(code, read)
    np.testing.assert_array_equal(logits(read["model"]), logits(model))


def test_flax_reads_a_levit(tmp_path, monkeypatch):
    """Convolutions and batch statistics, too."""
    model = made(LEVIT)
    folder = tif_jax.save_pretrained(model, tmp_path / "shared")
    where = json.loads((folder / "parameters.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {name for name, _, _ in where.values()} == tensors.keys()
    stem = model.stem.layer_0.conv.kernel[...]
    name, axes, shape = where["stem/layer_0/conv/kernel"]
    np.testing.assert_array_equal(tensors[name].transpose(axes).reshape(shape), stem)
    assert name == "stem.conv1.linear.weight" and where["stem/layer_0/norm/var"][0] == "stem.conv1.bn.running_var"


def test_timm_reads_the_backbone(tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    levit = dict(family="levit", image_size=64, num_classes=3)
    for name, fields in {**MODELS, "levit": levit}.items():
        model = made(fields)
        folder = tif_jax.save_pretrained(model, tmp_path / name)
        if fields.get("norm_eps") == 1e-2 or fields.get("rotary"):  # no argument of timm's says it
            assert "architecture" not in json.loads((folder / "config.json").read_text())
            continue
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        images = numpy_images(2, model.image_size)
        with torch.no_grad():
            expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        np.testing.assert_allclose(logits(model), expected, rtol=2e-5, atol=1e-4)
        how = timm.data.resolve_data_config({}, model=theirs)
        assert (*map(tuple, (how["mean"], how["std"])), how["crop_pct"], how["interpolation"]) == (
            HOW.mean,
            HOW.std,
            0.9,
            "bilinear",
        )


def test_files_that_do_not_belong_together(tmp_path):
    folders = [
        tif_jax.save_pretrained(made(TINY, reducer="tif", adapter=width), tmp_path / f"{width}") for width in (4, 8)
    ]
    shutil.copy(folders[1] / "reducer.safetensors", folders[0])
    with pytest.raises(
        InputError, match=r"reducer.safetensors is not what was saved with model.safetensors; copy both"
    ):
        tif_jax.load(folders[0])
    (folders[0] / "reducer.safetensors").unlink()
    with pytest.raises(InputError, match=r"was saved with a reducer, whose reducer.safetensors is not beside it"):
        tif_jax.load(folders[0])
    assert tif_jax.load(folders[0], reducer="random", keep_ratio=0.5).class_names == NAMES


def test_what_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="exists already; choose another name"):
        tif_jax.save_pretrained(made(TINY), tmp_path)
    for source in (3, "hf:me/mine"):
        with pytest.raises(InputError, match="is no workdir: give the path of one, or a model"):
            tif_jax.save_pretrained(source, tmp_path / "a")
    with pytest.raises(InputError, match="is no workdir: impacts are those of a workdir"):
        tif_jax.save_impact(made(TINY), tmp_path / "a")
    with pytest.raises(InputError, match="does not say what it was built with"):
        tif_jax.save_pretrained(tif_jax.models.ViT(**TINY, rngs=nnx.Rngs(0)), tmp_path / "a")
    with pytest.raises(InputError, match=r"no checkpoint in .*nowhere"):
        tif_jax.save_pretrained(tmp_path / "nowhere", tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_the_card_of_a_run(place):
    stage = place / "run" / "backbone"
    digest = identity(read_config(newest(stage / "checkpoints")))
    checkpoint, other = {"checkpoint": digest}, {"checkpoint": {**digest, "digest": "0" * 64}}
    records.write(stage / "metrics.json", {**checkpoint, "top1": 0.625, "num_images": 8, "gmac": 1.25})
    row = {**checkpoint, "label": "full", "top1_before": 0.25}
    records.write(place / "run" / "report.json", {"rows": [row], "best": "backbone", "versions": {"jax": "0.0.1"}})
    speed = {"label": "full", "batch_size": 8, "dtype": "float32", "images_per_second": 123.4}
    records.write(place / "run" / "benchmark.json", {"rows": [speed], "device": "1 x cpu"})
    text = (tif_jax.save_pretrained("run", "a", license="cc0-1.0", base_model="hf:me/it@v1") / "README.md").read_text()
    for said in (
        "| top-1 | 62.5 % of 8 test images |", "| top-1 before fine-tuning | 25.0 % |", "| cost | 1.25 GMAC",
        "| speed | 123 images/s at batch size 8 in float32 on 1 x cpu |", "With jax 0.0.1.", "`data` (image_table)",
        'license: "cc0-1.0"', 'base_model: "me/it"', "`me/it`, commit `v1`", 'library_name: "tif_jax"',
    ):  # fmt: skip
        assert said in text
    assert str(place) not in text and yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "image-classification"
    records.write(stage / "metrics.json", {**other, "top1": 0.625, "num_images": 8})
    records.write(place / "run" / "report.json", {"rows": [{**row, **other}], "best": "backbone"})
    text = (tif_jax.save_pretrained("run", "b") / "README.md").read_text()
    assert "no run's figures belong to these weights" in text and "license" not in text


def test_the_card_says_how_images_were_divided():
    data = dict(name="image_folder", root="birds", train_split=".", test_split=".", test_fraction=0.2)
    assert card._data(data).startswith(
        "`birds` (image_folder), 20% of each class kept for the test, the rest trained on."
    )
    assert "trained and tested on." in card._data(data | dict(test_fraction=0.0))
    assert "trained on `train`, tested on `val`." in card._data(data | dict(train_split="train", test_split="val"))


def test_impacts_as_a_data_set(finished, tmp_path):
    """Anybody's Parquet reader has the numbers of `read_impact`; the card says what they are."""
    run = finished / "run"
    folder = tif_jax.save_impact(run, tmp_path / "set", license="cc0-1.0")
    table, expected = pyarrow.parquet.read_table(folder / "data"), tif_jax.read_impact(run)
    for column, values in vars(expected).items():
        np.testing.assert_array_equal(np.stack(table[column].to_numpy()), values)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == json.loads((run / "impact" / "manifest.json").read_text())
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc0-1.0" and front["configs"][0]["data_files"][0]["path"] == "data/part-*.parquet"
    explained = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert explained == table.column_names
    for said in (
        "4 patch tokens (2 x 2,",
        manifest["backbone"],
        manifest["data"]["examples"],
        "8 images",
        "num_samples 2",
    ):
        assert said in text
    with pytest.raises(InputError, match="holds no impact shards"):
        tif_jax.save_impact(run / "backbone", tmp_path / "none")
