"""What the frozen model makes of the best tokens of rankings."""

import jax
import numpy as np
import pytest
from cases import numpy_images, numpy_model
from scipy.special import log_softmax

from tif_jax.impact import judge
from tif_jax.impact.rankings import filter_ranking, untrained_rankings
from tif_jax.runtime.mesh import make_mesh

VIT = dict(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=5)


@pytest.fixture(scope="module")
def seen():
    """A model with a filter; six images in batches of four, the last padded; as many random numbers as tokens; labels."""
    images = np.asarray(numpy_images(6, (16, 16)))
    labels = np.arange(6, dtype=np.int32) % 5
    batches = [
        {"image": images[:4], "label": labels[:4], "weight": np.ones(4)},
        {"image": images[[4, 5, 5, 5]], "label": labels[[4, 5, 5, 5]], "weight": np.array([1, 1, 0, 0])},
    ]
    ranking = np.random.default_rng(0).random((6, 16), np.float32)
    return numpy_model(VIT, reducer="tif", keep_ratio=0.5), batches, ranking, images, labels


def test_only_the_best_tokens_of_each_image_are_seen(seen):
    model, batches, ranking, images, labels = seen
    rankings = {"random": ranking, "opposite": -ranking}
    unreduced, found = judge.judge_rankings(model, batches, make_mesh(4), rankings, (1.0, 0.25))
    assert {name: list(row) for name, row in found.items()} == {name: [1.0, 0.25] for name in rankings}
    assert unreduced["agreement"] == found["random"][1.0]["agreement"] == 1
    np.testing.assert_allclose(found["random"][1.0]["cross_entropy"], unreduced["cross_entropy"], rtol=1e-5)
    whole = np.asarray(jax.jit(judge.unreduced)(model, images))
    np.testing.assert_allclose(
        unreduced["cross_entropy"], -log_softmax(whole, 1)[np.arange(6), labels].mean(), rtol=1e-5
    )
    for name in rankings:
        logits = jax.jit(lambda x, r: judge.best_alone(model, x, r, 0.25))(images, rankings[name])
        expected = judge.outcome(np.asarray(logits), whole, labels)
        assert found[name][0.25] == pytest.approx(expected, rel=1e-5)
    assert found["random"][0.25]["cross_entropy"] != found["opposite"][0.25]["cross_entropy"]


def test_rows_stay_those_of_their_images_after_one_that_can_not_be_read(seen):
    model, batches, ranking, _, labels = seen
    unreadable = [{**batches[0], "weight": np.array([1, 0, 1, 1])}, batches[1]]
    found, left = judge.over_batches(
        lambda models, images, rows: rows, [model], unreadable, make_mesh(4), {"r": ranking}
    )
    assert list(left) == [labels[i] for i in (0, 2, 3, 4, 5)]
    np.testing.assert_array_equal(found["r"], ranking[[0, 2, 3, 4, 5]])


def test_a_model_that_follows_a_ranking_fares_as_its_best_tokens(seen):
    model, batches, _, _, _ = seen
    mesh = make_mesh(4)

    def rank(models, images, _):
        return {"filter": filter_ranking(models[0], images), **untrained_rankings(models[0], images, 0)}

    rankings, labels = judge.over_batches(rank, [model], batches, mesh)
    assert list(labels) == [0, 1, 2, 3, 4, 0]
    assert {name: ranking.shape for name, ranking in rankings.items()} == {
        name: (6, 16) for name in ("filter", "random", "token norm", "class attention")
    }
    _, found = judge.judge_rankings(model, batches, mesh, {"filter": rankings["filter"]}, (0.5,))
    assert judge.judge_models(model, batches, mesh, {"tif": model})["tif"] == pytest.approx(
        found["filter"][0.5], rel=1e-5
    )


def test_an_image_of_which_no_pixel_counts_is_left_out():
    """Its error is 0, whatever was predicted."""
    found = {"rmse": np.array([0.0, 2.0, 4.0]), "difference": np.array([9.0, 1.0, 2.0]), "valid": np.array([0, 0.5, 1])}
    assert judge._outcome(found, None, np.zeros(3, int)) == {"rmse": 3.0, "difference": 1.5}
