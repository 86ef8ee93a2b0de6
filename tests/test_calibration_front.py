"""Calibration of what goes in front of the first block, and the clock."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import lively, numpy_images
from test_calibration import LINE, TINY, run
from test_calibration import photos as photos  # a fixture

from tif_jax import cost, load
from tif_jax.calibration import seconds
from tif_jax.calibration.apart import Apart
from tif_jax.calibration.calibrate import Calibration, Models
from tif_jax.errors import InputError


@pytest.mark.parametrize("front", [dict(reducer="even"), dict(reducer="tif", adapter=4)])
def test_what_goes_in_front_is_the_first_number_of_a_schedule(front):
    """Run apart it is the whole model, at the same cost, whatever was held before; with nothing gone that with all tokens."""

    def with_schedule(schedule):
        then = dict(name="importance_merge", num_merged=schedule[1:])
        return lively(TINY, keep_ratio=(16 - schedule[0]) / 16, then=then, **front)

    images, nothing = numpy_images(6, (32, 32), 0), with_schedule((0, 0, 0, 0))
    apart = Apart(nothing, [images[:4], images[4:]], searches_front=True)
    assert (apart.num_patches, apart.num_places, apart.num_free) == (16, 4, 3)
    np.testing.assert_allclose(apart.whole, np.asarray(jax.jit(lambda x: nothing(x)[0])(images)), atol=1e-5)
    rest = cost(nothing).gmac - apart.gmac((0, 0, 0, 0))
    for schedule in [(5, 3, 0, 0), (5, 0, 2, 0), (0, 3, 0, 0)]:
        model = with_schedule(schedule)
        reduced = np.asarray(jax.jit(lambda x, model=model: model(x)[0])(images))
        np.testing.assert_allclose(apart.logits(schedule), reduced, atol=1e-5)
        assert apart.gmac(schedule) + rest == pytest.approx(cost(model).gmac, rel=1e-6)
        apart.hold(schedule)
    assert apart.most(0, 16) == 15 and apart.follows((5, 3, 0, 0))
    rounded = Apart(
        lively(TINY, keep_ratio=1.0, round_to=4, then=dict(name="tome"), **front), [images], searches_front=True
    )
    # With the class token a multiple of 4: 3, 7, 11 and 15 patches, or all.
    assert [rounded.left_at(0, n, True) for n in (16, 13, 11, 9, 2, 1)] == [16, 15, 11, 11, 3, 3]
    assert [rounded.left_at(0, n, False) for n in (16, 15, 13, 11, 9, 2, 1)] == [16, 15, 11, 11, 7, 3, 3]
    assert rounded.left_at(1, 9, True) == 9
    assert rounded.most(0, 16) == 15 and rounded.most(1, 16) == 8  # tome merges half at most


@pytest.mark.parametrize(("name", "budget", "left"), [("even", 0.5, (3, 7, 11)), ("tif", 0.75, (3, 7, 11, 15, 16))])
def test_round_to_is_kept_to(name, budget, left):
    """The search moves from one number to the next that the front can leave."""
    full = lively(TINY)

    def with_schedule(schedule):
        then = dict(name="tome", num_merged=schedule[1:])
        return lively(TINY, reducer=name, keep_ratio=(16 - schedule[0]) / 16, round_to=4, then=then)

    images = np.asarray(numpy_images(64, (32, 32), 0))
    found = Calibration(Models(full, with_schedule, searches_front=True), images).within(budget * cost(full).gmac)
    assert 16 - found.schedule[0] in left
    with pytest.raises(InputError, match="is no `Fronted`"):
        Calibration(Models(full, lambda s: lively(TINY, reducer="tome", num_merged=s[1:]), searches_front=True), images)


def test_what_goes_in_front_is_found_too(photos, capsys):
    """Unless keep_ratio says it; a front that leaves nothing out is not in the file."""
    whole = cost(load("w.safetensors")).gmac
    assert not run(f"{LINE} --budget {0.5 * whole}")
    found = json.loads(Path("found.json").read_text())["reducer"]
    assert found["name"] == "even" and found["then"]["name"] == "importance_merge"
    kept = round(16 * found["keep_ratio"])
    assert found["keep_ratio"] == kept / 16 < 1
    said = " ".join(map(str, found["then"]["num_merged"]))
    assert f"left out before the first block: {16 - kept}; merged in each block: {said}" in capsys.readouterr().out
    assert 0.4 * whole < cost(load("w.safetensors", reducer="found.json")).gmac <= 0.5 * whole
    assert not run(f"{LINE} --budget {2 * whole}")
    assert json.loads(Path("found.json").read_text())["reducer"] == {
        "name": "importance_merge",
        "num_merged": [0, 0],
    }
    front = "{'name':'even','keep_ratio':0.75,'then':{'name':'tome'}}"
    assert not run(f"{LINE} --budget {0.75 * whole} --reducer {front}")
    found = json.loads(Path("found.json").read_text())["reducer"]
    assert found["keep_ratio"] == 0.75 and found["then"]["name"] == "tome"


@pytest.mark.parametrize("has_front", [False, True])
@pytest.mark.parametrize("has_lean", [True, False])
def test_seconds_of_a_schedule_are_those_of_its_blocks(monkeypatch, has_lean, has_front):
    """A machine that takes 2 s and 3 ms for each token that arrives, 5 for each that leaves, and 7 s if any go; for a last
    block of which no patch is read 1 s and 10 ms for each; in front 3 s and 20 ms for each that
    goes, and 1 s where none does; 4 s more in all."""
    of_block = lambda n, r: 2 + 0.003 * n + 0.005 * (n - r) + 7 * (r > 0)  # noqa: E731
    of_last = lambda n: 1 + 0.01 * n if has_lean else of_block(n, 0)  # noqa: E731

    def in_rounds(turns, rounds):
        assert rounds > 1 and any(isinstance(turn, int) for turn in turns) == has_lean
        of_front = {
            turn: 1 + (turn[1] > 0) * (3 + 0.02 * turn[1])
            for turn in turns
            if isinstance(turn, tuple) and turn[0] == "front"
        }
        assert bool(of_front) == has_front
        times = {None: 4 + 2 * of_block(16, 0) + of_last(16)}
        of_blocks = [turn for turn in turns if turn and turn not in of_front]
        times |= {turn: of_block(*turn) if isinstance(turn, tuple) else of_last(turn) for turn in of_blocks} | of_front
        return {turn: [times[turn]] for turn in turns}

    monkeypatch.setattr(seconds.timing, "in_rounds", in_rounds)
    fields = TINY | dict(lean_last_block=has_lean)
    merging = dict(name="importance_merge", num_merged=(0, 0, 0))
    reducer = (
        dict(reducer="even", keep_ratio=1.0, then=merging) if has_front else dict(reducer=merging.pop("name")) | merging
    )
    model = lively(fields, **reducer)
    apart = Apart(model, [np.asarray(numpy_images(2, (32, 32), 0))], has_front)
    of, nothing = seconds.seconds_of(apart, model, 2), (0,) * has_front
    assert of((*nothing, 0, 0, 0)) == pytest.approx(4 + 2 * of_block(16, 0) + of_last(16))
    assert of((*nothing, 5, 3, 0)) == pytest.approx(4 + of_block(16, 5) + of_block(11, 3) + of_last(8))
    if has_front:
        expected = 4 + 3 + 0.02 * 2 + of_block(14, 5) + of_block(9, 3) + of_last(6)
        assert of((2, 5, 3, 0)) == pytest.approx(expected)
