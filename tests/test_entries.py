"""Entries of benchmark.reducers, phases and labels: what a config may say of reducers, before anything is trained."""

from pathlib import Path

import jax
import pytest
from cases import numpy_model
from flax import nnx

from tif_jax import cost
from tif_jax.commands import benchmark, run, train
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.models import blueprint
from tif_jax.models.params import params_of
from tif_jax.reducers.bat import counts_at, row_count
from tif_jax.training import optim

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")
TINY = dict(image_size=32, patch_size=8, width=16, depth=4, num_heads=2, num_classes=5)


def config(*overrides, **changes):
    loaded = config_file.load(CONFIG, list(overrides))
    with loaded.unlocked():
        for key, value in changes.items():
            section, _, name = key.partition("__")
            loaded[section][name] = value
    return loaded


@pytest.mark.parametrize(
    ("entry", "label"),
    [
        ("tif", "tif-0.25"),
        ("full", "full-1"),
        ("tome", "tome-13"),
        (dict(name="tome", num_merged=(2, 3)), "tome-2+3"),
        (dict(name="evit", keep_ratio=(0.9, 0.7, 0.5)), "evit-0.9+0.7+0.5"),
        (dict(name="evit", fuse=False), "evit-0.25,fuse=False"),
        (dict(name="evit", num_kept=(12, 8, 4)), "evit-12+8+4"),
        (dict(name="bat", budget=0.8), "bat-0.8GMAC"),
        (dict(name="tif", then=dict(name="evit", fuse=False)), "tif-0.25,then=evit+fuse=False"),
    ],
)
def test_labels(entry, label):
    assert train.label(benchmark.with_reducer(config(), entry)) == label


def test_an_entry_takes_over_how_much_to_keep_and_nothing_else():
    """`features` is an option of tif and one of bat, and not the same."""
    base = config(reducer__features="local", reducer__budget=0.5)
    assert train.reducer_options(benchmark.with_reducer(base, "bat")) == ("bat", {"budget": 0.5})
    own = benchmark.with_reducer(base, dict(name="bat", keep_ratio=0.3))
    assert train.reducer_options(own) == ("bat", {"keep_ratio": 0.3})
    assert train.reducer_options(benchmark.with_reducer(base, "tif")) == ("tif", {"features": "local", "budget": 0.5})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(name="evit", fuze=False), "'evit' takes .*; got fuze"),
        (dict(keep_ratio=0.5), "allowed: a name, or dict"),
        ("evvit", "Unknown reducer 'evvit'"),
    ],
)
def test_entries_that_mean_nothing(entry, message):
    with pytest.raises(InputError, match=message):
        benchmark.with_reducer(config(), entry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(benchmark__reducers=("full", "tif", "tif")), "full-1, tif-0.25, tif-0.25; name at least one, each once"),
        (dict(benchmark__reducers=()), "benchmark.reducers is empty"),
        (dict(finetune__phases=(dict(until=0.2, keep_ratio=7.0),)), "keep_ratio is 7.0"),
        (dict(finetune__phases=(dict(until=9.0),)), "last until the epochs \\[9.0\\]; give each an `until`, ascending"),
        (dict(finetune__phases=(1, 2)), "finetune.phases is \\(1, 2\\); it is a tuple of dicts"),
        (
            dict(benchmark__reducers=("tif", dict(name="tif", then=dict(name="prior")))),
            "reducer 'prior' needs a stage of its own",
        ),
        (dict(benchmark__reducers=("tif", dict(name="tif", then="tome"))), "then is 'tome'; it is a dict"),
    ],
)
def test_a_run_refuses_them_at_once(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run.run(config(**changes), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_run_needs_a_section_for_what_is_fitted(tmp_path):
    base = config(reducer__name="full", benchmark__reducers=("full", "tosa"))
    with base.unlocked():
        del base["filter"]
    with pytest.raises(InputError, match="'tosa' is fitted before fine-tuning; the config has no section `filter`"):
        run.run(base, tmp_path)


def test_a_run_needs_a_section_for_an_adapter(tmp_path):
    base = config(benchmark__reducers=("full", dict(name="tif", adapter=8)))
    with pytest.raises(InputError, match="is trained before fine-tuning; the config has no section `adapter`"):
        run.run(base, tmp_path)
    with pytest.raises(InputError, match="stage 'adapter' is for tif with"):
        train.adapter(base, tmp_path)
    with base.unlocked():
        base.adapter = {}
    with pytest.raises(InputError, match="adapter is 6; it is a width, a multiple of 4, or 0 for none"):
        train.check_reducer(benchmark.with_reducer(base, dict(name="tif", adapter=6)))


def test_a_phase_may_not_change_which_parameters_there_are():
    base = config(finetune__phases=(dict(until=0.1, sites=(1,)),))
    entry = benchmark.with_reducer(base, dict(name="dynamic_vit", sites=(1, 2)))
    with pytest.raises(InputError, match=r"finetune\.phases change which parameters 'dynamic_vit' has"):
        train.check_on_backbone(entry, TINY)


@pytest.mark.parametrize("then", [dict(name="dynamic_vit"), dict(name="evit")])
def test_what_comes_after_the_filter_is_trained(then):
    params = params_of(nnx.eval_shape(blueprint(TINY, reducer="tif", then=then), jax.random.key(0)))
    trainable = optim.match(train.FROZEN_REDUCER, params, True)["reducer"]
    assert not any(jax.tree.leaves(trainable["filter"]))
    assert all(jax.tree.leaves(trainable.get("then", {})))


def test_bat_keeps_more_the_more_it_is_asked_to():
    left = [row_count(counts_at(196, ratio / 100)) for ratio in range(80, 101)]
    assert left == sorted(left)
    for wanted in (195, 190, 180, 157, 100, 20):
        assert wanted - 3 <= row_count(counts_at(196, wanted)) <= wanted


@pytest.mark.parametrize(
    ("reducer", "given", "instead", "attribute"),
    [
        ("evit", dict(num_kept=(12, 8, 4, 4)), dict(keep_ratio=0.9), ("num_kept", None)),
        ("evit", dict(keep_ratio=0.5), dict(num_kept=(12, 8, 4, 4)), ("num_kept", (12, 8, 4, 4))),
    ],
)
def test_another_amount_stands_in_place_of_the_checkpoints(reducer, given, instead, attribute, tmp_path):
    from tif_jax import load
    from tif_jax.runtime.mesh import make_mesh, replicate
    from tif_jax.training.checkpoints import Checkpoints
    from tif_jax.training.state import State

    model = numpy_model(TINY, reducer=reducer, **given)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        description = {"model": TINY, "reducer": {"name": reducer, **given}}
        checkpoints.save(State(jax.numpy.int32(0), replicate(params_of(model), make_mesh(1)), ()), description, {})
        checkpoints.wait()
    name, value = attribute
    assert getattr(load(tmp_path, **instead).reducer, name) == value


@pytest.mark.long
def test_a_budget_on_a_pyramid():
    fields = dict(family="levit", widths=(16, 24, 32), depths=(2, 2, 2), num_heads=(1, 1, 2), key_dim=8, image_size=64)
    evo = fields | dict(positions="absolute", class_token=True, num_classes=5)
    built = lambda **options: nnx.eval_shape(blueprint(evo, reducer="evo_levit", **options), jax.random.key(0))  # noqa: E731
    budget = (cost(built(keep_ratio=0.1)).gmac + cost(built(keep_ratio=1.0)).gmac) / 2
    model = built(budget=budget)
    assert cost(model).gmac <= budget < cost(built(keep_ratio=model.reducer.keep_ratio + 0.001)).gmac
    with pytest.raises(InputError, match="evit"):
        blueprint(evo, reducer="evit", budget=budget)
