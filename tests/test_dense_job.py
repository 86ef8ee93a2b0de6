"""`tif score` of a depth model: label maps go along, files say what is in them, a job that was stopped goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import embed, lively, row_of
from label_maps import pairs, write_pairs
from PIL import Image

from tif_jax.commands import _report, evaluate
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.errors import InputError, Preempted
from tif_jax.experiment import config as config_file
from tif_jax.experiment import scoring
from tif_jax.impact import job as scoring_job
from tif_jax.impact import shards
from tif_jax.impact.manifest import read_manifest
from tif_jax.impact.token_impact import token_impact
from tif_jax.models.params import params_of
from tif_jax.sharing.impact_set import contents_of
from tif_jax.tasks import DEPTH
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State

# max_depth: the label maps have farther pixels.
MODEL = dict(
    image_size=(24, 32), patch_size=8, width=16, depth=2, num_heads=2, num_classes=0, task="depth", max_depth=9.0
)
MODEL |= dict(decoder="linear", decoder_blocks=(0, 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with eleven pairs for training, one of whose label maps is empty, and a depth model as backbone."""
    folder = tmp_path_factory.mktemp("depth")
    write_pairs(folder / "data", counts=(("train", 11), ("val", 3)))
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(folder / "data" / "train" / "depth" / "2.png")
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(folder / "data" / "val" / "depth" / "1.png")
    model = lively(MODEL)
    with Checkpoints(folder / "run" / "backbone" / "checkpoints") as checkpoints:
        state = State(jnp.zeros((), jnp.int32), params_of(model), ())
        checkpoints.save(state, {"model": MODEL, "reducer": {"name": "full"}}, {})
    return folder, model


def config(place, *overrides):
    made = dict(data=pairs(place / "data"), backbone=dict(model=MODEL), score=dict(batch_size=4))
    made["evaluate"] = dict(num_images=3, num_samples=2, batch_size=4)
    return config_file.from_settings(made, [f"--config.{override}" for override in overrides])


def test_a_job_of_depth_is_stopped_goes_on_and_writes_what_the_oracle_says(place, tmp_path, monkeypatch, caplog):
    folder, model = place
    (tmp_path / "backbone").symlink_to(folder / "run" / "backbone")
    monkeypatch.setattr(scoring, "_ROWS_PER_PART", 6)
    monkeypatch.setattr(scoring_job, "_SECONDS_BETWEEN_SAVES", 0)
    of = config(folder, "score.estimator=exact", "score.mask=drop", "score.target=label")
    stop, columns = [], scoring_job._columns

    def stopping(*given):
        stop[0].set()
        return columns(*given)

    with monkeypatch.context() as patch:
        make = scoring_job.stop_flag
        patch.setattr(scoring_job, "stop_flag", lambda: _noted(make(), stop))
        patch.setattr(scoring_job, "_columns", stopping)
        with pytest.raises(Preempted):
            scoring.score_training(of, tmp_path)
    begun = shards.read_begun(tmp_path / "impact", 1, 2)
    assert list(begun["index"]) == [0, 1, 2]  # of the first batch, less the one that is empty
    scoring.score_training(of, tmp_path)
    assert "the label map of train/image/2.jpg has no pixel that counts" in caplog.text

    table = shards.read_impact(tmp_path)
    assert list(table.index) == [0, 1, 2, *range(4, 11)]
    assert (table.prediction == -1).all() and (table.label == -1).all()
    batch = next(evaluation_batches(open_source(of.data, "train"), of.data, batch_size=11))
    images, maps = batch["image"][table.index], batch["label_map"][table.index]
    expected = token_impact(model, jnp.asarray(images), maps, mask="drop")
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(table.impact, expected, atol=1e-4)
    found = np.asarray(jax.jit(lambda model, images: model(images)[0])(model, images))
    for d, t, loss in zip(found, maps, table.loss, strict=True):
        g = (np.log(d) - np.log(np.where(t > 0, t, 1)))[(t > 0) & (t <= 9)]
        np.testing.assert_allclose(loss, 10 * np.sqrt((g**2).mean() - 0.85 * g.mean() ** 2), rtol=1e-4)
    manifest = read_manifest(tmp_path / "impact")
    assert manifest["task"] == "depth" and manifest["loss"] == "scale-invariant log loss of depths up to 9 m, no unit"
    card = contents_of(tmp_path)["README.md"].decode()
    assert "scale-invariant log loss of depths up to 9 m" in card and "nats" not in card and "cross-entropy" not in card
    with pytest.raises(InputError, match=r"other impacts: .*target is 'label' there, 'teacher' here"):
        scoring.score_training(
            config(folder, "score.estimator=exact", "score.mask=drop", "score.target=teacher"), tmp_path
        )


def _noted(context, flags):
    """The context, whose flag is put into the list."""

    class Noted:
        def __enter__(self):
            flags.append(context.__enter__())
            return flags[0]

        def __exit__(self, *error):
            return context.__exit__(*error)

    return Noted()


@jax.jit
def walk(model, x, holder):
    """Depth from tokens x, the class token and some patches, when patch p of the raster is row holder[b, p] of these."""
    features = {}
    for i, block in enumerate(model.blocks):
        x, _ = block(x, row_of(x, 1))
        features[f"blocks/{i}"] = x[:, 1:][jnp.arange(len(x))[:, None], holder].reshape(len(x), 3, 4, -1)
    return model.predict(x, features)[0]


def test_rankings_of_held_out_depth_are_judged_in_metres(place, tmp_path):
    folder, model = place
    (tmp_path / "backbone").symlink_to(folder / "run" / "backbone")
    of = config(folder, "score.estimator=sampled", "filter.keep_ratio=0.5")
    scoring.score_heldout(of, tmp_path)
    trained_on = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    test = evaluate.heldout(of, tmp_path, model, trained_on)
    # One of three label maps is empty: the teacher alone has scored its image.
    assert len(shards.read_impact(tmp_path / "heldout-teacher").index) == 3
    assert {name: impact.shape for name, impact in test.impacts.items()} == {"label": (2, 12), "teacher": (2, 12)}
    reverse = -test.fixed_rankings["label oracle"]
    found = evaluate.judged(model, test, test.fixed_rankings | {"reverse": reverse})

    batch = next(evaluation_batches(open_source(of.data, "test"), of.data, batch_size=3))
    images, maps = jnp.asarray(batch["image"][[0, 2]]), batch["label_map"][[0, 2]]
    whole = np.asarray(jax.jit(lambda model, images: model(images)[0])(model, images))
    x = np.asarray(embed(model, images))
    highest = np.argsort(-reverse, axis=1)[:, :6]  # of twelve patches
    kept, holder = np.sort(highest, axis=1), np.zeros((2, 12), int)
    places = np.stack(np.divmod(np.arange(12), 4), axis=1)
    for b in range(2):
        for p in range(12):
            holder[b, p] = np.argmin(((places[kept[b]] - places[p]) ** 2).sum(1))
    rows = np.concatenate([np.zeros((2, 1), int), 1 + kept], axis=1)
    best = np.asarray(walk(model, jnp.asarray(np.take_along_axis(x, rows[..., None], axis=1)), holder))

    def rmse(d):
        valid = (maps > 0) & (maps <= 9)
        return np.mean([np.sqrt(((d - t)[v] ** 2).mean()) for d, t, v in zip(d, maps, valid, strict=True)])

    outcome = found["rankings"]["reverse"]["keep"]["0.5"]
    assert outcome["rmse"] == pytest.approx(rmse(best), rel=1e-4)
    assert outcome["difference"] == pytest.approx(np.sqrt(((best - whole) ** 2).mean((1, 2))).mean(), rel=1e-4)
    assert (
        found["unreduced"] == pytest.approx({"rmse": rmse(whole), "difference": 0}, rel=1e-4)
        and found["num_images"] == 2
    )
    lines = _report._of_filter(found, DEPTH)
    assert "RMSE (m) / RMS difference to the unreduced model (m); the unreduced model: RMSE" in "\n".join(lines)
    table = [line for line in lines if line.startswith("|")][2:]
    differences = [float(line.split("|")[-3].split("/")[1]) for line in table]
    assert len(table) == 4 and differences == sorted(differences, reverse=True)
