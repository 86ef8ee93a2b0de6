"""Entries of benchmark.reducers, phases and labels: what a config may say of reducers, before anything is trained."""

from pathlib import Path

import jax
import pytest
from cases import numpy_model
from flax import nnx

from tif_jax import cost
from tif_jax.errors import InputError
from tif_jax.experiment import checks, stages
from tif_jax.experiment import config as config_file
from tif_jax.experiment.reducer_entry import phases_of
from tif_jax.models import blueprint
from tif_jax.models.params import params_of
from tif_jax.reducers.bat import counts_at, row_count
from tif_jax.training import optim

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")
TINY = dict(image_size=32, patch_size=8, width=16, depth=4, num_heads=2, num_classes=5)


def config(*overrides, **changes):
    """The digits config with other values, by section__key."""
    settings = config_file._file_settings(CONFIG)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings.setdefault(section, {})[name] = value
    return config_file.from_settings(settings, overrides)


def entry_of(entry, **changes):
    return config(benchmark__reducers=(entry,), **changes).benchmark.reducers[0]


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
        (dict(name="expediting", clusters=(7, 8)), "expediting-7+8"),
        (dict(name="tif", then=dict(name="evit", fuse=False)), "tif-0.25,then=evit+fuse=False"),
    ],
)
def test_labels(entry, label):
    assert entry_of(entry).label == label


def test_an_entry_takes_over_how_much_to_keep_and_nothing_else():
    """`adapter` is an option of tif; to another reducer it might mean something else."""
    given = dict(reducer__adapter=8, filter__keep_ratio=0.5)
    budget = config("--config.reducer.budget=0.5", "--config.benchmark.reducers=bat,tif", **given)
    bat, tif = budget.benchmark.reducers
    assert (bat.name, bat.arguments) == ("bat", {"budget": 0.5})
    assert (tif.name, tif.arguments) == ("tif", {"adapter": 8, "budget": 0.5})
    entry = entry_of(dict(name="bat", keep_ratio=0.3), **given)
    assert (entry.name, entry.arguments) == ("bat", {"keep_ratio": 0.3})


def test_an_amount_on_the_command_line_stands_instead_of_the_files():
    given = config("--config.reducer.budget=0.5", "--config.filter.keep_ratio=0.5").reducer
    assert given.arguments == {"budget": 0.5}
    assert config("--config.reducer.keep_ratio=0.75").reducer.arguments == {"keep_ratio": 0.75}
    with pytest.raises(InputError, match="reducer has a budget and keep_ratio; a budget stands instead"):
        config(reducer__budget=0.5)


def test_another_reducer_on_the_command_line_takes_over_the_amount_alone():
    assert config("--config.reducer.name=evit", reducer__adapter=8).reducer.described == dict(
        name="evit", keep_ratio=0.25
    )
    budget = dict(reducer=dict(name="tif", budget=0.01), filter=dict(keep_ratio=0.5))
    assert config_file.from_settings(budget, ["--config.reducer.name=full"]).reducer.described == {"name": "full"}
    each = ["--config.reducer.name=evit", "--config.reducer.keep_ratio=0.9,0.7,0.5"]
    assert config(*each, "--config.benchmark.reducers=evit").reducer.options["keep_ratio"] == (0.9, 0.7, 0.5)
    with pytest.raises(InputError, match=r"benchmark.reducers\[1\].keep_ratio is \(0.9, 0.7, 0.5\); it is a number"):
        config(*each)  # random has one site


def test_labels_aim_at_what_tif_keeps_unless_the_filter_says_otherwise():
    assert config().filter.keep_ratio == 0.25
    assert config(filter__keep_ratio=0.4).filter.keep_ratio == 0.4
    assert config("--config.reducer.keep_ratio=0.5").filter.keep_ratio == 0.5
    assert config("--config.reducer=full", "--config.benchmark.reducers=full").filter.keep_ratio is None
    with pytest.raises(InputError, match=r"filter\.keep_ratio is not given, and the reducer's budget does not tell it"):
        config("--config.reducer.budget=0.01")


def test_entries_that_share_a_filter_and_an_adapter_share_what_these_are_fitted_for():
    both = (dict(name="tif", keep_ratio=0.25), dict(name="tif", keep_ratio=0.5), "prior")
    base = config(benchmark__reducers=both, reducer__adapter=8)
    runs = [base.under(entry) for entry in base.benchmark.reducers]
    assert {run.filter.keep_ratio for run in runs} == {0.25}
    fitted = {stages._fitted_entry(run).label for run in runs if run.reducer.has_adapter}
    assert fitted == {"tif-0.25,adapter=8"}


def test_a_phase_may_have_a_budget():
    base = config(finetune__phases=(dict(until=0.2, budget=0.01), dict(until=0.3, keep_ratio=0.5)))
    found = [entry.arguments for _, entry in phases_of(base.reducer, base.finetune.phases)]
    assert found == [{"budget": 0.01}, {"keep_ratio": 0.5}]


def test_a_reducer_is_named_on_the_command_line_as_in_the_file():
    assert config("--config.reducer=evit").reducer.described == {"name": "evit"}
    given = "{'name': 'evit', 'fuse': False, 'keep_ratio': 0.5}"
    assert config(f"--config.reducer={given}").reducer.label == "evit-0.5,fuse=False"
    then = ["--config.reducer.then.name=tome", "--config.reducer.then.num_merged=5"]
    assert config(*then).reducer.options["then"] == dict(name="tome", num_merged=5)
    other = config("--config.reducer.then.name=evit", reducer__then=dict(name="tome", num_merged=5))
    assert other.reducer.options["then"] == dict(name="evit")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            dict(name="evit", fuze=False),
            r"no key 'benchmark.reducers\[0\].fuze'; the nearest is .*\.fuse' \('evit' takes",
        ),
        (dict(keep_ratio=0.5), "it is a name, or a dict"),
        ("evvit", "Unknown reducer 'evvit'"),
        (
            dict(name="tif", then=dict(name="evit", keep_ration=0.5)),
            r"then\.keep_ration'; the nearest is .*then\.keep_ratio'",
        ),
        (dict(name="full", budget=0.5), "'full' has no amount to solve for"),
    ],
)
def test_entries_that_mean_nothing(entry, message):
    with pytest.raises(InputError, match=message):
        entry_of(entry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(benchmark__reducers=("full", "tif", "tif")), "full-1, tif-0.25, tif-0.25; name at least one, each once"),
        (dict(benchmark__reducers=()), "benchmark.reducers is empty"),
        (dict(finetune__phases=(dict(until=0.2, keep_ratio=7.0),)), "keep_ratio is 7.0"),
        (dict(finetune__phases=(dict(until=0.2, keep_ration=0.5),)), "keep_ration'; the nearest is .*keep_ratio'"),
        (dict(finetune__phases=(dict(until=9.0),)), "last until the epochs \\[9.0\\]; give each an `until`, ascending"),
        (dict(finetune__phases=(1, 2)), "finetune.phases is \\(1, 2\\); it is a tuple of dicts"),
        (
            dict(benchmark__reducers=("tif", dict(name="tif", then=dict(name="prior")))),
            "reducer 'prior' needs a stage of its own",
        ),
        (dict(benchmark__reducers=("tif", dict(name="tif", then="tome"))), "then is 'tome'; it is a dict"),
        (
            dict(benchmark__reducers=(dict(name="tif", adapter=8), dict(name="tif", adapter=16))),
            "adapters of the widths 8, 16; one adapter is fitted for all of them",
        ),
        (
            dict(
                reducer__adapter=8,
                adapter__as_used=True,
                benchmark__reducers=("tif", dict(name="tif", adapter=8, keep_ratio=0.3)),
            ),
            "benchmark.reducers.1. is another reducer with an adapter: give it a run of its own",
        ),
        (dict(benchmark__reducers=(dict(name="tif", adapter=6),)), "adapter is 6; it is a width, a multiple of 4"),
    ],
)
def test_a_config_with_them_is_refused_at_once(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_the_adapters_stage_is_for_a_reducer_that_has_one(tmp_path):
    with pytest.raises(InputError, match="stage 'adapter' is for tif with"):
        stages.adapter(config(), tmp_path)


def test_a_phase_may_not_change_which_parameters_there_are():
    base = config(
        finetune__phases=(dict(until=0.1, sites=(1,)),), benchmark__reducers=(dict(name="dynamic_vit", sites=(1, 2)),)
    )
    with pytest.raises(InputError, match=r"finetune\.phases change which parameters 'dynamic_vit' has"):
        checks.check_on_backbone(base.under(base.benchmark.reducers[0]), TINY)


def test_learned_selectors_are_of_blocks_that_are_said():
    """They are fitted whatever the numbers; a number for each block would alone say of which blocks."""
    base = config(
        benchmark__reducers=(dict(name="tosa", num_kept=(16, 16, 8, 16)), dict(name="tosa", layers=(2,), num_kept=(8,)))
    )
    per_block, said = (base.under(entry) for entry in base.benchmark.reducers)
    with pytest.raises(InputError, match=r"with learned selectors say the blocks: layers=\(2,\), num_kept=\(8,\)"):
        checks.check_on_backbone(per_block, TINY)
    checks.check_on_backbone(said, TINY)


@pytest.mark.parametrize("then", [dict(name="dynamic_vit"), dict(name="evit")])
def test_what_comes_after_the_filter_is_trained(then):
    params = params_of(nnx.eval_shape(blueprint(TINY, reducer="tif", then=then), jax.random.key(0)))
    trainable = optim.match(stages.REDUCER_RESTS, params, True)["reducer"]
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
