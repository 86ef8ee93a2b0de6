"""`tif run` from nothing to a report, and again; cut in the middle it ends where an uncut run ends."""

import json
import shutil

import jax
import numpy as np
import pytest
from cases import call
from small_project import last_line

import tif_jax
from tif_jax import Adaptive, cost, load
from tif_jax.__main__ import main
from tif_jax.adaptive.routing import ALWAYS, Route, confidence
from tif_jax.commands import benchmark
from tif_jax.commands._report import pictures
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.experiment import config as config_file
from tif_jax.experiment import stages
from tif_jax.impact import shards
from tif_jax.impact.labels import keep_labels, position_prior
from tif_jax.models.params import params_of
from tif_jax.runtime import metrics_log, records
from tif_jax.training.checkpoints import Checkpoints, load_params
from tif_jax.weights.ladder import described

TINY = """
import importlib.util
spec = importlib.util.spec_from_file_location("digits", {digits!r})
digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digits)

def get_config():
    config = digits.get_config()
    config.seeds = 2
    config.data.update(num_train=72, num_test=16, num_validation=8, num_workers=2)
    config.backbone.model.update(width=16, depth=1, num_heads=2)
    config.backbone.update(num_epochs=2.0, batch_size=16)
    config.score.update(num_samples=1, num_images=32, batch_size=16)
    config.filter.update(num_epochs=2.0, batch_size=16)
    config.finetune.update(num_epochs=1.0, batch_size=16, phases=(dict(until=0.5, keep_ratio=0.5),))
    config.evaluate.update(batch_size=16, num_images=16, num_samples=1)
    config.benchmark.update(batch_size=8, reducers=("full", "tif"))
    return config
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """(config file, workdir) of a finished run."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = folder / "tiny.py"
    config.write_text(TINY.format(digits=str(request.config.rootpath / "configs" / "digits.py")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_SECONDS_PER_ROUND", 0.02)
        assert main(["run", "--config", str(config), "--workdir", str(folder / "run")]) == 0
    return config, folder / "run"


def test_what_it_leaves(finished):
    _, workdir = finished
    for name in ("report.md", "report.json", "accuracy_cost.png", "training.png", "tokens.png", "benchmark.json"):
        assert (workdir / name).stat().st_size > 0
    for stage in (
        "backbone",
        "filter",
        "filter-1",
        "finetune/tif-0.25-0",
        "finetune/tif-0.25-1",
        "finetune/full-1-0",
    ):
        assert (workdir / stage / "metrics.jsonl").exists() and (workdir / stage / "metrics.json").exists()
    report = records.read(workdir / "report.json")
    assert {"config", "versions", "device", "rows", "filter"} <= set(report)
    assert [(row["reducer"], row["seed"]) for row in report["rows"]] == [
        (name, seed) for seed in (0, 1) for name in ("full", "tif")
    ]
    assert {"reducer", "keep_ratio", "seed", "top1", "gmac", "images_per_second"} <= set(report["rows"][0])
    assert {"auc", "spearman", "position_prior", "random"} == set(report["filter"])
    keys = {"reducer", "options", "batch_size", "dtype", "gmac", "parameters", "images_per_second", "peak_memory_bytes"}
    assert keys <= set(records.read(workdir / "benchmark.json")["rows"][0])
    assert "| tif-0.25 |" in (workdir / "report.md").read_text()


def test_again_it_does_no_finished_work(finished):
    config, workdir = finished
    results = [p for p in workdir.rglob("*") if p.is_file() and p.suffix in (".parquet", ".json", ".jsonl")]
    times = {p: p.stat().st_mtime_ns for p in results if "report" not in p.name}
    assert main(["run", "--config", str(config), "--workdir", str(workdir)]) == 0
    assert {p: p.stat().st_mtime_ns for p in times} == times
    # Another config is refused, and run.json still says what is there.
    plan = (workdir / "run.json").read_bytes()
    line = ["run", "--config", str(config), "--workdir", str(workdir), "--config.backbone.num_epochs=3"]
    assert main(line) == 2 and (workdir / "run.json").read_bytes() == plan


@pytest.mark.parametrize("other", [{"machine": {"host": "there"}}, {"device": "9 x abacus"}, {"versions": {}}])
def test_speeds_of_another_machine_are_measured_anew(finished, monkeypatch, other):
    path, workdir = finished
    config, measured_on = config_file.load(str(path)), benchmark._measured_on
    assert benchmark.is_measured(config, workdir)
    monkeypatch.setattr(benchmark, "_measured_on", lambda size: measured_on(size) | other)
    assert not benchmark.is_measured(config, workdir)


def test_a_workdir_loads_as_its_best_model(finished):
    _, workdir = finished
    report = records.read(workdir / "report.json")
    model, best = tif_jax.load(workdir), tif_jax.load(workdir / report["best"])
    assert report["best"].startswith("finetune/tif-0.25") and report["best_chosen_on"] == "validation"
    rows = [row for row in report["rows"] if row["reducer"] == "tif"]
    chosen = next(row for row in rows if row["directory"] == report["best"])
    assert chosen["validation_top1"] == max(row["validation_top1"] for row in rows)
    metrics = records.read(workdir / report["best"] / "metrics.json")
    assert (metrics["validation"]["num_images"], metrics["num_images"]) == (8, 16)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    (logits, aux), (expected, _) = call(model, images), call(best, images)
    np.testing.assert_array_equal(logits, expected)
    assert aux["kept"].shape == (2, 16)
    table = tif_jax.read_impact(workdir)
    assert table.impact.shape == (32, 64)


def test_the_filter_stays_while_the_rest_is_fine_tuned(finished):
    _, workdir = finished
    before, _ = load_params(workdir / "filter" / "checkpoints")
    after, _ = load_params(workdir / "finetune" / "tif-0.25-0" / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, before.pop("reducer"), after.pop("reducer"))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


PRIOR = ["--config.reducer.name=prior"]


def test_an_adapter_learns_behind_the_filter_and_is_fine_tuned(finished, tmp_path):
    config, workdir = finished
    for stage in ("backbone", "impact", "filter"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / stage).symlink_to(workdir / stage)
    own = "    config.reducer.adapter = 8\n    config.adapter = dict(num_epochs=1.0, batch_size=16)\n"
    own += "    config.finetune.phases = ()\n    return config"
    (tmp_path / "adapter.py").write_text(config.read_text().replace("    return config", own))
    settings = ["--config", str(tmp_path / "adapter.py"), "--workdir", str(tmp_path / "run")]
    for stage in ("adapter", "finetune"):
        assert main(["train", f"--stage={stage}", *settings]) == 0
    folders = (workdir / "filter", tmp_path / "run/adapter", tmp_path / "run/finetune/tif-0.25,adapter=8-0")
    fitted, adapted, tuned = (load_params(folder / "checkpoints")[0] for folder in folders)
    learned, tuned_adapter = adapted["reducer"].pop("adapter"), tuned["reducer"].pop("adapter")
    jax.tree.map(np.testing.assert_array_equal, fitted, adapted)
    jax.tree.map(np.testing.assert_array_equal, fitted["reducer"], tuned["reducer"])
    for params in (learned, jax.tree.map(np.subtract, tuned_adapter, learned)):
        assert np.abs(params["to_patches"]["kernel"]).max() > 0
    assert {"teacher_kl", "agreement"} <= set(metrics_log.read(tmp_path / "run" / "adapter")[0])
    then = ["--config.reducer.then={'name': 'tome', 'num_merged': 2}", "--config.reducer.budget=0.002"]
    followed = config_file.load(str(tmp_path / "adapter.py"), [*then, "--config.filter.keep_ratio=0.25"])
    for stage in ("filter", "adapter"):  # the same, whatever comes then
        stages.train(stage, followed, tmp_path / "run")
    used = config_file.load(
        str(tmp_path / "adapter.py"), [*then, "--config.filter.keep_ratio=0.25", "--config.adapter.as_used=true"]
    )
    (tmp_path / "used").mkdir()
    for stage in ("backbone", "filter"):
        (tmp_path / "used" / stage).symlink_to(workdir / stage)
    stages.train("adapter", used, tmp_path / "used")
    model = tif_jax.load(tmp_path / "used/adapter")
    assert model.reducer.then.num_merged == 2 and cost(model).gmac <= 0.002


def test_pictures_show_what_the_filter_lets_through_whatever_comes_then(finished):
    config, workdir = finished
    model = tif_jax.load(workdir / "filter", then=dict(name="tome", num_merged=2))
    table = shards.read_impact(workdir / "heldout-label")
    shown = pictures(model, config_file.load(str(config), []), table, np.arange(3))
    assert [picture["kept"].sum() for picture in shown] == [16] * 3 and shown[0]["image"].shape == (64, 64, 3)
    np.testing.assert_array_equal(shown[2]["impact"].ravel(), table.impact[2])
    rounded = tif_jax.load(workdir / "filter", round_to=12)
    shown = pictures(rounded, config_file.load(str(config), []), table, np.arange(3))
    assert [picture["kept"].sum() for picture in shown] == [24] * 3  # no special token: 16 of 64, and 8 more


def test_the_prior_is_read_off_the_shards_and_rests(finished):
    config, workdir = finished
    stage = stages.finetune(config_file.load(str(config), PRIOR), workdir)
    labels = keep_labels(shards.read_impact(workdir).impact, "top", 0.25)
    np.testing.assert_array_equal(params_of(stage.model)["reducer"]["logits"], position_prior(labels))
    assert stage.directory == workdir / "finetune" / "prior-0.25-0" and stage.trainable == stages.REDUCER_RESTS
    assert stage.made_from["labels"] == {"labels": "top", "keep_ratio": 0.25}
    above = [*PRIOR, "--config.filter.labels=above", "--config.filter.rho=0.01"]
    other = stages.finetune(config_file.load(str(config), above), workdir)
    assert other.made_from["labels"] == {"labels": "above", "rho": 0.01}
    records.write(stage.directory / "config.json", {"made_from": {}})  # of before: it does not say which labels
    assert "labels" not in stages.finetune(config_file.load(str(config), PRIOR), workdir).made_from
    shutil.rmtree(stage.directory)


def test_a_ladder_is_evaluated(finished, tmp_path, capsys):
    config, workdir = finished
    which = workdir / "backbone" / "checkpoints"
    whole, cheap = load(which), load(which, reducer="norm", keep_ratio=0.25)
    images, labels = everything(config_file.load(str(config), []).data)
    sure = np.sort(confidence(np.asarray(call(cheap, images)[0])))
    adaptive = Adaptive.with_route(whole, [cheap], Route((0, 1), (float(sure[7:9].mean()), ALWAYS)))
    ladder = tmp_path / "half.json"
    ladder.write_text(json.dumps(described(adaptive, [{"name": "norm", "keep_ratio": 0.25}])))
    settings = ["--config", str(config), "--workdir", str(workdir), "--ladder", str(ladder)]
    assert main(["evaluate", "--stage=backbone", *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == records.read(workdir / "backbone" / "ladder-half.json")
    answers = adaptive(images)
    assert found["num_images"] == len(images) and {*answers.rung} == {0, 1}
    right = answers.logits.argmax(axis=1) == labels
    same = answers.logits.argmax(axis=1) == adaptive.whole(images).argmax(axis=1)
    assert [found["top1"], found["agreement"]] == pytest.approx([right.mean(), same.mean()])
    assert found["gmac"] == pytest.approx(answers.gmac.mean())
    assert [rung["share"] for rung in found["rungs"]] == [(answers.rung == 0).mean(), (answers.rung == 1).mean()]
    plain = records.read(workdir / "backbone" / "metrics.json")
    said = [found["whole"][name] for name in ("cross_entropy", "top1", "gmac")]
    assert said == pytest.approx([plain[name] for name in ("loss", "top1", "gmac")], rel=1e-4)
    assert found["settings"] == plain["settings"]
    assert main(["evaluate", "--stage=filter", *settings]) == 2
    assert "--ladder is of models: --stage is 'filter'" in last_line(capsys)


def everything(data):
    """The test images and their labels."""
    batch = next(evaluation_batches(open_source(data, "test"), data, batch_size=len(open_source(data, "test"))))
    return batch["image"], batch["label"]


@pytest.mark.long
def test_the_prior_is_fine_tuned(finished):
    config, workdir = finished
    settings = ["--config", str(config), "--workdir", str(workdir), *PRIOR, "--config.seed=1"]
    assert main(["train", "--stage=finetune", *settings]) == main(["evaluate", *settings]) == 0
    directory = workdir / "finetune" / "prior-0.25-1"
    assert (directory / "metrics.jsonl").exists() and records.read(directory / "metrics.json")["keep_ratio"] == 0.25


def test_cut_in_the_middle_it_ends_the_same(finished, tmp_path, monkeypatch):
    config, workdir = finished
    command = ["train", "--stage", "backbone", "--config", str(config), "--workdir", str(tmp_path)]
    command.append("--config.backbone.save_every=2")
    save = Checkpoints.save

    def save_and_die(self, new, *rest):
        save(self, new, *rest)
        if int(new.step) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", save_and_die)
        main(command)
    assert main(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "backbone" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    whole, cut = (load_params(d / "backbone" / "checkpoints")[0] for d in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_a_run_from_random_weights_of_a_reducer_that_reads_no_impact(tmp_path, request, monkeypatch):
    config, workdir = tmp_path / "tosa.py", tmp_path / "run"
    text = TINY.format(digits=str(request.config.rootpath / "configs" / "digits.py"))
    config.write_text(
        text.replace("depth=1", "depth=2").replace(
            "    return config",
            """    config.seeds = 1
    config.data.num_train = 32
    config.backbone.num_epochs = 0.0
    config.reducer = dict(name="tosa", budget=0.0007)
    config.filter.num_epochs = 1.0
    config.finetune.phases = ()
    config.benchmark.reducers = ("tosa",)
    return config""",
        )
    )
    monkeypatch.setattr(benchmark, "_SECONDS_PER_ROUND", 0.02)
    assert main(["run", "--config", str(config), "--workdir", str(workdir)]) == 0
    report = records.read(workdir / "report.json")
    assert report["filter"] is report["rankings"] is None and report["best"] == "finetune/tosa-0.0007GMAC-0"
    assert "What the filter knows" not in (workdir / "report.md").read_text()
    assert not [name for name in ("impact", "heldout-label", "filter", "tokens.png") if (workdir / name).exists()]

    fitted, _ = load_params(workdir / "filter-tosa" / "checkpoints")
    tuned, stored = load_params(workdir / report["best"] / "checkpoints")
    assert list(fitted["reducer"]) == ["selector_1"]
    assert np.abs(fitted["reducer"]["selector_1"]["second"]["kernel"]).max() > 0  # from 0
    jax.tree.map(np.testing.assert_array_equal, fitted["reducer"], tuned["reducer"])
    assert "budget" not in stored["reducer"] and 0 < stored["reducer"]["keep_ratio"] < 1
    assert tif_jax.cost(tif_jax.load(workdir)).gmac <= 0.0007

    # Who goes on with it keeps as many: another machine would measure, or another version count, another number.
    def solved_anew(*_):
        raise AssertionError

    monkeypatch.setattr("tif_jax.models.build._solved", solved_anew)
    going_on = stages.finetune(config_file.load(str(config), []), workdir)
    assert going_on.model.reducer.keep_ratio == stored["reducer"]["keep_ratio"]
    assert going_on.reducer == {"name": "tosa", "budget": 0.0007}
