"""Weights by their name on the hub: fetched once, pinned to a commit, read again without it; what is missing is told."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants as constants
import jax
import numpy as np
import pytest
import safetensors.numpy
from cases import lively
from fake_hub import serving
from reference import random_timm_tensors
from small_project import forget_handlers
from torch_bytes import write_state_dict

import tif_jax
from tif_jax.__main__ import main
from tif_jax.errors import InputError, WorkError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.stages import train
from tif_jax.models import built_with
from tif_jax.models.params import params_of
from tif_jax.weights import hub as names

SIZE = dict(width=32, depth=1, patch_size=8, grid=(2, 2), num_classes=3)
CONFIG = {
    "architecture": "vit_of_mine", "num_classes": 3, "num_features": 32, "global_pool": "token",
    "model_args": {"num_heads": 4}, "label_names": ["cat", "cow", "dog"],
    "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}  # fmt: skip
NAME = "timm/vit_of_mine.in1k"
FIELDS = dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=3)


# What the library's upload over HTTP says of itself; the hub's own protocol, Xet, is switched off here.
uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def tensors(seed=0):
    return random_timm_tensors(np.random.default_rng(seed), **SIZE)


def files_of(seed=0, **others):
    return {
        "config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors.numpy.save(tensors(seed)),
        "README.md": b"#", "onnx/model.onnx": b"0", **others,
    }  # fmt: skip


def kernel(model):
    return np.asarray(params_of(model)["block_0"]["mlp"]["up"]["kernel"])


def is_of(model, seed):
    return np.array_equal(kernel(model), tensors(seed)["blocks.0.mlp.fc1.weight"].T)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.first = hub.commit(NAME, files_of())
        yield hub
    forget_handlers()


def refused(message, call, *arguments, kind=InputError, **options):
    with pytest.raises(kind, match=message) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_loaded_by_name_once_and_then_without_the_hub(hub, monkeypatch):
    model = tif_jax.load(f"hf:{NAME}")
    assert is_of(model, 0) and model.class_names == ("cat", "cow", "dog") and model.preprocessing.mean == (0.5,) * 3
    assert model.block_0.attention.num_heads == 4
    assert model.origin == f"hf:{NAME}@{hub.first}"
    assert not [request for request in hub.requests if request.endswith(("README.md", "onnx"))]
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = tif_jax.from_pretrained(NAME, reducer="random", keep_ratio=0.5)
    of_file = tif_jax.from_pretrained(names.folder_of(f"hf:{NAME}") / "model.safetensors")
    assert is_of(of_file, 0) and is_of(again, 0) and again.origin == model.origin and not hub.requests


def test_main_moves_and_a_revision_does_not(hub):
    tif_jax.load(f"hf:{NAME}")
    second = hub.commit(NAME, files_of(1))
    moved, pinned = tif_jax.load(f"hf:{NAME}"), tif_jax.from_pretrained(NAME, hub.first)
    assert (is_of(moved, 1), moved.origin) == (True, f"hf:{NAME}@{second}")
    assert (is_of(pinned, 0), pinned.origin) == (True, f"hf:{NAME}@{hub.first}")
    assert names.pinned(f"hf:{NAME}") == moved.origin and names.pinned(pinned.origin) == pinned.origin
    (names.folder_of(pinned.origin) / "config.json").unlink()  # as if that had been cut short
    assert tif_jax.load(pinned.origin).preprocessing.mean == (0.5,) * 3


def test_what_another_library_left_out_is_fetched(hub):
    """HF transformers' models load without the file that says how images are prepared."""
    said = {"config.json": b'{"model_type": "vit"}', "preprocessor_config.json": b"{}"}
    pinned = f"hf:me/theirs@{hub.commit('me/theirs', files_of() | said)}"
    prepared = names.folder_of(pinned) / "preprocessor_config.json"
    hub.requests.clear()
    assert names.folder_of(pinned) == prepared.parent and not hub.requests
    prepared.unlink()
    assert names.folder_of(pinned) == prepared.parent and prepared.is_file()


def test_an_interrupted_download_is_made_good(hub):
    """The library asks for the rest, at once or, where it has given up, when the same is called again."""
    hub.cut = 1000
    try:
        model = tif_jax.load(f"hf:{NAME}")
    except WorkError as error:
        assert "run the same command again: a download goes on where it stopped" in str(error)
        model = tif_jax.load(f"hf:{NAME}")
    assert is_of(model, 0) and hub.cut is None


def test_weights_in_shards(hub):
    content = sorted(tensors().items())
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(content[i::2]) for i in (0, 1)}
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    files = {file: safetensors.numpy.save(part) for file, part in shards.items()}
    described = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors.index.json": json.dumps(index).encode()}
    hub.commit("me/sharded", {**files, **described})
    assert is_of(tif_jax.load("hf:me/sharded"), 0)
    folder = Path(shutil.copytree(names.folder_of("hf:me/sharded"), "by_hand"))
    assert is_of(tif_jax.load(folder), 0)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(r"names shards that are not beside it: model-00002-of-00002.safetensors; download", tif_jax.load, folder)
    index["weight_map"]["more"] = "../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"index.json is damaged .*a shard is no .safetensors file beside it", tif_jax.load, folder)


def test_pytorchs_file_where_there_is_no_other(hub, tmp_path):
    weights = write_state_dict(tmp_path / "w.bin", tensors()).read_bytes()
    hub.commit("me/old", {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": weights})
    assert is_of(tif_jax.load("hf:me/old"), 0)
    hub.commit("me/other", {"config.json": b"{}", "tf_model.h5": b"0"})
    refused("hf:me/other has no weights that are read here", tif_jax.load, "hf:me/other")


def test_a_damaged_file_of_the_cache_is_named(hub):
    weights = names.folder_of(f"hf:{NAME}") / "model.safetensors"
    blob = weights.resolve()
    blob.write_bytes(blob.read_bytes()[:500])
    message = refused(r"model.safetensors is damaged", tif_jax.load, f"hf:{NAME}")
    assert f"delete {blob}, then download it again" in message
    blob.unlink()
    assert is_of(tif_jax.load(f"hf:{NAME}"), 0)


def test_what_is_not_there_or_may_not_be_read(hub, monkeypatch):
    refused("'hf:' is no name on the hub; it is hf:OWNER/NAME", tif_jax.load, "hf:")
    refused("'hf://a/b' is no name on the hub", tif_jax.load, "hf://a/b")
    refused("'hf:a--b/c' is no name on the hub", tif_jax.load, "hf:a--b/c")
    message = refused("there is no hf:me/none, or it is private", tif_jax.load, "hf:me/none")
    assert f"{hub.address}/me/none; if it is yours, log in with `hf auth login`" in message
    hub.commit("me/secret", files_of())
    hub.denied = {"me/secret": "private", "me/terms": "gated"}
    refused("there is no hf:me/secret, or it is private", tif_jax.load, "hf:me/secret")
    hub.commit("me/terms", files_of())
    refused("hf:me/terms is gated: accept its terms at http.*/me/terms, then log in", tif_jax.load, "hf:me/terms")
    refused(f"hf:{NAME}@v9: there is no such revision; give a branch", tif_jax.load, f"hf:{NAME}@v9")
    hub.broken = 503
    by_hand = refused(
        "hf:me/new can not be downloaded .http.* answers 503.*not in the cache", tif_jax.load, "hf:me/new"
    )
    assert "download config.json and model.safetensors" in by_hand
    assert f"from {hub.address}/me/new/tree/main into a folder, and give its path" in by_hand
    assert "cache/models--me--new from a machine that has it" in by_hand
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("hf:me/new can not be downloaded .HF_HUB_OFFLINE is set", tif_jax.load, "hf:me/new")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r'need huggingface_hub: pip install "tif_jax\[hub\]"', tif_jax.load, f"hf:{NAME}")


def test_the_program_takes_names(hub, capsys):
    assert main(["convert", f"hf:{NAME}", "a.safetensors", "--to=safetensors"]) == 0
    assert is_of(tif_jax.load("a.safetensors"), 0)
    assert main(["convert", f"hf:{NAME}", "b"]) == 0
    said = json.loads(next(Path("b").rglob("config/metadata")).read_text())
    assert said["config"]["init_from"] == f"hf:{NAME}@{hub.first}"
    assert main(["convert", "hf:me/none", "c"]) == 2
    assert "there is no hf:me/none" in capsys.readouterr().err


def test_a_config_says_which_commit(hub):
    """And goes on saying it: what is claimed for one commit is refused for the next."""
    settings = dict(
        data=dict(name="digits", image_size=16, num_train=8, num_test=8),
        backbone=dict(init_from=f"hf:{NAME}"),
        finetune=dict(distillation=dict(kind="soft", teacher=f"hf:{NAME}")),
    )
    experiment = config_file.from_settings(settings)
    assert experiment.backbone.init_from == experiment.finetune.distillation.teacher == f"hf:{NAME}@{hub.first}"
    assert experiment.data.mean == (0.5, 0.5, 0.5)
    train("backbone", experiment, Path("run"))
    claimed = json.loads(Path("run/backbone/config.json").read_text())
    assert claimed["init_from"] == f"hf:{NAME}@{hub.first}"
    train("backbone", config_file.from_settings(settings), Path("run"))
    hub.commit(NAME, files_of(1))
    moved = config_file.from_settings(settings)
    refused(rf"made with init_from 'hf:{NAME}@{hub.first}', not", train, "backbone", moved, Path("run"))


# Out


@uploads
def test_pushed_and_loaded_again(hub):
    model = lively(FIELDS, reducer="tif", keep_ratio=0.5, adapter=4)
    address = tif_jax.push_to_hub(model, "me/mine", private=True, license="mit", base_model=f"hf:{NAME}@{hub.first}")
    (commit,) = hub.repositories["me/mine"]
    assert address == f"{hub.address}/me/mine/commit/{commit}" and hub.private["me/mine"]
    again = tif_jax.load("hf:me/mine")
    jax.tree.map(np.testing.assert_array_equal, params_of(again), params_of(model))
    assert built_with(again)["reducer"] == built_with(model)["reducer"] and again.origin == f"hf:me/mine@{commit}"
    card = hub.repositories["me/mine"][commit]["README.md"].decode()
    assert 'tif_jax.load("hf:me/mine")' in card and "hf-hub:me/mine" in card
    assert f'base_model: "{NAME}"' in card and f"`{NAME}`, commit `{hub.first}`" in card
    tif_jax.push_to_hub(again, "me/mine")  # a second commit; what it was made from is known
    assert len(hub.repositories["me/mine"]) == 2
    assert 'base_model: "me/mine"' in hub.repositories["me/mine"][hub.at("me/mine", "main")[0]]["README.md"].decode()


@uploads
def test_a_push_leaves_nothing_of_an_earlier_one_that_would_be_read_with_it(hub):
    model = lively(FIELDS, reducer="tif", keep_ratio=0.5)
    tif_jax.push_to_hub(model, "me/mine")
    commits = hub.repositories["me/mine"]
    first = next(iter(commits))
    assert {"reducer.safetensors", "parameters.json"} < commits[first].keys()
    hub.commit("me/mine", {**commits[first], "notes.md": b"mine", "data/part-00000-of-00009.parquet": b"old"})
    tif_jax.push_to_hub(lively(FIELDS), "me/mine")
    left = hub.at("me/mine", "main")[1]
    assert left.keys() == {"README.md", "config.json", "model.safetensors", "parameters.json", "notes.md"}


def test_what_can_not_be_pushed(hub, monkeypatch):
    model = lively(FIELDS)
    for name in ("mine", "me/mine@v1", "me/../mine", ""):
        refused("is no (place to push to|name on the hub)", tif_jax.push_to_hub, model, name)
    refused("a ViT is no workdir: impacts are those of a workdir", tif_jax.push_to_hub, model, "me/a", impact=True)
    before = {hub.commit("me/open", {"notes.md": b"mine"})}
    refused("hf:me/open is there already and public", tif_jax.push_to_hub, model, "me/open", private=True)
    assert {*hub.repositories["me/open"]} == before
    hub.denied["me/theirs"] = "private"
    refused("hf:me/theirs: the hub refuses it .*with a token that may write", tif_jax.push_to_hub, model, "me/theirs")
    hub.broken = 404
    refused("hf:me/a: .*check the network", tif_jax.push_to_hub, model, "me/a", kind=WorkError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set", tif_jax.push_to_hub, model, "me/a")


@uploads
def test_the_program_shares(hub, finished, capsys):
    run = finished / "run"
    assert main(["share", f"--workdir={run}/backbone", "--to=model"]) == 0
    assert main(["share", f"--workdir={run}", "--impact", "--to=impact", "--license=cc0-1.0"]) == 0
    assert main(["share", f"--workdir={run}", "--impact", "--to=hf:me/impact", "--private"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.address}/datasets/me/impact/commit/")
    pushed = hub.at("datasets/me/impact", "main")[1]
    assert {*pushed} == {"data/part-00001-of-00001.parquet", "manifest.json", "README.md"}
    assert pushed["data/part-00001-of-00001.parquet"] == Path("impact/data/part-00001-of-00001.parquet").read_bytes()
    assert main(["share", f"--workdir={run}", "--to=nowhere", "--private"]) == 2
    assert "--private is for the hub" in capsys.readouterr().err
    assert main(["share", f"--workdir={run}/backbone", "--impact", "--to=nowhere"]) == 2
    assert "holds no impact shards" in capsys.readouterr().err and not Path("nowhere").exists()
