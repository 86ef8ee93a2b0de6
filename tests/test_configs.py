from pathlib import Path

import jax
import pytest
from flax.traverse_util import flatten_dict

from tif_jax import config as config_file
from tif_jax import data
from tif_jax.commands.benchmark import with_reducer
from tif_jax.commands.train import reducer_options
from tif_jax.errors import InputError
from tif_jax.models import blueprint
from tif_jax.state import params_of

FOLDER = Path(__file__).parents[1] / "configs"
WITH_ARGUMENTS = {"imagenette.py": ("", "peers"), "imagenet.py": ("deit_tiny", "deit_small", "deit_base")}
TINY = dict(image_size=16, patch_size=8, width=8, depth=2, num_heads=1, num_classes=2)
ALL = [
    f"{path.name}:{arg}" if arg else path.name
    for path in sorted(FOLDER.glob("*.py"))
    for arg in WITH_ARGUMENTS.get(path.name, ("",))
]


@pytest.fixture(params=ALL)
def name(request):
    return str(FOLDER / request.param)


def test_every_config_is_found():
    assert {name.partition(":")[0] for name in ALL} >= {"digits.py", "imagenette.py", "imagenet.py"}


def test_it_loads_with_a_valid_data_section(name):
    config = config_file.load(name, [])
    assert config.is_locked
    data.read_options(config.data)
    assert config_file.to_json(config)["seed"] == config.seed


def test_its_reducers_take_their_options(name):
    config = config_file.load(name, [])
    assert config.reducer.name in config.benchmark.reducers
    for entry in config.benchmark.reducers:
        reducer, options = reducer_options(with_reducer(config, entry))
        options.pop("budget", None)  # solving for it takes seconds, and is tested elsewhere
        build = blueprint(TINY, reducer=reducer, **options)
        jax.eval_shape(lambda key, build=build: params_of(build(key)), jax.random.key(0))


def test_its_model_builds(name):
    config = config_file.load(name, [])
    if "model" not in config.backbone:
        assert config.backbone.init_from.endswith(".safetensors")
        return
    name, options = reducer_options(config)
    options |= {"drop_path": config.backbone.drop_path, "dtype": config.dtype}
    build = blueprint(config.backbone.model.to_dict(), reducer=name, **options)
    shapes = jax.eval_shape(lambda key: params_of(build(key)), jax.random.key(0))
    assert {f"block_{i}" for i in range(config.backbone.model.depth)} < set(shapes)
    size = data.read_options(config.data).size
    assert size == (config.backbone.model.image_size,) * 2


def test_its_stages_have_every_key(name):
    config, digits = (config_file.load(file, []) for file in (name, str(FOLDER / "digits.py")))
    assert set(config.keys()) == set(digits.keys())
    for stage in ("score", "filter", "finetune", "evaluate", "benchmark"):
        assert set(config[stage].keys()) == set(digits[stage].keys()), stage


def test_quick_applies_what_when_quick_says(name):
    config, quick = config_file.load(name, []), config_file.load(name, ["--config.quick=true"])
    expected = _leaves(config) | _leaves(config.when_quick) | {"quick": True}
    assert _leaves(quick) == expected


def test_an_override_wins_over_quick(name):
    config = config_file.load(name, [])
    for key, value in _leaves(config.when_quick).items():
        given = value + 1
        quick = config_file.load(name, ["--config.quick=true", f"--config.{key}={given}"])
        assert _leaves(quick)[key] == given


@pytest.mark.parametrize("arg", ["", ":", ":deit_large", ":deit_tiny_patch16_224"])
def test_imagenet_names_the_models_it_knows(arg):
    with pytest.raises(InputError, match="deit_tiny, deit_small, deit_base"):
        config_file.load(f"{FOLDER / 'imagenet.py'}{arg}", [])


def test_imagenet_follows_the_environment(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/data/tfds")
    monkeypatch.setenv("TIF_WEIGHTS", "/data/weights")
    config = config_file.load(f"{FOLDER / 'imagenet.py'}:deit_small", [])
    assert config.data.root == "/data/tfds"
    assert config.backbone.init_from == "/data/weights/deit_small_patch16_224.safetensors"


def _leaves(config):
    """Values by dotted key."""
    return flatten_dict(config.to_dict(), sep=".", keep_empty_nodes=True)
