"""`tif estimate`: its formulas by hand, what its table says, mistakes."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import mostly_long
from small_project import forget_handlers, last_line

from tif_jax import cost, create_model
from tif_jax.__main__ import main
from tif_jax.commands import _estimate_here, estimate
from tif_jax.experiment import config as config_file
from tif_jax.experiment.estimate import (
    FORWARD,
    GRADIENT,
    TRAINED,
    Work,
    abstract,
    scoring,
    shard_bytes,
    stages,
    units,
)
from tif_jax.experiment.reducer_entry import ReducerEntry
from tif_jax.experiment.schema import Distillation
from tif_jax.impact.oracle import check_options, shared_scores
from tif_jax.models.cost import multiply_adds
from tif_jax.models.params import params_of
from tif_jax.reducers.tif import TokenFilter
from tif_jax.training.speed import PEAK

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)


def macs(**options):
    return 1e9 * cost(create_model(TINY, **options)).gmac


@pytest.fixture(scope="module")
def experiment():
    """The digits', with tif alone."""
    return config_file.load("digits", [])


def by_name(experiment):
    return {work.name: work for work in stages(experiment, TINY, 1000, 200)}


def test_stages_by_hand(experiment):
    tif = {"reducer": "tif", **experiment.reducer.arguments}
    whole, own = macs(), macs(**tif)
    found, recipe = by_name(experiment), experiment.score
    scored = 1000 * recipe.views  # fewer than score.num_images
    assert found["backbone"].macs == pytest.approx(experiment.backbone.num_epochs * 1000 * 3 * whole)
    assert found["finetune"].macs == pytest.approx(experiment.finetune.num_epochs * 1000 * 3 * own)
    validation = experiment.data.num_validation
    assert validation and found["evaluate"].macs == pytest.approx(200 * (whole + 2 * own) + validation * own)
    assert found["score"].images == scored
    assert found["score"].macs == pytest.approx(scored * whole * units(recipe.estimator, 16, recipe.num_samples))
    patches = np.zeros((1, 16, 32), np.float32)
    filter_ = create_model(TINY, reducer="tif").reducer.filter
    assert isinstance(filter_, TokenFilter)
    of_filter = multiply_adds(lambda x: filter_(x), patches)
    embedding = 16 * 3 * 64 * 32
    assert found["filter"].macs == pytest.approx(
        experiment.filter.num_epochs * scored * (embedding + 3 * of_filter), rel=1e-6
    )
    assert "adapter" not in found


def test_what_else_there_can_be(experiment):
    own = ReducerEntry("tif", dict(keep_ratio=0.5, adapter=8))
    found = by_name(dataclasses.replace(experiment, reducer=own))["adapter"]
    assert found.macs == pytest.approx(
        experiment.adapter.num_epochs * 1000 * (macs() + 2 * macs(reducer="tif", keep_ratio=0.5, adapter=8))
    )
    selecting = by_name(dataclasses.replace(experiment, reducer=ReducerEntry("tosa", dict(keep_ratio=0.5))))["filter"]
    assert selecting.macs == pytest.approx(experiment.filter.num_epochs * 1000 * macs())
    without = by_name(dataclasses.replace(experiment, reducer=ReducerEntry("evit", dict(keep_ratio=0.5))))
    assert not {"score", "filter", "adapter"} & without.keys()


def test_what_fine_tuning_takes_beside_three_passes(experiment):
    """The teacher's prediction, which may be a larger network's; and dynamic_vit trains on all tokens."""
    soft = dataclasses.replace(experiment.finetune, distillation=Distillation(kind="soft"))
    taught = dataclasses.replace(experiment, finetune=soft)
    plain, own = (by_name(of)["finetune"].macs for of in (experiment, taught))
    images = experiment.finetune.num_epochs * 1000
    assert own - plain == pytest.approx(images * macs())
    large = {**TINY, "width": 64}
    (found,) = (work.macs for work in stages(taught, TINY, 1000, 200, large) if work.name == "finetune")
    assert found - plain == pytest.approx(images * 1e9 * cost(create_model(large)).gmac)
    dynamic = ReducerEntry("dynamic_vit", dict(keep_ratio=0.5, sites=(1,)))
    of_dynamic = by_name(dataclasses.replace(experiment, reducer=dynamic))["finetune"].macs
    assert of_dynamic >= images * 3 * macs()


def test_weights_that_are_not_here_say_by_their_names_what_they_are(capsys):
    """And the config how large images are."""

    def fine_tuning(*more):
        assert run(" ".join([LINE, *more])) == 0
        rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:]}
        return float(rows["finetune"][2].replace(",", ""))

    small = "--model deit_tiny_patch16_224"
    at_224, at_384 = (fine_tuning(small, f"--config.data.image_size={size}") for size in (224, 384))
    assert at_384 > 3 * at_224
    teacher = "--config.finetune.distillation.kind=hard --config.finetune.distillation.teacher"
    taught = fine_tuning(small, "--config.data.image_size=224", f"{teacher}=deit_base_patch16_224.safetensors")
    images = config_file.load("digits", []).finetune.num_epochs * 1000
    assert taught - at_224 == pytest.approx(2e-15 * images * 1e9 * 16.8, rel=0.05)
    assert run(f"{LINE} {teacher}=mine.safetensors") == 2
    assert "finetune.distillation.teacher mine.safetensors is not here, and 'mine'" in last_line(capsys)


def test_of_few_images_the_least_number_of_steps_counts(experiment):
    recipe = dataclasses.replace(experiment.finetune, num_epochs=2.0, min_steps=100, batch_size=32)
    assert by_name(dataclasses.replace(experiment, finetune=recipe))["finetune"].images == 3200
    recipe = dataclasses.replace(recipe, min_steps=50)
    assert by_name(dataclasses.replace(experiment, finetune=recipe))["finetune"].images == 2000
    evit = dataclasses.replace(experiment, reducer=ReducerEntry("evit", dict(keep_ratio=0.5)))
    recipe = dataclasses.replace(recipe, num_epochs=4.0, phases=({"until": 1.0, "keep_ratio": 1.0},))
    found = by_name(dataclasses.replace(evit, finetune=recipe))["finetune"]
    whole, own = (macs(reducer="evit", keep_ratio=ratio) for ratio in (1.0, 0.5))
    assert found.macs == pytest.approx(3 * 1000 * (whole + 3 * own))


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (dict(estimator="sampled"), "bfloat16"),
        (dict(estimator="exact"), "float32"),
        (dict(estimator="exact", dtype="bfloat16"), "bfloat16"),
        (dict(estimator="sampled", dtype="float32"), "float32"),
    ],
)
def test_scoring_is_computed_in_what_tif_score_takes_on_a_device(experiment, recipe, dtype):
    score = dataclasses.replace(experiment.score, **recipe)
    assert by_name(dataclasses.replace(experiment, score=score))["score"].dtype == dtype


@pytest.mark.parametrize("options", [dict(estimator="gradient"), dict(estimator="sampled", num_samples=4)])
def test_units_are_what_the_oracle_multiplies(options):
    """But for what gates cost and for a first block whose input needs no gradient."""
    model, images = create_model(TINY), np.zeros((1, 32, 32, 3), np.float32)
    options = check_options(**dict(mask=None, target="label", num_samples=1, keep_ratio=0.5) | options)
    given = {"label": np.zeros(1, np.int32)}
    counted = multiply_adds(lambda x: shared_scores(model, x, given, seed=0, chunk=4, **options).impact, images)
    wanted = units(options["estimator"], 16, options["num_samples"]) * macs()
    assert 0.8 < counted / wanted < 1.2


def test_seconds_and_bytes():
    work = Work("one", 1, 1e12, "bfloat16")
    shares = {FORWARD: 0.5, TRAINED: 0.25}
    assert work.seconds(PEAK["v5e"], shares, 4) == pytest.approx(2e12 / (197e12 * 0.5 * 4))
    assert work._replace(dtype="float32").seconds(PEAK["v5e"], shares, 4) == pytest.approx(
        6 * 2e12 / (197e12 * 0.5 * 4)
    )
    assert work._replace(kind=TRAINED).seconds(PEAK["v5e"], shares, 4) == 2 * work.seconds(PEAK["v5e"], shares, 4)
    model = abstract(TINY, ReducerEntry("full", {}))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params_of(model)))
    assert scoring("s", model, 10, "exact", 0, "bfloat16").dtype == "float32"  # differences of losses are small
    assert shard_bytes(model, 1000) == 1000 * (4 * 16 + 120)


def run(line):
    forget_handlers()
    return main(["estimate", *line.split()])


LINE = "--config digits --num-images 1000,200 --device h100"


def test_the_table(capsys):
    assert run(f"{LINE} --count 2 --utilisation 0.5 --price 3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "digits: 1000 training images, 200 for the test, one reducer, one seed; 2 x h100, 50% of the peak"
    )
    rows = {line.split("  ")[0]: line.split() for line in lines[2:]}
    assert {"backbone", "score", "filter", "finetune", "evaluate", "all"} <= rows.keys()
    hours, dollars = (float(rows["all"][i].replace(",", "")) for i in (3, 4))
    assert dollars == pytest.approx(hours * 2 * 3, abs=0.011)
    assert run(f"{LINE} --cores 1 --decode 10") == 0
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["finetune"][4] == "10.0"  # images/s: the core decides


@pytest.mark.parametrize(
    ("name", "batch_size", "accumulate"),
    [*mostly_long([("classification", 8, 4), ("levit", 16, 1), ("depth", 256, 2)])],
)
def test_here_each_kind_of_work_is_measured(experiment, monkeypatch, name, batch_size, accumulate):
    told = []  # images of a call
    monkeypatch.setattr(_estimate_here.timing, "rate", lambda run, seconds, least=2: (told.append(run()), 10.0)[1])
    levit = dict(family="levit", image_size=64, widths=(16, 24), depths=(2, 1), num_heads=(2, 3), key_dim=8)
    depth = {**TINY, "num_classes": 0, "task": "depth", "depth": 4}
    fields = {"classification": TINY, "levit": {**levit, "num_classes": 3}, "depth": depth}[name]
    finetune = dataclasses.replace(experiment.finetune, batch_size=batch_size, accumulate=accumulate)
    found = _estimate_here.reached(fields, dataclasses.replace(experiment, finetune=finetune))
    flops = 2e9 * cost(create_model(fields)).gmac
    gradient = 3 if name == "levit" else 1 + 2 * 4
    assert found == pytest.approx({FORWARD: 10 * flops, TRAINED: 10 * 3 * flops, GRADIENT: 10 * gradient * flops})
    assert told[:2] == [32, min(64, batch_size)]


def test_the_table_of_here(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "reached", lambda *_: {FORWARD: 4e9, GRADIENT: 2e9, TRAINED: 1e9})
    assert run("--config digits --num-images 1000,200 --device here") == 0
    printed = capsys.readouterr().out
    assert "1 x here, as fast as was measured" in printed
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()[2:]}
    for name, flops in (("evaluate", 4e9), ("score", 2e9), ("finetune", 1e9)):
        assert float(rows[name][3]) == pytest.approx(1e15 * float(rows[name][2]) / flops / 3600, rel=0.01)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--device gpu", "--device is 'gpu'; allowed: a100, h100"),
        ("--count 0", "--count is 0; it is above 0"),
        ("--utilisation 1.5", "--utilisation is 1.5; it is above 0, at most 1"),
        ("--num-images many", "--num-images is 'many'; it is as in 1281167,50000"),
        ("--nothing", "unknown flag --nothing"),
        ("--model nothing", "and 'nothing' is no name of a network: give --model"),
    ],
)
def test_mistakes(capsys, line, message):
    assert run(f"{LINE} {line}") == 2
    assert message in last_line(capsys)
