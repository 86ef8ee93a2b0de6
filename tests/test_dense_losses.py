"""Losses and metrics of depth and segmentation: against numbers worked out by hand, and against slow loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tif_jax import tasks
from tif_jax.data.label_maps import IGNORED
from tif_jax.dense_losses import (
    class_counts,
    depth,
    depth_metrics,
    eigen_mask,
    mean_iou,
    scale_invariant_log,
    segmentation,
    valid_depth,
)
from tif_jax.errors import InputError
from tif_jax.training.tasks import of_task  # fmt: skip

RNG = np.random.default_rng(0)


# As one program each.
depth_terms = jax.jit(lambda prediction, labels, aux={}: depth(prediction, aux, {"label_map": labels}))
classes_terms = jax.jit(lambda logits, labels, aux={}: segmentation(logits, aux, {"label_map": labels}))


def depth_of(prediction, truth):
    """The terms of one image of one row of pixels."""
    return {k: float(v[0]) for k, v in depth_terms(*(np.float32(x)[None, None] for x in (prediction, truth))).items()}


def test_depth_by_hand():
    """Two pixels count, with ratios 2 and 1: g is (ln 2, 0), its mean ln 2 / 2, the mean of its square (ln 2)^2 / 2."""
    terms = depth_of([4.0, 3.0, 5.0, 6.0], [2.0, 3.0, 0.0, 10.5])
    ln2 = math.log(2)
    assert terms["loss"] == pytest.approx(10 * math.sqrt(ln2**2 / 2 - 0.85 * ln2**2 / 4), rel=1e-6)
    assert terms == pytest.approx(
        {
            "loss": terms["loss"],
            "abs_rel": (2 / 2 + 0) / 2,
            "rmse": math.sqrt((2**2 + 0) / 2),
            "log10": math.log10(2) / 2,
            "silog": 100 * ln2 / 2,  # sqrt(1/2 - 1/4) ln 2
            "delta1": 0.5, "delta2": 0.5, "delta3": 0.5,
            "valid": 0.5,
        },
        rel=1e-6,
    )  # fmt: skip


def test_ratios_below_the_powers_of_a_quarter_more():
    terms = depth_of([1.2, 1.0, 1.0, 3.0], [1.0, 1.5, 1.9, 1.0])  # ratios 1.2, 1.5, 1.9, 3; the bounds 1.25, 1.56, 1.95
    assert (terms["delta1"], terms["delta2"], terms["delta3"]) == (0.25, 0.5, 0.75)


def test_what_only_the_scale_gets_wrong():
    """Twice too far everywhere: SILog is 0, and of the loss sqrt(1 - 0.85) ln 2 is left, times 10."""
    truth = RNG.uniform(0.5, 4, 50)
    terms = depth_of(2 * truth, truth)
    assert terms["silog"] == pytest.approx(0, abs=1e-4)
    assert terms["loss"] == pytest.approx(10 * math.sqrt(0.15) * math.log(2), rel=1e-5)


def slow_depth(prediction, truth, cap, crop):
    """The metrics of one image, pixel by pixel in float64."""
    pairs = []
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            inside = 45 <= (y + 0.5) * 480 / truth.shape[0] < 471 and 41 <= (x + 0.5) * 640 / truth.shape[1] < 601
            if 0 < truth[y, x] <= cap and (inside or not crop):
                pairs.append((float(prediction[y, x]), float(truth[y, x])))
    number = len(pairs)
    g = [math.log(d) - math.log(t) for d, t in pairs]
    mean, square = sum(g) / number, sum(each**2 for each in g) / number
    clipped = [(min(max(d, 1e-3), cap), t) for d, t in pairs]
    ratios = [max(d / t, t / d) for d, t in clipped]
    of_clipped = [math.log(d / t) for d, t in clipped]
    variance = sum(each**2 for each in of_clipped) / number - (sum(of_clipped) / number) ** 2
    return {
        "loss": 10 * math.sqrt(square - 0.85 * mean**2),
        "abs_rel": sum(abs(d - t) / t for d, t in clipped) / number,
        "rmse": math.sqrt(sum((d - t) ** 2 for d, t in clipped) / number),
        "log10": sum(abs(math.log10(d) - math.log10(t)) for d, t in clipped) / number,
        "silog": 100 * math.sqrt(variance),
        **{f"delta{k}": sum(ratio < 1.25**k for ratio in ratios) / number for k in (1, 2, 3)},
        "valid": number / truth.size,
    }


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("cap", [10.0, 5.0])
def test_depth_is_what_loops_over_pixels_say(cap, crop):
    truth = RNG.uniform(0.5, 11, (3, 24, 32)).astype(np.float32)
    truth[RNG.random(truth.shape) < 0.2] = 0
    prediction = (np.where(truth > 0, truth, 1) * RNG.lognormal(0, 0.4, truth.shape)).astype(np.float32)
    prediction[0, 12, 16] = 1e-4  # nearer than metrics take it
    found = jax.jit(lambda p, t: depth(p, {}, {"label_map": t}, cap=cap, eigen_crop=crop))(prediction, truth)
    for i in range(3):
        slow = slow_depth(prediction[i], truth[i], cap, crop)
        assert {name: float(value[i]) for name, value in found.items()} == pytest.approx(slow, rel=2e-5)


depth_gradient = jax.jit(jax.grad(lambda *given: depth_terms(*given)["loss"].sum()))


@pytest.mark.parametrize(
    "truth", [[2.0, 3.0], [0.0, 0.0], [11.0, 0.0]], ids=["perfect", "unmeasured", "beyond the cap"]
)
def test_gradients_are_0_where_nothing_is_to_learn(truth):
    """Nothing to learn is no NaN: where the prediction is right, and where no pixel counts."""
    given = np.float32([[2.0, 3.0]])[:, None], np.float32([truth])[:, None]
    terms, gradient = depth_terms(*given), depth_gradient(*given)
    assert terms["loss"] == 0 and not gradient.any()
    if truth != [2.0, 3.0]:
        assert not any(float(value[0]) for value in terms.values())


def test_the_gradient_is_that_of_differences():
    with jax.enable_x64():
        truth = RNG.uniform(0.5, 8, (2, 3, 4))
        truth[:, 1, 1] = 0
        start, valid = RNG.uniform(0.5, 8, truth.shape), truth > 0
        loss = jax.jit(lambda prediction: scale_invariant_log(prediction, truth, valid).sum())
        check_grads(loss, (start,), order=1, modes=("rev",))
        assert not jax.grad(loss)(jnp.asarray(start))[:, 1, 1].any()


def test_a_prediction_that_is_no_number_is_not_hidden():
    terms = depth_of([math.nan, 1.0], [1.0, 1.0])
    assert math.isnan(terms["loss"]) and math.isnan(terms["rmse"]) and terms["delta1"] == 0.5
    assert depth_of([math.nan, 1.0], [0.0, 1.0])["rmse"] == 0  # nobody asks what it is there


def test_bfloat16_predictions_are_judged_in_float32(strict_dtypes):
    truth = jnp.full((1, 40, 40), 3.0)
    found = depth_metrics(jnp.full((1, 40, 40), 2.0, jnp.bfloat16), truth, valid_depth(truth, 10.0), 10.0)
    assert found["rmse"].dtype == jnp.float32 and float(found["rmse"][0]) == 1
    assert float(found["abs_rel"][0]) == pytest.approx(1 / 3, rel=1e-5)


def test_the_eigen_crop():
    expected = np.zeros((480, 640), bool)
    expected[45:471, 41:601] = True
    np.testing.assert_array_equal(eigen_mask((480, 640)), expected)
    half = np.zeros((240, 320), bool)  # centres in the frame: 2 y + 1, of which 45 is the first and 469 the last
    half[22:235, 20:300] = True
    np.testing.assert_array_equal(eigen_mask((240, 320)), half)


def test_losses_of_reducers_are_added():
    aux = {"loss/keep": jnp.float32([0.5, 0.25]), "scores": jnp.ones((2, 9))}
    np.testing.assert_allclose(depth_terms(jnp.ones((2, 2, 2)), jnp.ones((2, 2, 2)), aux)["loss"], [0.5, 0.25])
    labels = jnp.full((2, 2, 2), IGNORED)
    np.testing.assert_allclose(classes_terms(jnp.ones((2, 2, 2, 3)), labels, aux)["loss"], [0.5, 0.25])


def test_segmentation_by_hand():
    """Logits (ln 3, 0) are probabilities 3/4 and 1/4. One of the three pixels that count is wrong."""
    logits = jnp.log(jnp.float32([[[[3, 1], [3, 1], [1, 3], [3, 1]]]]))
    labels = jnp.array([[[0, 1, 1, -1]]])
    terms = classes_terms(logits, labels)
    assert float(terms["loss"][0]) == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3, rel=1e-6)
    assert float(terms["pixel_accuracy"][0]) == pytest.approx(2 / 3) and terms["valid"] == 0.75
    counts = jax.jit(class_counts)(logits, labels)
    np.testing.assert_array_equal(counts["labelled"], [[1, 2]])
    np.testing.assert_array_equal(counts["intersection"], [[1, 1]])
    np.testing.assert_array_equal(counts["union"], [[2, 2]])
    assert mean_iou(np.array([1.0, 1.0]), np.array([2.0, 2.0])) == 0.5


def test_miou_of_a_data_set_is_of_summed_counts():
    """Not the mean of the images': a class seen in one image only would count for nothing in the others."""
    logits = RNG.normal(size=(5, 6, 7, 4)).astype(np.float32)
    logits[..., 3] = -9  # never predicted
    labels = RNG.integers(-1, 2, (5, 6, 7))  # 2 is predicted and never labelled, 3 neither
    sums = {name: np.asarray(value).sum(axis=0) for name, value in class_counts(logits, jnp.asarray(labels)).items()}
    predicted, pixels = logits.argmax(axis=-1), labels >= 0
    ious = []
    for each in range(3):
        both = sum(p == each and t == each for p, t in zip(predicted[pixels], labels[pixels], strict=True))
        either = sum(p == each or t == each for p, t in zip(predicted[pixels], labels[pixels], strict=True))
        ious.append(both / either)
    assert ious[2] == 0 and sums["union"][3] == 0
    assert mean_iou(sums["intersection"], sums["union"]) == pytest.approx(np.mean(ious))
    measured = of_task("segmentation").measured({**sums, "loss": 10.0}, 5)
    assert measured == pytest.approx(
        {"loss": 2.0, "miou": np.mean(ious), "pixel_accuracy": (predicted == labels)[pixels].mean()}
    )
    assert math.isnan(mean_iou(np.zeros(2), np.zeros(2)))


def test_segmentation_without_a_label_and_with_one_that_is_no_class():
    logits = jnp.zeros((3, 2, 2, 2))
    labels = jnp.array([[[-1, -1], [-1, -1]], [[0, 1], [2, 0]], [[0, 1], [-1, 1]]])
    terms = classes_terms(logits, labels)
    assert terms["loss"][0] == 0 and terms["valid"][0] == 0
    assert jnp.isnan(terms["loss"][1]) and float(terms["loss"][2]) == pytest.approx(math.log(2), rel=1e-6)
    gradient = jax.jit(jax.grad(lambda p: classes_terms(p, labels)["loss"][0]))(logits)
    assert not gradient.any()


def test_tasks_say_what_decides():
    decides = {name: (task.headline.key, task.headline.higher_is_better) for name, task in tasks.TASKS.items()}
    assert decides == {"classification": ("top1", True), "depth": ("rmse", False), "segmentation": ("miou", True)}
    rmse = tasks.DEPTH.headline
    assert max((0.5, 0.25, 0.75), key=rmse.merit) == 0.25 and (rmse.label, rmse.heading) == ("RMSE (m)", "RMSE m")
    with pytest.raises(InputError, match="the task is 'flow'; it is one of classification, depth, segmentation"):
        of_task("flow")


def test_which_pixels_of_depth_count():
    near = of_task("depth", max_depth=5.0)
    batch = {"label_map": jnp.float32([[[4.0, 6.0]]])}
    assert near.loss(batch["label_map"], {}, batch)["valid"] == 0.5
    ones = jnp.ones((1, 24, 32))
    cropped = of_task("depth", eigen_crop=True)
    assert float(cropped.terms(ones, {}, {"label_map": ones})["valid"][0]) == pytest.approx(eigen_mask((24, 32)).mean())
    assert cropped.loss(ones, {}, {"label_map": ones})["valid"] == 1  # for pictures that are cut anew
