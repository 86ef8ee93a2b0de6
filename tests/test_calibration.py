"""Calibration: blocks run apart against whole models, the search against all schedules there are, mistakes."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import lively, mostly_long, numpy_images
from flax import nnx
from pictures import picture
from small_project import forget_handlers, last_line
from test_compare import make

from tif_jax import cost, load
from tif_jax.__main__ import main
from tif_jax.calibration import apart as apart_module
from tif_jax.calibration import calibrate
from tif_jax.calibration.apart import Apart
from tif_jax.calibration.calibrate import Calibration, Models
from tif_jax.calibration.search import Descent, Problem, _candidates, search
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.reducer_entry import read_entry
from tif_jax.models.budget import read_budget
from tif_jax.models.params import params_of
from tif_jax.reducers.importance_merge import ImportanceMerge

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
STEPWISE = ("importance_merge", "mctf", "tome")


MEAN = dict(pool="mean", rotary="rope_vit", num_registers=1)


@pytest.mark.parametrize(
    ("name", "fields"), mostly_long([(name, fields) for name in STEPWISE for fields in ({}, MEAN)], short=(1, 2))
)
def test_blocks_run_apart_are_the_model(name, fields):
    """With any numbers, whatever was held before; and they cost as much."""
    full = lively(TINY | fields)
    images = numpy_images(6, (32, 32), 0)
    apart = Apart(lively(TINY | fields, reducer=name, num_merged=(0, 0, 0)), [images[:4], images[4:]])
    whole = np.asarray(jax.jit(lambda x: full(x)[0])(images))
    np.testing.assert_allclose(apart.whole, whole, atol=1e-5)
    rest = cost(full).gmac - apart.gmac((0, 0, 0))
    for schedule in [(3, 2, 0), (3, 0, 0)]:
        model = lively(TINY | fields, reducer=name, num_merged=schedule)
        reduced = np.asarray(jax.jit(lambda x, model=model: model(x)[0])(images))
        np.testing.assert_allclose(apart.logits(schedule), reduced, atol=1e-5)
        moved = (reduced - reduced.mean(axis=1, keepdims=True)) - (whole - whole.mean(axis=1, keepdims=True))
        np.testing.assert_allclose(apart.distance(schedule), np.sqrt((moved**2).mean(axis=1)), atol=1e-5)
        assert apart.gmac(schedule) + rest == pytest.approx(cost(model).gmac, rel=1e-6)
        apart.hold(schedule)


def test_blocks_behind_a_filter_run_apart_are_the_model():
    """Fewer tokens arrive at the first block, with what the adapter adds; what is to be kept is said without either."""

    def with_schedule(schedule):
        then = dict(name="importance_merge", num_merged=schedule)
        return lively(TINY, reducer="tif", keep_ratio=0.5, adapter=4, then=then)

    images, full = numpy_images(6, (32, 32), 0), lively(TINY)
    nnx.update(full, {name: of for name, of in params_of(with_schedule((0, 0, 0))).items() if name != "reducer"})
    apart = Apart(with_schedule((0, 0, 0)), [images[:4], images[4:]])
    np.testing.assert_allclose(apart.whole, np.asarray(jax.jit(lambda x: full(x)[0])(images)), atol=1e-5)
    assert apart.num_patches == 8
    model = with_schedule((3, 2, 0))
    np.testing.assert_allclose(apart.logits((3, 2, 0)), np.asarray(jax.jit(lambda x: model(x)[0])(images)), atol=1e-5)
    rest = cost(with_schedule((0, 0, 0))).gmac - apart.gmac((0, 0, 0))
    assert apart.gmac((3, 2, 0)) + rest == pytest.approx(cost(model).gmac, rel=1e-6)


def test_programs_do_not_pile_up(monkeypatch):
    """Of many schedules: a process that maps too many pieces of memory dies."""
    monkeypatch.setattr(apart_module, "_MOST_PROGRAMS", 4)
    apart = Apart(lively(TINY, reducer="tome", num_merged=(0, 0, 0)), [numpy_images(2, (32, 32), 0)])
    schedules = [(r, 0, 0) for r in range(8)]
    first = [apart.logits(schedule) for schedule in schedules]
    for schedule, expected in zip(schedules, first, strict=True):
        np.testing.assert_array_equal(apart.logits(schedule), expected)
        assert sum(of._cache_size() for of in apart_module._jitted) <= 4


def test_a_last_block_of_which_no_patch_is_read_is_not_searched():
    of_class, of_mean = (
        Apart(lively(TINY | f, reducer="tome"), [numpy_images(2, (32, 32), 0)]) for f in ({}, dict(pool="mean"))
    )
    assert (of_class.num_free, of_mean.num_free) == (2, 3)


@pytest.mark.parametrize(("fields", "options"), [({}, dict(one_step_ahead=True)), (dict(pool="mean"), {})])
def test_a_schedule_is_one_that_the_reducer_follows(fields, options):
    """MCTF leaves the first block alone, one step ahead, else the last one."""
    full = lively(TINY | fields)

    def with_schedule(numbers):
        return lively(TINY | fields, reducer="mctf", num_merged=numbers, **options)

    nothing = with_schedule((0,) * 3)
    calibration = Calibration(Models(full, with_schedule), np.asarray(numpy_images(64, (32, 32), 0)))
    found = calibration.within(0.85 * cost(nothing).gmac)
    assert any(found.schedule) and found.gmac <= 0.85 * cost(nothing).gmac
    assert with_schedule(found.schedule).reducer.per_block(3, 16) == found.schedule


def test_a_speed_that_is_not_met_is_told(monkeypatch, caplog):
    """Whatever is tried, the whole model is only 1.2 times as fast."""
    full = lively(TINY)
    calibration = Calibration(
        Models(full, lambda numbers: lively(TINY, reducer="tome", num_merged=numbers)),
        np.asarray(numpy_images(64, (32, 32), 0)),
    )
    times = {"full": 1.2, "reduced": 1.0}
    monkeypatch.setattr(calibrate, "seconds_of", lambda *_: lambda schedule: 1.2 - 0.05 * sum(schedule))
    monkeypatch.setattr(calibrate, "measured", lambda models, size: {name: times[name] for name in models})
    with caplog.at_level("WARNING"):
        found = calibration.within(read_budget("1.5x at 2"))
    assert found.images_per_second == {"full": 2 / 1.2, "reduced": 2.0}
    assert "budget 1.5x at 2 is not met: the schedule is for 2 images/s, 1.2 times" in caplog.text


def test_a_speed_is_judged_beside_all_tokens_in_the_same_round(monkeypatch):
    """The machine came to half of its speed meanwhile: the medians alone would say 2.9 times, the rounds say 1.7."""
    full = lively(TINY)
    calibration = Calibration(
        Models(full, lambda numbers: lively(TINY, reducer="tome", num_merged=numbers)),
        np.asarray(numpy_images(64, (32, 32), 0)),
    )
    rounds = {"full": np.array([1.0, 1.0, 2.0, 2.0, 2.0]), "reduced": np.array([0.6, 0.6, 1.2, 1.2, 0.7])}
    searched = []
    monkeypatch.setattr(calibrate, "seconds_of", lambda *_: lambda schedule: 2 - 0.1 * sum(schedule))
    monkeypatch.setattr(calibrate, "measured", lambda models, size: {name: rounds[name] for name in models})
    monkeypatch.setattr(calibration, "_search", lambda cost, budget: searched.append(budget) or (4, 4, 4))
    calibration.within(read_budget("1.65x at 2"))
    assert searched == [2 / 1.65]  # met, and not by far


def problem(weights, budget, num_patches=8, depth=3):
    """Divergence: the square of what each block takes, by its weight; cost: tokens behind blocks."""

    def left(schedule):
        return [num_patches - sum(schedule[: i + 1]) for i in range(depth)]

    return Problem(
        distance=lambda s: np.array([sum(w * (num_patches - n) ** 2 for w, n in zip(weights, left(s), strict=True))]),
        cost=lambda s: float(sum(left(s))),
        hold=lambda s: None,
        most=lambda place, n: n - 1,
        num_patches=num_patches,
        num_places=depth,
        num_free=depth,
        budget=budget,
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (9.0, 1.0, 4.0), (1.0, 5.0, 0.1)])
@pytest.mark.parametrize("budget", [20.0, 13.0, 8.0, 3.0])
def test_the_search_finds_the_best_of_all_schedules(weights, budget):
    """Of a convex problem: no local minimum is another."""
    given = problem(weights, budget)
    every = [s for s in itertools.product(range(8), repeat=3) if sum(s) < 8 and given.cost(s) <= budget]
    found = search(given, given, Descent(given, 2), 1)
    assert given.cost(found) <= budget and sum(found) < 8
    assert given.distance(found)[0] == pytest.approx(min(given.distance(s)[0] for s in every))


def test_much_at_the_first_place_is_found_where_a_little_does_not_pay():
    """What goes there has a price of its own, whatever its number: no single step and no exchange gets there."""
    given = problem((1.0,) * 3, 20.0, num_patches=16)
    given = given._replace(distance=lambda s: np.array([40.0 * min(s[0], 4) + s[0] + s[1] ** 2 + s[2] ** 2]))
    every = [s for s in itertools.product(range(16), repeat=3) if sum(s) < 16 and given.cost(s) <= 20.0]
    best = min(every, key=lambda s: given.distance(s)[0])
    assert Descent(given, 2).within(20.0)[0] < 4 < best[0]
    assert search(given, given, Descent(given, 2), 1) == best


def test_a_candidate_keeps_order_and_limits():
    found = _candidates(problem((1.0,) * 3, 0.0), (2, 2, 2), -2)
    assert found == {0: (4, 0, 2), 1: (2, 4, 0), 2: (2, 2, 3)}  # behind the last one stays
    assert _candidates(problem((1.0,) * 3, 0.0), (2, 2, 2), 2) == {0: (0, 4, 2), 1: (2, 0, 4), 2: (2, 2, 0)}
    no_last = problem((1.0,) * 3, 0.0)._replace(num_free=2)
    assert _candidates(no_last, (2, 2, 0), 2) == {0: (0, 4, 0), 1: (2, 0, 0)}
    follows = problem((1.0,) * 3, 0.0)._replace(follows=lambda schedule: not schedule[0])
    assert _candidates(follows, (0, 2, 2), -2) == {1: (0, 4, 0), 2: (0, 2, 4)}


def test_a_budget_out_of_reach():
    with pytest.raises(InputError, match=r"budget 2 can not be met: with as few tokens as can be it takes 3"):
        Descent(problem((1.0,) * 3, 2.0), 1).within(2.0)


def test_budgets_share_the_way_down():
    """In any order, each finds what it finds alone."""
    given = problem((9.0, 1.0, 4.0), 0.0)
    asked = []
    counted = given._replace(distance=lambda s: asked.append(s) or given.distance(s))
    descent = Descent(counted, 2)
    for budget in (13.0, 8.0, 20.0, 5.0):
        assert descent.within(budget) == Descent(given, 2).within(budget)
    number = len(asked)
    assert descent.within(5.0) == descent.within(5.0) and len(asked) == number
    alone = Descent(given._replace(distance=lambda s: asked.append(s) or given.distance(s)), 2)
    alone.within(5.0)
    assert len(asked) == 2 * number


@pytest.fixture
def photos(tmp_path, monkeypatch):
    make(tmp_path)
    for i in range(70):
        picture(100 + i).save(tmp_path / "photos" / "b" / f"{100 + i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    forget_handlers()
    return main(line.split())


LINE = "calibrate --weights w.safetensors --images photos --out found.json"
MERGING = "--reducer importance_merge"


def test_the_program_and_who_takes_its_file(photos, capsys):
    full = load("w.safetensors")
    budget = 0.9 * cost(full).gmac
    assert not run(f"{LINE} --budget {budget} {MERGING}")
    said = json.loads(Path("found.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1] == "found.json"
    reduced = load("w.safetensors", reducer="found.json")
    assert reduced.reducer == ImportanceMerge(tuple(said["reducer"]["num_merged"]))
    assert 0.8 * budget < cost(reduced).gmac <= budget
    assert cost(reduced).gmac == pytest.approx(said["calibration"]["gmac"])
    assert read_entry("found.json", "reducer").described == {
        **said["reducer"],
        "num_merged": reduced.reducer.num_merged,
    }
    assert read_entry({"name": "found.json"}, "reducer") == read_entry("found.json", "reducer")
    for line in ("--config.reducer.name=found.json", "--config.reducer=found.json"):
        assert config_file.load("digits", [line]).reducer == read_entry("found.json", "reducer")
    assert not run("compare --weights w.safetensors --images photos --reducer found.json --batch-sizes none --out out")
    rows = json.loads(Path("out/compare.json").read_text())["rows"]
    assert [row["gmac"] for row in rows.values()][1] == pytest.approx(cost(reduced).gmac)


def test_several_budgets_and_who_takes_their_folder(photos, capsys):
    """A schedule for each, which `compare` takes under its budget."""
    whole = cost(load("w.safetensors")).gmac
    budgets = [f"{share * whole:.3g}" for share in (0.95, 0.9)]
    line = " ".join(f"--budget {budget}" for budget in budgets)
    assert not run(f"calibrate --weights w.safetensors --images photos {line} --out found {MERGING}")
    found = {budget: json.loads(Path(f"found/{budget}.json").read_text()) for budget in budgets}
    assert not run(f"{LINE} --budget {budgets[1]} {MERGING}")
    assert json.loads(Path("found.json").read_text())["reducer"] == found[budgets[1]]["reducer"]
    line = f"{line} --reference found --batch-sizes none --out out"
    assert not run(f"compare --weights w.safetensors --images photos --reducer found --reducer tome {line}")
    rows = json.loads(Path("out/compare.json").read_text())["rows"]
    for budget in budgets:
        own, tome = (
            next(row for row in rows.values() if row["budget"] == budget and row["given"] == given)
            for given in ("found", "tome")
        )
        assert own["reducer"]["num_merged"] == found[budget]["reducer"]["num_merged"]
        assert tome["to_reference"]["label"] == own["label"]
    assert not run("compare --weights w.safetensors --images photos --reducer found --batch-sizes none --out all")
    assert len(json.loads(Path("all/compare.json").read_text())["rows"]) == 3
    capsys.readouterr()
    line = "compare --weights w.safetensors --images photos --reducer found --budget 7x --out out"
    assert run(f"{line} --batch-sizes 1,32") == 2
    assert "there is no found/7x.json: `tif calibrate` makes one schedule for each --budget" in last_line(capsys)
    assert run(line) == 2  # where the others are found in batches of 256
    assert "no found/7x@256.json: " in (told := last_line(capsys)) and "'7x' means '7x at 256' here" in told


def test_a_budget_of_speed(photos):
    assert not run(f"{LINE} --budget 0.3x --reducer tome")
    said = json.loads(Path("found.json").read_text())
    assert set(said["calibration"]["images_per_second"]) == {"full", "reduced"}
    assert said["reducer"] == {"name": "tome", "num_merged": [0, 0]}  # all tokens are fast enough


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--budget 0.5 --num-images 10", "10 images are too few to calibrate with; give 64 or more"),
        ("--budget fast", "--budget is 'fast'; it is a number of GMAC"),
        ("--budget 1e-9", "budget 1e-09 can not be met"),
        ("--budget 1 --reducer evit", "--reducer is evit, which merges no number of tokens"),
        ("--budget 1 --reducer tome:num_merged=3", "num_merged is what a calibration finds: leave it out"),
        (
            "--budget 1 --reducer tif:keep_ratio=0.5",
            "--reducer is tif:keep_ratio=0.5, which merges no number of tokens",
        ),
        (
            "--budget 1 --reducer {'name':'tif','then':{'name':'tome','num_merged':3}}",
            "num_merged is what a calibration",
        ),
        (
            "--budget 1 --reducer {'name':'tif','budget':1,'then':{'name':'tome'}}",
            "leave its budget out: --budget says it",
        ),
        ("--budget 1 --reducer {'name':'tif','then':{'name':'tome'}}", "w.safetensors has no reducer/filter"),
        ("--budget 1 --out found", "--out is 'found'; it is a file on this machine whose name ends in .json"),
        ("--budget 1 --budget 2x", "--out is 'found.json'; it is a folder on this machine, for several budgets"),
    ],
)
def test_mistakes_of_the_program(photos, capsys, line, message):
    assert run(f"{LINE} {line}") == 2
    assert message in last_line(capsys)
    assert not Path("found.json").exists()


def test_no_other_file_is_replaced(photos, capsys):
    before = Path("config.json").read_bytes()
    assert run(f"{LINE.replace('found.json', 'config.json')} --budget 1") == 2
    assert "config.json is there already and no such file; choose another --out" in last_line(capsys)
    assert Path("config.json").read_bytes() == before


def test_files_that_describe_no_reducer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    for name, message in [("none.json", "can not be read"), ("list.json", "describes no reducer")]:
        with pytest.raises(InputError, match=message):
            read_entry(name, "reducer")
