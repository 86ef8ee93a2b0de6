"""What evaluation, baselines and reports make of depth and segmentation: models that say what is painted on their images."""

import logging
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tif_jax import tasks
from tif_jax.commands import _baselines, _comparison, _report, _results, evaluate
from tif_jax.errors import InputError
from tif_jax.experiment.schema import Evaluate, Experiment
from tif_jax.figures import plots
from tif_jax.models import Model
from tif_jax.sharing import facts
from tif_jax.training import baselines

RNG = np.random.default_rng(0)
SIZE = (6, 8)
CONFIG = Experiment(evaluate=Evaluate(batch_size=8))


class Painted(Model):
    """Predicts the first channel as metres, or the classes by the first two channels."""

    def __init__(self, task):
        self.dtype, self.task, self.max_depth = jnp.float32, task, 10.0
        if task == "segmentation":
            self.head = nnx.Linear(1, 2, rngs=nnx.Rngs(0))

    def __call__(self, images):
        return (images[..., 0] if self.task == "depth" else images[..., :2]), {}


def serve(monkeypatch, module, **of_split):
    """Has `module` read these (images, label maps, weights) of a split, in batches of 8."""

    def batches(source, data, *, batch_size, shared=False):
        for begin in range(0, len(source), batch_size):
            names = ("image", "label_map", "weight")
            rows = (values[begin : begin + batch_size] for values in of_split[source.split])
            yield dict(zip(names, rows, strict=True))

    monkeypatch.setattr(module, "evaluation_batches", batches)
    return [Split(name, len(values[2])) for name, values in of_split.items()]


class Split:
    """A source of which `serve` reads nothing."""

    num_classes, class_names = 0, ()

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __getitem__(self, index):
        raise NotImplementedError

    def __len__(self):
        return self.size


def depth_images(number=16):
    truth = RNG.uniform(0.5, 9, (number, *SIZE)).astype(np.float32)
    truth[RNG.random(truth.shape) < 0.2] = 0
    images = np.repeat((np.where(truth > 0, truth, 1) * RNG.lognormal(0, 0.3, truth.shape))[..., None], 3, axis=-1)
    return images.astype(np.float32), truth, np.ones(number, np.float32)


def rmse_of(prediction, truth):
    return np.mean([math.sqrt(np.mean((p - t)[t > 0] ** 2)) for p, t in zip(prediction, truth, strict=True)])


def test_depth_is_the_mean_over_the_images_that_have_some(monkeypatch, caplog):
    images, truth, weight = depth_images()
    truth[3] = 0  # nothing measured
    images[15], weight[15] = np.nan, 0  # fills the last batch up
    (source,) = serve(monkeypatch, evaluate, test=(images, truth, weight))
    with caplog.at_level(logging.WARNING):
        found = evaluate.accuracy(Painted("depth"), source, CONFIG)
    counted = [i for i in range(15) if i != 3]
    assert (found["num_images"], found["task"]) == (15, "depth") and "1 of 15 label maps" in caplog.text
    clipped = np.clip(images[counted, ..., 0], 1e-3, 10)
    assert found["rmse"] == pytest.approx(rmse_of(clipped, truth[counted]), rel=1e-5)
    assert {"loss", "abs_rel", "log10", "silog", "delta1", "delta2", "delta3"} <= found.keys()


def test_no_label_at_all_is_an_error(monkeypatch):
    images, truth, weight = depth_images()
    (source,) = serve(monkeypatch, evaluate, test=(images, 0 * truth, weight))
    with pytest.raises(InputError, match="none of the 16 label maps to evaluate on has a pixel that counts"):
        evaluate.accuracy(Painted("depth"), source, CONFIG)


def test_the_eigen_crop_is_evaluated_where_it_is_asked_for(monkeypatch):
    images, truth, weight = depth_images()
    (source,) = serve(monkeypatch, evaluate, test=(images, truth, weight))
    cropped = evaluate.accuracy(Painted("depth"), source, Experiment(evaluate=Evaluate(batch_size=8, eigen_crop=True)))
    inside = truth.copy()
    inside[:, 0], inside[:, :, 0] = 0, 0  # their centres are at 40, those of the last ones at 440 and 600
    assert cropped["rmse"] == pytest.approx(rmse_of(np.clip(images[..., 0], 1e-3, 10), inside), rel=1e-5)


def test_segmentation_counts_pixels_of_all_images(monkeypatch):
    images = RNG.normal(size=(16, *SIZE, 3)).astype(np.float32)
    labels = RNG.integers(-1, 2, (16, *SIZE))
    labels[5] = -1
    (source,) = serve(monkeypatch, evaluate, test=(images, labels, np.ones(16, np.float32)))
    found = evaluate.accuracy(Painted("segmentation"), source, CONFIG)
    said, pixels = images[..., :2].argmax(axis=-1), labels >= 0
    ious = [((said == k) & (labels == k)).sum() / (((said == k) | (labels == k)) & pixels).sum() for k in range(2)]
    assert found["miou"] == pytest.approx(np.mean(ious), rel=1e-6)
    assert found["pixel_accuracy"] == pytest.approx((said == labels)[pixels].mean(), rel=1e-6)
    logits = images[..., :2].astype(np.float64)
    nats = (
        np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    )
    of_images = [each[where].mean() for each, where in zip(nats, pixels, strict=True) if where.any()]
    assert found["loss"] == pytest.approx(np.mean(of_images), rel=1e-5)


def test_depth_baselines_are_those_of_all_maps_at_once():
    _, truth, _ = depth_images(20)
    truth[:, 2, 3] = 0  # never measured
    truth[4, 0, 0] = 12.0  # beyond the cap
    parts = [baselines.sums_of_depth(part, 10.0) for part in np.split(truth, 4)]
    said = baselines.predictions(tasks.DEPTH, {name: sum(part[name] for part in parts) for name in parts[0]})
    truth[4, 0, 0] = 0
    image, row, column = np.nonzero(truth)
    depths = truth[image, row, column].astype(np.float64)
    means = [[depths[(row == y) & (column == x)].mean() if (y, x) != (2, 3) else depths.mean() for x in range(8)]
             for y in range(6)]  # fmt: skip
    np.testing.assert_allclose(said["mean depth map"], means, rtol=1e-6)
    design = np.stack([row, column, np.ones(len(row))], axis=1)
    a, b, c = np.linalg.lstsq(design, depths, rcond=None)[0]
    expected = a * np.arange(6)[:, None] + b * np.arange(8)[None] + c
    np.testing.assert_allclose(said["linear fit on position"], expected, rtol=1e-5)
    with pytest.raises(InputError, match="no pixel of the training label maps counts"):
        baselines.predictions(tasks.DEPTH, baselines.sums_of_depth(0 * truth, 10.0))


def test_a_plane_is_fitted_exactly():
    plane = 1 + 0.25 * np.arange(6)[:, None] + 0.5 * np.arange(8)[None]
    said = baselines.predictions(tasks.DEPTH, baselines.sums_of_depth(plane[None], 10.0))
    np.testing.assert_allclose(said["linear fit on position"], plane, rtol=1e-9)
    one_column = baselines.sums_of_depth(plane[None, :, :1], 10.0)  # of which no slope along the row can be told
    np.testing.assert_allclose(baselines.linear_fit(**one_column), plane[:, :1], rtol=1e-9)


def test_the_most_frequent_class_per_pixel():
    maps = np.array([[[0, 1, -1]], [[0, 2, -1]], [[1, 2, -1]]])
    (said,) = baselines.predictions(tasks.SEGMENTATION, baselines.sums_of_classes(maps, 3)).values()
    np.testing.assert_array_equal(said.argmax(axis=-1), [[0, 2, 0]])  # 0 and 2 are as frequent; the first is taken


def test_baselines_are_measured_as_models_are(monkeypatch):
    train, test = depth_images(16), depth_images(8)
    test[2][7] = 0
    train[1][15], train[2][15] = 5, 0  # a copy that fills the batch
    sources = serve(monkeypatch, _baselines, train=train, test=test)
    found = _baselines.judged(CONFIG, Painted("depth"), *sources)
    seen = train[1][:15]
    mean = seen.sum(axis=0) / (seen > 0).sum(axis=0)
    assert [*found] == ["mean depth map", "linear fit on position"] and found["mean depth map"]["num_images"] == 7
    assert found["mean depth map"]["rmse"] == pytest.approx(rmse_of(np.stack([mean] * 7), test[1][:7]), rel=1e-5)
    labels = [(RNG.normal(size=(8, *SIZE, 3)), RNG.integers(-1, 2, (8, *SIZE)), np.ones(8)) for _ in range(2)]
    sources = serve(monkeypatch, _baselines, train=labels[0], test=labels[1])
    assert 0 < _baselines.judged(CONFIG, Painted("segmentation"), *sources)["most frequent class per pixel"]["miou"] < 1


def row(label, seed, rmse, before, **others):
    return {
        "reducer": label.partition("-")[0], "label": label, "keep_ratio": None, "tokens_left": 41, "seed": seed,
        "num_images": 9, "gmac": 0.731, "images_per_second": 100.0, "rmse": rmse, "rmse_before": before, "abs_rel": 0.25,
        "delta1": 0.75, "directory": f"finetune/{label}-{seed}", **others,
    }  # fmt: skip


ROWS = [row("full-1", seed, 0.5 + seed / 10, 2.0, images_per_second=50.0) for seed in (0, 1)] + [
    row("tome-13", seed, None if seed else 0.7, 3.0)
    for seed in (0, 1)  # None: the second one diverged
]
RESULT = {
    "command": "tif run", "begun": "2026-01-01", "date": "2026-01-02", "versions": {"jax": "1.2"}, "device": "2 x cpu",
    "machine": {"host": "here", "processor": "Z80", "cores": 2, "system": ""}, "taken_from": {},
    "test": {"num_images": 9, "data": {"name": "digits", "test_split": "val"}, "eigen_crop": True},
    "backbone": {"task": "depth", "rmse": 0.875}, "rankings": None, "best": None, "best_chosen_on": None, "left_out": [],
    "unfinished": [], "rows": ROWS, "speed": {},
    "baselines": {"mean depth map": {"num_images": 9, "rmse": 1.5, "abs_rel": 0.375, "delta1": 0.5}},
}  # fmt: skip


def test_a_report_of_depth_has_metres():
    text = _report.markdown_of(RESULT, _results.summarise(ROWS, tasks.DEPTH))
    for line in (
        "Backbone before fine-tuning: RMSE 0.875 m.",
        "| the same for every picture | RMSE m | AbsRel | delta1 |",
        "| mean depth map | 1.500 | 0.375 | 0.500 |",
        "| reducer | before m | RMSE m | AbsRel | delta1 | tokens left | GMAC | images/s | x full |",
        "| full-1 | 2.000 | 0.550 ± 0.071 | 0.250 | 0.750 | 41 | 0.7310 | 50.0 | 1.00 |",
        "| compared | within the Eigen crop |",
    ):
        assert line in text
    assert text.index("mean depth map") < text.index("| full-1 |") and "top-1" not in text
    assert "| tome-13 | 3.000 | - | 0.250 |" in text


def test_the_best_is_the_lowest_error_on_validation_images():
    rows = [
        {"directory": name, "validation_rmse": rmse, "validation_loss": loss}
        for name, rmse, loss in (("a", 0.5, 1.0), ("b", 0.25, 2.0), ("c", 0.25, 1.0), ("d", None, None))
    ]
    assert _results._best(rows, tasks.DEPTH.headline) == ("c", "validation")
    assert _results._best(rows[3:], tasks.DEPTH.headline) == ("d", "validation")


def test_figures_have_the_task_s_axis(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path, dpi: drawn.append(figure))
    plots.accuracy_cost(_results.summarise(ROWS, tasks.DEPTH), tmp_path / "x.png", tasks.DEPTH.headline)
    assert drawn[0].axes[0].get_ylabel() == "RMSE (m)" and 0.5 < drawn[0].axes[0].get_ylim()[1] < 1
    plots.accuracy_cost(
        _results.summarise(ROWS, tasks.DEPTH),
        tmp_path / "z.png",
        tasks.DEPTH.headline,
        ("images_per_second", "images/s"),
    )
    (point, *_), axes = drawn[1].axes[0].lines, drawn[1].axes[0]
    assert axes.get_xlabel() == "images/s" and (*point.get_xdata(), *point.get_ydata()) == (50.0, 0.55)
    curves = {"full-1-0": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    plots.training_curves(curves, tmp_path / "y.png", tasks.DEPTH)
    assert drawn[2].axes[0].get_title() == "depth: scale-invariant log loss"


def test_runs_of_several_tasks_are_not_compared():
    runs = [{"name": "a", "backbone": {"task": "depth"}}, {"name": "b", "backbone": {}}]
    with pytest.raises(InputError, match=r"several tasks \(a is depth, b is classification\)"):
        _comparison._task_of(runs)
    assert _comparison._task_of(runs[:1]) is tasks.DEPTH


def test_a_card_says_metres():
    metrics = {"task": "depth", "rmse": 0.5, "abs_rel": 0.125, "delta1": 0.75, "num_images": 9, "gmac": 1.25}
    told = facts._accuracy(metrics, {"rmse_before": 2.0}, {"task": "depth", "rmse": 0.25, "gmac": 4.5})
    assert told == [
        ("RMSE", "0.500 m on 9 test images"), ("AbsRel", "0.125 on 9 test images"), ("delta1", "0.750 on 9 test images"),
        ("RMSE before fine-tuning", "2.000 m"), ("cost", "1.25 GMAC (10⁹ multiply-adds) an image"),
        ("the backbone without a reducer", "RMSE 0.250 m, 4.5 GMAC"),
    ]  # fmt: skip
