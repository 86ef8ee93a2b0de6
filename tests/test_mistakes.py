"""What a user can do wrong, as the user sees it: the program's last line and exit status."""

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from reference import random_timm_tensors
from small_project import CONFIG, contents, last_line, tif

from tif_jax.__main__ import main
from tif_jax.runtime import records

# Preparations: what the user, or somebody before, did to the folder


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_text(content)


def removed(name: str) -> Callable[[Path], None]:
    return lambda place: shutil.rmtree(place / name)


def class_folders(place):
    for split in ("train", "test"):
        (place / "images" / split / "cat").mkdir(parents=True)
        (place / "images" / split / "dog").mkdir()
        shutil.copy(place / "data" / "0.png", place / "images" / split / "cat")


def three_class_folders(place):
    for name in ("cat", "cow", "dog"):
        (place / "images" / "train" / name).mkdir(parents=True)
        shutil.copy(place / "data" / "0.png", place / "images" / "train" / name)


def truncated_jpeg(place):
    Image.open(place / "data" / "3.png").save(place / "data" / "cut.jpg")
    data = (place / "data" / "cut.jpg").read_bytes()
    (place / "data" / "cut.jpg").write_bytes(data[: len(data) // 2])
    table = (place / "data" / "train.csv").read_text()
    (place / "data" / "train.csv").write_text(table.replace("3.png", "cut.jpg"))


def label_7(place):
    table = (place / "data" / "train.csv").read_text()
    (place / "data" / "train.csv").write_text(table.replace("7.png,1", "7.png,7"))


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def prepare(place):
        rng = np.random.default_rng(0)
        tensors = random_timm_tensors(rng, width=16, depth=1, patch_size=8, grid=(2, 2), num_classes=2)
        change(tensors)
        safetensors.numpy.save_file(tensors, place / "weights.safetensors")

    return prepare


def pickle_with_code(place):
    class Code:
        def __reduce__(self):
            return Path.touch, (Path("proof"),)

    with zipfile.ZipFile(place / "weights.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Code()}))


def another_backbone(place):
    manifest = place / "run" / "impact" / "manifest.json"
    manifest.write_bytes(records.text(records.read(manifest) | {"backbone": "0123"}))


class Mistake(NamedTuple):
    line: str
    named: tuple[str, ...]  # what the message must say
    prepare: Callable[[Path], object] = lambda place: None


_IMPORT = "train --stage backbone --workdir=new --config.backbone.num_heads=2 --config.backbone.init_from="

MISTAKES = {
    # the command line
    "a reducer that the backbone to be trained does not fit": Mistake(
        "run --workdir=new --config.backbone.model.pool=mean --config.backbone.model.class_token=false "
        "--config.benchmark.reducers=evit",
        ("evit ranks patches by the attention of the class token", "this model has none"),
    ),
    "unknown command": Mistake("scroe", ("no command 'scroe'", "'score'", "tif --help")),
    "unknown flag": Mistake("score --fast", ("unknown flag --fast", "`tif score --help`")),
    "stray word": Mistake("score cat.jpg", ("unexpected 'cat.jpg'", "--config.KEY=VALUE")),
    "no stage": Mistake("train", ("--stage", "required", "`tif train --help`")),
    "unknown stage": Mistake("train --stage=head", ("--stage", "'head'", "backbone", "filter", "finetune")),
    # the config
    "no such config": Mistake("score --config=confg.py", ("no config file confg.py",)),
    "config is a folder": Mistake("score --config=data", ("no config file data",)),
    "config of another kind": Mistake("score --config=data/train.csv", ("data/train.csv", "not a Python file")),
    "config does not parse": Mistake("score", ("config.py", "line 1"), text("config.py", "seed: 0: 1")),
    "config raises": Mistake("score", ("config.py", "no GPU"), text("config.py", "raise RuntimeError('no GPU')")),
    "no get_config": Mistake("score", ("config.py", "get_config"), text("config.py", "seed = 0")),
    "get_config returns a dict": Mistake(
        "score", ("config.py", "dict", "ConfigDict"), text("config.py", "def get_config():\n    return dict(seed=0)")
    ),
    "when_quick with a key misspelt": Mistake(
        "score",
        ("when_quick: ", "'score.num_sample'", "'score.num_samples'"),
        text("config.py", CONFIG.replace("when_quick=dict()", "when_quick=dict(score=dict(num_sample=1))")),
    ),
    "unknown argument of a config": Mistake("score --config=config.py:huge", ("config.py:huge", "argument")),
    "key misspelt": Mistake("score --config.data.crop_fracton=0.9", ("'data.crop_fracton'", "'data.crop_fraction'")),
    "value of another type": Mistake("score --config.seed=abc", ("seed", "abc")),
    "value of another type after a space": Mistake("score --config.seed abc", ("seed", "abc")),
    "unknown kind of distillation": Mistake(
        "train --stage=finetune --config.finetune.distillation.kind=warm",
        ("finetune.distillation.kind is 'warm'", "'soft', 'hard'"),
    ),
    "dict in a recipe with a key misspelt": Mistake(
        "train --stage=backbone",
        ("'finetune.mixing.cutmx'", "'finetune.mixing.cutmix'"),
        text("config.py", CONFIG.replace("finetune=dict(recipe, ", "finetune=dict(recipe, mixing=dict(cutmx=1.0), ")),
    ),
    "mixing that is none": Mistake(
        "score --config.finetune.mixing.switch=2.0", ("finetune.mixing.switch is 2.0", "at least 0, at most 1")
    ),
    "unknown RandAugment": Mistake(
        "score --config.backbone.augmentation.rand_augment=m9-foo", ("backbone", "rand_augment", "m9-foo")
    ),
    "batch in parts that do not divide it": Mistake(
        "train --stage=backbone --config.backbone.accumulate=3", ("backbone.accumulate is 3", "batch_size 8")
    ),
    "no steps between checkpoints": Mistake("score --config.filter.save_every=0", ("filter.save_every is 0",)),
    "average that forgets nothing": Mistake("score --config.finetune.ema=1.0", ("finetune.ema is 1.0", "below 1")),
    "pattern for a tuple of them": Mistake(
        "score", ("finetune.freeze is '^norm'", "('^norm',)"),
        text("config.py", CONFIG.replace("finetune=dict(recipe, ", "finetune=dict(recipe, freeze='^norm', ")),
    ),
    "factor without a pattern": Mistake(
        "score", ("finetune.rate_factors has the entry 0.1", "(pattern, factor, epoch)"),
        text("config.py", CONFIG.replace("finetune=dict(recipe, ", "finetune=dict(recipe, rate_factors=(0.1,), ")),
    ),
    "pattern that matches nothing": Mistake(
        "train --stage=backbone --workdir=new --config.backbone.freeze=('^hed',)", ("no parameter path matches", "hed"),
    ),
    "devices that do not divide the batch": Mistake(
        "train --stage=backbone --workdir=new --config.sharding.fsdp=3", ("a batch of 8", "sharding.fsdp 3"),
    ),
    "unknown dtype": Mistake("train --stage=backbone --workdir=new --config.dtype=float23", ("float23",)),
    # the workdir
    "workdir below a file": Mistake("score --workdir=config.py/run", ("config.py/run", "choose another")),
    "impact scored with another seed": Mistake(
        "score --config.seed=1", ("run/impact", "estimator.seed is 0 there, 1 here", "another --workdir")
    ),
    "stage made with another recipe": Mistake(
        "train --stage=backbone --config.backbone.learning_rate=0.5",
        ("run/backbone", "recipe.learning_rate 0.001, not 0.5", "another --workdir"),
    ),
    "record is damaged": Mistake(
        "train --stage=backbone", ("run/backbone/config.json", "damaged"), text("run/backbone/config.json", '{"model":')
    ),
    # the data
    "unknown data set": Mistake(
        "train --stage=backbone --workdir=new --config.data.name=mnist", ("data.name", "'mnist'", "image_folder")
    ),
    "no data root": Mistake(
        "train --stage=backbone --workdir=new --config.data.name=image_folder --config.data.root=photos",
        ("data.root photos", "root/split/class"),
    ),
    "empty class folder": Mistake(
        "train --stage=backbone --workdir=new --config.data.name=image_folder --config.data.root=images"
        " --config.data.train_split=train",
        ("no images in images/train/dog", "remove it"),
        class_folders,
    ),
    "more classes than the model has": Mistake(
        "train --stage=backbone --workdir=new --config.data.name=image_folder --config.data.root=images"
        " --config.data.train_split=train",
        ("labels up to 2", "classes 0..1"),
        three_class_folders,
    ),
    "label out of range": Mistake("score --workdir=run", ("labels up to 7", "classes 0..1"), label_7),
    "truncated photograph": Mistake(
        "train --stage=backbone --workdir=new", ("cut.jpg", "Truncated", "data.on_error='skip'"), truncated_jpeg
    ),
    # pretrained weights
    "no weight file": Mistake(_IMPORT + "weights.safetensors", ("weights.safetensors", ".pth")),
    "pickle with code in it": Mistake(
        _IMPORT + "weights.pth", ("weights.pth", "Path.touch", "weights_only"), pickle_with_code
    ),
    "weights are NaN": Mistake(
        _IMPORT + "weights.safetensors",
        ("weights.safetensors", "NaN", "head.weight"),
        weights(lambda tensors: tensors["head.weight"].fill(np.nan)),
    ),
    "weights of other shapes": Mistake(
        _IMPORT + "weights.safetensors",
        ("weights.safetensors", "blocks.0.attn.qkv.weight", "(40, 16)"),
        weights(lambda tensors: tensors.update({"blocks.0.attn.qkv.weight": np.zeros((40, 16), np.float32)})),
    ),
    # impact
    "score before the backbone": Mistake("score --workdir=new", ("new/backbone", "no checkpoint")),
    "part beyond the parts": Mistake("score --config.score.part=5/4", ("score.part", "'5/4'", "K/N")),
    "process beyond the processes": Mistake("score --process_id=2 --num_processes=2", ("--process_id is 2", "from 0")),
    "no coordinator": Mistake("score --num_processes=2", ("--coordinator=HOST:PORT", "go together")),
    "no images in a batch": Mistake("score --config.score.batch_size=0", ("score.batch_size is 0", "at least 1")),
    "negative chunk": Mistake("score --config.score.chunk=-1", ("score.chunk is -1", "at least 0")),
    "dtype of scoring": Mistake("score --config.score.dtype=float15", ("float15", "bfloat16")),
    "no views": Mistake("score --config.score.views=0", ("score.views", "0", "at least 1")),
    "filter before score": Mistake("train --stage=filter", ("no impact", "tif score"), removed("run/impact")),
    "impact of another backbone": Mistake(
        "train --stage=filter", ("run/impact", "backbone is '0123' there"), another_backbone
    ),
    "impact of another view": Mistake(
        "train --stage=filter --config.data.crop_fraction=0.5",
        ("run/impact", "crop_fraction is 1.0 there, 0.5 here"),
    ),
    # filter and fine-tuning
    "keep nothing": Mistake("train --stage=filter --config.reducer.keep_ratio=0", ("keep_ratio", "0", "(0, 1]")),
    "keep too much": Mistake("train --stage=filter --config.reducer.keep_ratio=1.5", ("keep_ratio", "1.5", "(0, 1]")),
    "keep too much, far down the pipeline": Mistake(
        "run --workdir=new --config.reducer.keep_ratio=1.5", ("keep_ratio", "1.5", "(0, 1]")
    ),
    "unknown reducer": Mistake("train --stage=filter --config.reducer.name=tof", ("reducer", "'tof'", "tif")),
    "unknown labels": Mistake(
        "train --stage=filter --config.filter.labels=best", ("filter.labels", "'best'", "'top', 'above', 'quantile'")
    ),
    "no token is worth keeping": Mistake(
        "train --stage=filter --config.filter.labels=above --config.filter.rho=1e9", ("0%", "filter.rho", "another rho")
    ),
    "more parts than rows, one that has some": Mistake(
        "score --config.score.part=1/64 --workdir=run", ("score.part is '1/64'", "only 8 rows", "fewer parts")
    ),
    "more parts than rows, one that has none": Mistake(
        "score --config.score.part=64/64 --workdir=run", ("score.part is '64/64'", "only 8 rows", "fewer parts")
    ),
    "fine-tune before the backbone": Mistake(
        "train --stage=finetune --workdir=new --config.reducer.name=full", ("new/backbone", "no checkpoint")
    ),
    "fine-tune before the filter": Mistake("train --stage=finetune", ("run/filter", "no checkpoint")),
    "evaluate a run that does not exist": Mistake(
        "evaluate --config.seed=9", ("run/finetune/tif-0.5-9", "no checkpoint")
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_one_line_and_nothing_lost(place, capsys, mistake):
    mistake.prepare(place)
    capsys.readouterr()
    before = contents(place)
    assert tif(mistake.line) == 2
    line = last_line(capsys)
    assert not [word for word in mistake.named if word not in line], line
    after = contents(place)
    changed = [path for path in before if after.get(path) != before[path]]
    assert all(path.name == "log.txt" and after[path].startswith(before[path]) for path in changed)
    assert not list(place.glob("new/*/checkpoints/[0-9]*"))  # no work was done before the mistake was found
    assert not (place / "proof").exists()  # where the pickle's code would have left its mark


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["score", "--workdir=run"], "required: --config"),
        (["score", "--config=config.py"], "required: --workdir"),
    ],
)
def test_flag_is_missing(place, capsys, words, named):
    assert main(words) == 2
    assert named in last_line(capsys)


def test_no_command_shows_how(capsys):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.startswith("usage: tif COMMAND") and "  score " in shown.err
