"""The files in configs/: whether they load, fit what reads them, and say what the papers' logs and scripts say."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import mostly_long
from flax import nnx
from flax.traverse_util import flatten_dict

from tif_jax.errors import InputError
from tif_jax.experiment import checks
from tif_jax.experiment import config as config_file
from tif_jax.experiment.reducer_entry import phases_of
from tif_jax.models import blueprint, model_fields
from tif_jax.models.params import params_of
from tif_jax.training import optim

FOLDER = Path(__file__).parents[1] / "configs"
WITH_ARGUMENTS = {
    "bat.py": ("300", "30"),
    "depth.py": ("", "full", "tosa", "evo_vit", "expediting", "ailurus", "tome", "tif", "random", "tfds"),
    "dynamic_vit.py": ("small", "base"),
    "evit.py": ("300", "300_0.9", "300_0.8", "300_0.6", "300_0.5", "30"),
    "evo_levit.py": ("128s", "128", "192", "256", "384", "256_384", "384_384"),
    "evo_vit.py": ("tiny", "small", "base", "small_384", "base_384"),
    "imagenet.py": tuple(
        name + variant for variant in ("", "_plain") for name in ("deit_tiny", "deit_small", "deit_base")
    ),
    "imagenette.py": ("", "plain", "peers", "photographs", "scratch", "scratch_deit_tiny"),
    "tiny_imagenet.py": ("", "budget", "speed"),
    "tosa.py": ("tiny", "small"),
}
TINY = dict(image_size=16, patch_size=8, width=8, depth=2, num_heads=1, num_classes=2)
ALL = [
    f"{path.name}:{arg}" if arg else path.name
    for path in sorted(FOLDER.glob("[!_]*.py"))
    for arg in WITH_ARGUMENTS.get(path.name, ("",))
]
ONE_EACH = {name.partition(":")[0]: name for name in reversed(ALL)}.values()


@pytest.fixture(params=ALL)
def name(request):
    return str(FOLDER / request.param)


loaded = functools.cache(config_file.load)
BUILT: list = []  # what many configs list is built once


def test_every_config_is_found():
    assert {name.partition(":")[0] for name in ALL} == {"digits.py", "folder.py", *WITH_ARGUMENTS}


def test_it_loads_and_is_plain_data(name, caplog):
    config = config_file.load(name)
    assert "without effect" not in caplog.text
    assert config_file.to_json(config)["seed"] == config.seed
    assert config_file.from_settings(_file(name)) == config


def test_its_reducers_take_their_options(name):
    config = loaded(name)
    assert config.reducer.name in [entry.name for entry in config.benchmark.reducers]
    for entry in config.benchmark.reducers:
        entry = entry.without("budget")  # solving for it takes seconds, and is tested elsewhere
        if entry not in BUILT:
            build = blueprint(TINY, reducer=entry.name, **entry.arguments)
            jax.eval_shape(lambda key, build=build: params_of(build(key)), jax.random.key(0))
            BUILT.append(entry)


def test_it_says_only_what_it_needs(name):
    """A section that stands in the file is one that its stages read."""
    config, given = loaded(name), _file(name)
    names = {entry.name for entry in config.benchmark.reducers}
    if not names & {"tif", "prior"}:
        assert "score" not in given
    if not names & {"tif", "prior", "tosa"}:
        assert "filter" not in given
    assert ("adapter" in given) == any(entry.has_adapter for entry in config.benchmark.reducers)


def test_its_training_takes_their_values(name):
    config = loaded(name)
    for recipe in (config.backbone, config.finetune):
        if recipe.num_epochs:
            assert config.data.augment != "none" or recipe.augmentation.repeats == 1
            assert 0 <= recipe.warmup_epochs < recipe.num_epochs
    if config.backbone.model and not config.backbone.init_from:
        assert config.data.size == (config.backbone.model["image_size"],) * 2
    elif not config.backbone.head:
        assert config.backbone.init_from.endswith(".safetensors")


@pytest.mark.parametrize(
    "name",
    mostly_long(
        [name for name in ALL if not name.endswith((":peers", ":budget"))],
        [ALL.index(name) for name in ("digits.py", "dynamic_vit.py:small", "evo_levit.py:128s", "evo_vit.py:tiny")],
    ),
)
def test_every_phase_runs_on_its_model_and_has_the_same_parameters(name):
    config = config_file.load(str(FOLDER / name))
    for entry in config.benchmark.reducers:
        checks.check_on_backbone(config.under(entry), _fields(config))


def _fields(config):
    """Of the model that fine-tuning begins with."""
    init_from = config.backbone.init_from
    if init_from.endswith("vit_ti16_tiny_imagenet.safetensors"):
        return model_fields("vit_tiny_patch16_224") | {"num_classes": 200}
    return model_fields(Path(init_from).stem) if init_from else config.backbone.model


def _paths(config, table, default):
    """What a table of the config says of each parameter of the real model."""
    entry = config.reducer
    model = nnx.eval_shape(blueprint(_fields(config), reducer=entry.name, **entry.arguments), jax.random.key(0))
    found = optim.match(table, params_of(model), default)
    return flatten_dict(found, sep="/")


@pytest.mark.parametrize("arg", ["small", "base"])
def test_dynamic_vit_trains_its_predictors_first(arg):
    config = config_file.load(f"{FOLDER / 'dynamic_vit.py'}:{arg}")
    recipe = config.finetune
    rests = _paths(config, tuple((pattern, True) for pattern in recipe.freeze), False)
    assert {path for path, does in rests.items() if does} == {"class_token", "position_embedding"}
    factors = _paths(config, tuple((pattern, tuple(factor)) for pattern, *factor in recipe.rate_factors), (1.0, 0))
    assert factors["block_0/mlp/up/kernel"] == factors["head/bias"] == (0.01, 5)
    assert {factors[path] for path in factors if path.startswith("reducer/predictor_3")} == {(1.0, 0)}


@pytest.mark.parametrize("arg", ["128s", "384_384"])
def test_theta_rests_while_evo_levit_selects_in_every_layer(arg):
    config = config_file.load(f"{FOLDER / 'evo_levit.py'}:{arg}")
    factors = _paths(config, tuple((pattern, tuple(factor)) for pattern, *factor in config.finetune.rate_factors), None)
    ((until, entry),) = phases_of(config.reducer, config.finetune.phases)
    assert {path: factor for path, factor in factors.items() if factor} == {"reducer/theta": (1.0, until)}
    assert entry.options["layer_wise"] and until == 200


# Steps of an epoch (of 1,281,167 images), epochs, peak and last learning rate, drop-path: of the papers' logs and scripts.
FIGURES = {
    "bat.py:300": (625, 300, 2e-3, 1e-5, 0.1),
    "bat.py:30": (1251, 30, 4e-5, 2e-6, 0.1),
    "evit.py:300": (625, 300, 2e-3, 1e-5, 0.1),
    "evit.py:30": (625, 30, 8e-5, 2e-6, 0.1),
    "evo_vit.py:tiny": (625, 300, 2e-3, 1e-5, 0.0),
    "evo_vit.py:small": (1251, 300, 1e-3, 1e-5, 0.1),
    "evo_vit.py:base_384": (1251, 300, 1e-3, 1e-5, 0.1),
    "evo_levit.py:128s": (625, 300, 2e-3, 1e-5, 0.0),
    "evo_levit.py:384_384": (1251, 300, 1e-3, 1e-5, 0.1),
    "dynamic_vit.py:small": (1251, 30, 1e-3, 1e-6, 0.0),
    "dynamic_vit.py:base": (1251, 30, 1e-3, 1e-6, 0.2),
}


@pytest.mark.parametrize("name", FIGURES)
def test_steps_and_rates_are_the_papers(name):
    recipe = config_file.load(str(FOLDER / name)).finetune
    steps, epochs, *others = FIGURES[name]
    assert 1_281_167 * recipe.num_epochs / recipe.batch_size == pytest.approx(steps * epochs, rel=2e-3)
    assert [recipe.learning_rate, recipe.final_learning_rate, recipe.drop_path] == pytest.approx(others)


@pytest.mark.parametrize("name", ["bat.py:300", "evit.py:300", "evit.py:300_0.5"])
def test_the_ramp_is_as_near_to_the_cosine_as_six_steps_can_be(name):
    config = config_file.load(str(FOLDER / name))
    lowest = config.reducer.options["keep_ratio"]
    phases = [*config.finetune.phases, dict(until=300, keep_ratio=lowest)]
    for epoch in np.arange(0, 300, 0.5):
        on_ramp = min(max(epoch - 10, 0), 100) / 100
        exact = lowest + (1 - lowest) * (1 + np.cos(np.pi * on_ramp)) / 2
        assert next(p["keep_ratio"] for p in phases if epoch < p["until"]) == pytest.approx(
            exact, abs=(1 - lowest) / 11.5
        )


def test_quick_applies_what_when_quick_says(name):
    config = loaded(name)
    if not config.when_quick:
        return
    quick = config_file.load(name, ["--config.quick=true"])
    assert _leaves(quick) == _leaves(config) | flatten_dict(config.when_quick, sep=".") | {"quick": True}


# In the normal suite one config of each file: what a file's configs say of when_quick is much alike.
@pytest.mark.parametrize("name", mostly_long(ALL, [ALL.index(name) for name in ONE_EACH]))
def test_an_override_wins_over_quick(name):
    name = str(FOLDER / name)
    config = loaded(name)
    for key, value in flatten_dict(config.when_quick, sep=".").items():
        given = value + 1
        quick = config_file.load(name, ["--config.quick=true", f"--config.{key}={given}"])
        assert _leaves(quick)[key] == given


@pytest.mark.parametrize("file", WITH_ARGUMENTS)
@pytest.mark.parametrize("arg", ["", ":", ":30_epochs"])
def test_an_unknown_argument_is_told_the_known_ones(file, arg):
    if "" in WITH_ARGUMENTS[file] and arg != ":30_epochs":
        return
    with pytest.raises(InputError, match=", ".join(filter(None, WITH_ARGUMENTS[file])) + " after a colon"):
        config_file.load(f"{FOLDER / file}{arg}")


def test_imagenet_follows_the_environment(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/data/tfds")
    monkeypatch.setenv("TIF_WEIGHTS", "/data/weights")
    config = config_file.load(f"{FOLDER / 'imagenet.py'}:deit_small")
    assert config.data.root == "/data/tfds"
    assert config.backbone.init_from == "/data/weights/deit_small_patch16_224.safetensors"


def _leaves(config):
    """Values by dotted key."""
    return flatten_dict(dataclasses.asdict(config), sep=".", keep_empty_nodes=True)


@functools.cache
def _file(name):
    """What the file itself says."""
    return config_file._file_settings(name)
