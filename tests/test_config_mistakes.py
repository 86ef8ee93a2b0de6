"""Every key of every section, misspelt and out of range, in the file and on the command line: refused at once."""

import math

import pytest
from small_project import CONFIG, last_line, tif

from tif_jax import checked
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.schema import Experiment

KEYS = {key.path: key for key in checked.keys(Experiment)}
SECTIONS = sorted({path.rpartition(".")[0] for path in KEYS})
# Keys that no ConfigDict holds as a plain value: they have tests of their own (test_entries.py).
WITHOUT_VALUE = ("reducer", "benchmark.reducers", "when_quick")


def outside(key):
    """Values that the key must not have."""
    low, high = key.range.least, key.range.most
    wrong = [object, float("nan")] if key.kind is float else [object]
    wrong += [low - 1] if low is not None else []
    wrong += [high + 1] if high is not None else []
    wrong += [key.range.above] if key.range.above is not None else []
    wrong += [key.range.below] if key.range.below is not None else []
    return wrong + ["no such choice"] * bool(key.range.choices)


def in_file(path, value):
    """Settings of a file in which one key has this value."""
    settings = {}
    config_file._put(settings, path, value)
    return settings


@pytest.mark.parametrize("path", KEYS)
def test_a_value_out_of_range_is_refused(path):
    key = KEYS[path]
    if path in WITHOUT_VALUE:
        return
    for value in outside(key):
        with pytest.raises(InputError) as error:
            config_file.from_settings(in_file(path, value))
        assert str(error.value).startswith(f"{path} is "), value
        if value is not object and not isinstance(key.default, tuple):
            with pytest.raises(InputError) as error:
                config_file.from_settings({}, [f"--config.{path}={value}"])
            assert str(error.value).startswith(f"{path} is "), value


@pytest.mark.parametrize("path", KEYS)
def test_a_misspelt_key_names_the_nearest(path):
    section, _, name = path.rpartition(".")
    misspelt = checked.dotted(section, name[:-1] + "qx")
    expected = f"config has no key '{misspelt}'; the nearest is '"
    for given in (lambda: config_file.from_settings(in_file(misspelt, 1)), lambda: by_command_line(f"{misspelt}=1")):
        with pytest.raises(InputError) as error:
            given()
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    near = checked.dotted(section, name + "_")
    with pytest.raises(InputError, match=f"the nearest is '{path}'"):
        by_command_line(f"{near}=1")


def by_command_line(assignment):
    return config_file.from_settings({}, [f"--config.{assignment}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(reducer=dict(name="tif", adaptor=8)), "no key 'reducer.adaptor'; the nearest is 'reducer.adapter'"),
        (dict(reducer=dict(name="evit", fuze=True)), "no key 'reducer.fuze'; the nearest is 'reducer.fuse'"),
        (dict(score=dict(viewz=2)), "no key 'score.viewz'; the nearest is 'score.views'"),
        (dict(finetunes=dict(num_epochs=1)), "no key 'finetunes'; the nearest is 'finetune'"),
        (dict(finetune=dict(phases=(dict(until=1, keep_ration=0.5),))), "keep_ration'; the nearest is"),
        (
            dict(backbone=dict(model=dict(depht=3))),
            "no key 'backbone.model.depht'; the nearest is 'backbone.model.depth'",
        ),
        (dict(backbone=dict(model=dict(depth=0))), "backbone.model.depth is 0; it is a whole number, at least 1"),
        (dict(backbone=dict(model=dict(family="levi"))), "backbone.model.family is 'levi'; allowed: 'vit', 'levit'"),
        (dict(finetune=dict(model=dict(drop_path=math.nan))), "finetune.model.drop_path is nan"),
        (dict(finetune=3), "finetune is 3; it is a dict of "),
        (
            dict(backbone=dict(batch_size=10, accumulate=3)),
            "backbone.accumulate is 3; it has to divide the batch_size 10",
        ),
        (dict(filter=dict(labels="quantile", rho=2.0)), "filter.rho is 2.0; with labels 'quantile' it is a fraction"),
        (
            dict(score=dict(estimator="gradient", target="teacher")),
            "score.estimator 'gradient' with target 'teacher' is",
        ),
        (
            dict(finetune=dict(distillation=dict(kind="hard", logits_weight=2.0))),
            "finetune.distillation.logits_weight is 2; with kind 'hard' at most 1",
        ),
        (dict(score=dict(views=2)), "score.views is 2, but data.augment 'none'"),
        (dict(finetune=dict(augmentation=dict(erase=0.2))), "finetune.augmentation is for views that are drawn anew"),
        (dict(sharding=dict(table=(("kernel", 0.5),))), "sharding.table is (('kernel', 0.5),); it is a tuple of "),
        (dict(data=dict(class_index=dict(cat="one"))), "data.class_index is {'cat': 'one'}; it is a dict or none"),
        (dict(reducer="tif", filter=dict(keep_ratio=1.0)), "filter.keep_ratio is 1"),
        (dict(reducer=dict(name="evitt")), "reducer: Unknown reducer 'evitt'"),
        (dict(seed=2**31 - 2, seeds=5), "seed is 2147483646; with seeds 5 it goes beyond"),
        (dict(when_quick=dict(finetune=dict(num_epoch=1))), "when_quick: config has no key 'finetune.num_epoch'"),
    ],
)
def test_mistakes_in_the_file(settings, message):
    with pytest.raises(InputError) as error:
        config_file.from_settings(settings)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("data.image_size=160,224", ("data", "image_size"), (160, 224)),
        ("data.image_size=(160, 224)", ("data", "image_size"), (160, 224)),
        ("data.image_size=96", ("data", "image_size"), 96),
        ("data.mean=0.5,0.5,0.5", ("data", "mean"), (0.5, 0.5, 0.5)),
        ("finetune.freeze=^norm,^head", ("finetune", "freeze"), ("^norm", "^head")),
        ("finetune.clip_norm=inf", ("finetune", "clip_norm"), math.inf),
        ("finetune.rate_factors=(('^reducer/', 10.0, 2),)", ("finetune", "rate_factors"), (("^reducer/", 10.0, 2),)),
        ("finetune.remat=true", ("finetune", "remat"), True),
        ("filter.keep_ratio=none", ("filter", "keep_ratio"), None),
        ("score.part=3/64", ("score", "part"), "3/64"),
        ("backbone.model.depth=3", ("backbone", "model"), {"depth": 3}),
        ("finetune.learning_rate=1", ("finetune", "learning_rate"), 1.0),
    ],
)
def test_texts_of_the_command_line(assignment, path, value):
    section, name = path
    found = getattr(getattr(by_command_line(assignment), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("path", ["finetune", "finetune.mixing", "sharding"])
def test_a_section_is_set_key_by_key(path):
    with pytest.raises(InputError, match=f"^{path} is a section of the config: set its keys one by one, as in "):
        by_command_line(f"{path}=3")


def test_a_mistake_in_the_file_is_told_though_the_command_line_sets_something():
    for settings in (dict(backbone="x"), dict(backbone=dict(model="x")), dict(data="x"), dict(reducer=dict(name=5))):
        with pytest.raises(InputError):
            config_file.from_settings(settings, ["--config.seed=3"])


def test_the_ways_to_set_a_value():
    ways = (["--config.seed=3"], ["--config.seed", "3"], ["-config.seed=3"])
    assert {config_file.from_settings({}, way).seed for way in ways} == {3}
    assert not config_file.from_settings({"quick": True}, ["--noconfig.quick"]).quick
    with pytest.raises(InputError, match=r"--config\.seed has no value"):
        config_file.from_settings({}, ["--config.seed"])


@pytest.mark.parametrize(
    "section", [section for section in SECTIONS if section and not section.startswith(("backbone.", "finetune."))]
)
def test_the_program_ends_with_2_and_one_line(section, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    path = next(path for path in KEYS if path.startswith(f"{section}.") and KEYS[path].range.least is not None)
    for assignment, named in ((f"{path}=-9", f"{path} is -9"), (f"{path}z=1", f"the nearest is '{path}'")):
        assert tif(f"train --stage=backbone --config.{assignment}") == 2
        assert named in last_line(capsys)
    name = path.rpartition(".")[2]
    for wrong, named in ((f"{name}=-9", f"{path} is -9"), (f"{name}z=1", f"the nearest is '{path}'")):
        changed = f"    config = made()\n    config.{section} = dict({wrong})\n    return config\n"
        (tmp_path / "config.py").write_text(CONFIG.replace("get_config", "made") + f"\ndef get_config():\n{changed}")
        assert tif("train --stage=backbone") == 2
        assert named in last_line(capsys)
    assert not list(tmp_path.glob("run/*"))
