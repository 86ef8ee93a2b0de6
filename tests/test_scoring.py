"""The oracle over several devices and within their memory."""

import functools
import sys

import jax
import numpy as np
import pytest
from cases import call, mostly_long, numpy_model
from jax.errors import JaxRuntimeError
from scipy.special import log_softmax

from tif_jax.errors import WorkError
from tif_jax.impact import scoring
from tif_jax.impact.scoring import Scorer
from tif_jax.impact.token_impact import token_impact

EXACT = dict(estimator="exact", mask="zero", target="label", num_samples=1, keep_ratio=0.5)


@pytest.fixture(scope="module")
def model():
    return numpy_model(dict(image_size=24, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3))


def inputs(num_images):
    images = np.random.default_rng(0).normal(size=(num_images, 24, 24, 3)).astype(np.float32)
    return images, np.arange(num_images, dtype=np.int32) % 3


@pytest.fixture(scope="module")
def impact(model):
    """Of the first images, on one device: (num_images, **options) -> (num_images, 9)."""

    @functools.cache
    def of_all(**options):
        return np.asarray(token_impact(model, *inputs(16), **options))

    return lambda num_images, **options: of_all(**options)[:num_images]


SAMPLED = dict(estimator="sampled", mask="drop", num_samples=5)
GRADIENT = dict(estimator="gradient", mask="drop")


@pytest.mark.parametrize(
    "num_images, mesh, changes",
    mostly_long(
        [
            (n, mesh, changes)
            for changes in ({}, SAMPLED, GRADIENT)
            for n, mesh in ((2, (2, 4)), (6, (2, 4)), (16, (8, 1)))
        ],
        short=(1, 2, 3),
    ),
)
def test_any_number_of_images_on_eight_devices_is_the_same_as_on_one(model, impact, num_images, mesh, changes):
    options = EXACT | changes
    images, labels = inputs(num_images)
    np.testing.assert_array_equal(images, inputs(16)[0][:num_images])
    scorer = Scorer(model, num_images, chunk=7, **options)
    units = {"exact": 9, "sampled": 5, "gradient": 1}[options["estimator"]]
    assert scorer.mesh.devices.shape == (mesh[0], min(mesh[1], units)) and scorer.units_per_image == units
    scores = scorer(images, labels)()
    expected = impact(num_images, **options)
    assert scores.impact.shape == (num_images, 9) and np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(scores.impact, expected, atol=1e-6)
    logits = np.asarray(call(model, inputs(16)[0])[0])[:num_images]
    np.testing.assert_array_equal(scores.prediction, logits.argmax(axis=1))
    np.testing.assert_allclose(scores.loss, -log_softmax(logits, axis=1)[np.arange(num_images), labels], atol=1e-5)
    text = scorer.program.as_text()
    assert not any(op in text for op in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize(
    "options", [dict(estimator="exact"), dict(estimator="sampled", num_samples=5), dict(estimator="gradient")]
)
def test_seeds_labels_and_numbers_of_images_share_one_program(model, options, monkeypatch):
    """And each image's impact is what it is alone, on eight devices that few images do not fill evenly."""
    images, labels, programs = *inputs(11), set()
    scores_on = scoring.scores_on

    def noted(*given, **options):
        programs.add(found := scores_on(*given, **options))
        return found

    monkeypatch.setattr(sys.modules[token_impact.__module__], "scores_on", noted)
    whole = np.asarray(token_impact(model, images, labels, **options))
    token_impact(model, images[:3], labels[:3][::-1], seed=1, **options)
    alone = np.concatenate([token_impact(model, images[i : i + 1], labels[i : i + 1], **options) for i in range(3)])
    np.testing.assert_allclose(alone, whole[:3], atol=1e-6)
    assert np.abs(whole).max() > 1e-4 and token_impact(model, images[:0], labels[:0], **options).shape == (0, 9)
    (program,) = programs
    assert program._cache_size() == 1


def test_impact_in_a_program_of_the_callers(model):
    images, labels = inputs(3)
    for options in (dict(mask="drop", chunk=4), dict(estimator="sampled", num_samples=2, seed=3)):
        inside = jax.jit(lambda x, y, options=options: token_impact(model, x, y, **options))(images, labels)
        np.testing.assert_allclose(inside, token_impact(model, images, labels, **options), atol=1e-6)


@pytest.mark.parametrize(
    "estimator, chunk",
    mostly_long([(e, chunk) for e in ("exact", "sampled") for chunk in (1, 5, 100)], short=(0, 5)),
)
def test_the_chunk_changes_nothing(model, impact, chunk, estimator):
    """Chunks smaller than the batch take a few images at a time, larger ones several masks of each."""
    images, labels = inputs(6)
    options = EXACT | dict(estimator=estimator, mask="drop", num_samples=7)
    scores = Scorer(model, 6, devices=jax.devices()[:1], chunk=chunk, **options)(images, labels)()
    np.testing.assert_allclose(scores.impact, impact(6, **options), atol=1e-6)


def test_the_chunk_fits_into_the_free_memory(model, monkeypatch):
    compiled, programs = Scorer._compiled, {}

    def compiled_once(scorer, chunk):
        if chunk not in programs:
            programs[chunk] = compiled(scorer, chunk)
        return programs[chunk]

    monkeypatch.setattr(Scorer, "_compiled", compiled_once)
    options = EXACT | dict(devices=jax.devices()[:1])
    large, small = (Scorer(model, 2, chunk=chunk, **options) for chunk in (16, 4))
    between = (scoring._memory_needed(large.program) + scoring._memory_needed(small.program)) / 2
    monkeypatch.setattr(scoring, "_free_memory", lambda device: between)
    fitted = Scorer(model, 2, chunk=16, **options)
    assert fitted.chunk in (4, 8) and scoring._memory_needed(fitted.program) <= between
    monkeypatch.setattr(scoring, "_free_memory", lambda device: 0)
    assert Scorer(model, 2, chunk=16, **options).chunk == 1  # what free memory says may be wrong: the device decides


def test_out_of_memory_halves_the_chunk_says_so_once_and_loses_nothing(model, impact, monkeypatch, caplog):
    images, labels = inputs(2)
    expected = impact(2, **EXACT)
    scorer = Scorer(model, 2, devices=jax.devices()[:1], chunk=8, **EXACT)

    def full(*_):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    scorer.program = full
    waits = [scorer(images, labels), scorer(images, labels)]  # the second is under way when the first fails
    for wait in waits:
        np.testing.assert_allclose(wait().impact, expected, atol=1e-6)
    assert scorer.chunk == 4 and len(caplog.records) == 1
    assert "out of memory with 8 masked images at once" in caplog.text
    monkeypatch.setattr(scorer, "_compiled", lambda chunk: full)
    monkeypatch.setattr(scoring, "_memory_needed", lambda program: 0)
    scorer.program = full
    with pytest.raises(WorkError, match="one masked image does not fit"):
        scorer(images, labels)()
    assert scorer.chunk == 1


def test_other_failures_of_a_device_are_not_hidden(model):
    scorer = Scorer(model, 2, **EXACT)

    def broken(*_):
        raise JaxRuntimeError("INTERNAL: the device is lost")

    scorer.program = broken
    with pytest.raises(JaxRuntimeError, match="device is lost"):
        scorer(*inputs(2))()
