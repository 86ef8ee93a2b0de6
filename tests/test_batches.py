"""Batches: every record in its turn, the same with any number of workers, and resumed where they were left."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pictures import PLAIN, Numbers, one_line, settings, write_folders

from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches, training_batches
from tif_jax.data.preprocess import evaluation_view
from tif_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return write_folders(tmp_path)


MEMORY = {"name": "digits", "image_size": 16, "crop_fraction": 1.0, **PLAIN}


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(one, other):
    assert len(one) == len(other) and one[0].keys() == other[0].keys()
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_training_batches_visit_every_image_once_an_epoch():
    batches = training_batches(Numbers(), MEMORY, batch_size=4, seed=0)
    batch = next(batches)
    kinds = {name: (x.dtype, x.shape) for name, x in batch.items()}
    assert kinds == {
        "image": (np.float32, (4, 16, 16, 3)),
        "label": (np.int32, (4,)),
        "index": (np.int64, (4,)),
        "view": (np.int32, (4,)),
    }
    batches.close()
    batches = training_batches(Numbers(), MEMORY, batch_size=4, seed=0)
    epochs = np.concatenate([b["index"] for b in take(batches, 10)]).reshape(4, 10)
    batches.close()
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    np.testing.assert_array_equal(batch["label"], batch["index"])
    np.testing.assert_allclose(batch["image"].mean(axis=(1, 2, 3)) * 25.5, batch["index"], atol=1e-4)


def test_every_epoch_of_every_seed_has_an_order_of_its_own():
    """With Grain's own seeds the second epoch of a seed is the first one of the next seed."""
    orders = []
    for seed in range(3):
        batches = training_batches(Numbers(), MEMORY, batch_size=10, seed=seed)
        orders += [tuple(batch["index"]) for batch in take(batches, 4)]
        batches.close()
    assert len({*orders}) == 12


def test_fresh_augmentation_differs_between_epochs_and_seeds(folder):
    data = settings(folder, augment="crop_flip")

    def views(seed):
        batches = training_batches(open_source(data, "train"), data, batch_size=11, seed=seed)
        seen = [{i: image for i, image in zip(b["index"], b["image"], strict=True)} for b in take(batches, 2)]
        assert (next(batches)["view"] == -1).all()
        batches.close()
        return seen

    (first, second), (again, _), (other, _) = views(0), views(0), views(1)
    for i in range(11):
        np.testing.assert_array_equal(first[i], again[i])
        assert np.abs(first[i] - second[i]).max() > 0.01 and np.abs(first[i] - other[i]).max() > 0.01


def test_records_are_the_same_views_in_scoring_and_in_training(folder):
    data = settings(folder, augment="crop_flip")
    source = open_source(data, "train")
    records = np.array([[i, v] for i in (3, 8, 1) for v in (0, 1, 2)])
    impact = np.arange(9 * 4, dtype=np.float32).reshape(9, 4)
    scoring = evaluation_batches(source, data, batch_size=9, records=records)
    scored = next(scoring)
    scoring.close()
    np.testing.assert_array_equal(np.stack([scored["index"], scored["view"]], axis=1), records)
    for row, (index, view) in enumerate(records.tolist()):
        if view == 0:
            np.testing.assert_array_equal(scored["image"][row], evaluation_view(source[index]["image"], (16, 16)))
    assert np.abs(scored["image"][1] - scored["image"][2]).max() > 0.01

    for seed in 0, 1:
        batches = training_batches(source, data, batch_size=3, seed=seed, records=records, extra={"impact": impact})
        for batch in take(batches, 3):
            for k in range(3):
                (row,) = np.flatnonzero((records == [batch["index"][k], batch["view"][k]]).all(axis=1))
                np.testing.assert_array_equal(batch["image"][k], scored["image"][row])
                np.testing.assert_array_equal(batch["impact"][k], impact[row])
        batches.close()


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("done", [1, 4])  # in the middle of the first and of the second epoch
def test_training_resumes_exactly(folder, num_workers, done):
    data = settings(folder, augment="crop_flip", num_workers=num_workers)
    source = open_source(data, "train")

    def start():
        return training_batches(source, data, batch_size=4, seed=5)

    batches = start()
    take(batches, done)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 5)
    batches.set_state(state)  # also back in the same iterator, with batches already prefetched
    assert_same(take(batches, 5), expected)
    batches.close()

    resumed = start()
    resumed.set_state(state)
    assert_same(take(resumed, 5), expected)
    resumed.close()


def test_threads_do_not_change_the_batches(folder):
    data = settings(folder, augment="crop_flip")
    source = open_source(data, "train")
    runs = []
    for num_workers in 0, 4:
        batches = training_batches(source, data | {"num_workers": num_workers}, batch_size=4, seed=0)
        runs.append(take(batches, 6))
        batches.close()
    assert_same(*runs)


def test_evaluation_fills_the_last_batch_with_copies_of_weight_0():
    batches = evaluation_batches(Numbers(), MEMORY, batch_size=4)
    one, two, last = list(batches)
    batches.close()
    assert one["index"].tolist() == [0, 1, 2, 3] and two["id"].tolist() == ["n4", "n5", "n6", "n7"]
    assert one["weight"].tolist() == [1, 1, 1, 1]
    assert last["weight"].tolist() == [1, 1, 0, 0] and last["weight"].dtype == np.float32
    assert last["index"].tolist() == [8, 9, 9, 9] and last["id"].tolist() == ["n8", "n9", "n9", "n9"]
    np.testing.assert_array_equal(last["image"][3], last["image"][1])


def test_unreadable_image_ends_the_run_by_name(folder):
    path = folder / "val" / "bee" / "1.JPG"
    path.write_bytes(path.read_bytes()[:-200])
    for num_workers in 0, 2:
        data = settings(folder, num_workers=num_workers)
        for make in (
            lambda source, data: training_batches(source, data, batch_size=4, seed=0),
            lambda source, data: evaluation_batches(source, data, batch_size=4),
        ):
            batches = make(open_source(data, "test"), data)
            with pytest.raises(InputError, match=r"val/bee/1\.JPG: image file is truncated") as error:
                next(batches)
            assert one_line(error)
            batches.close()


def test_unreadable_image_is_counted_logged_once_and_left_out(folder, caplog):
    path = folder / "val" / "bee" / "1.JPG"
    path.write_bytes(path.read_bytes()[:-200])
    data = settings(folder, on_error="skip")
    source = open_source(data, "test")
    batches = evaluation_batches(source, data, batch_size=2)
    seen = list(batches)
    batches.close()
    assert [i for b in seen for i, w in zip(b["id"], b["weight"], strict=True) if w] == [
        "val/bee/0.JPG", "val/bee/2.JPG", "val/cat/0.JPG"]  # fmt: skip
    black = seen[0]
    assert black["index"].tolist() == [0, 1] and black["weight"].tolist() == [1, 0] and black["label"][1] == -1
    assert not black["image"][1].any() and black["id"][1] == ""
    assert list(batches.unreadable) == [1] and "val/bee/1.JPG" in batches.unreadable[1]

    caplog.clear()
    training = training_batches(source, data, batch_size=2, seed=0)
    indices = np.concatenate([b["index"] for b in take(training, 8)]).reshape(4, 4)
    state = training.get_state()
    expected = take(training, 2)
    training.set_state(state)
    assert_same(take(training, 2), expected)
    training.close()
    assert all(sorted(epoch) == [0, 2, 2, 3] for epoch in indices.tolist())  # the next in place of 1
    assert len(training.unreadable) == 1
    assert sum("val/bee/1.JPG" in record.getMessage() for record in caplog.records) == 1


def test_nothing_readable_at_all(folder):
    for path in (folder / "val").rglob("*.JPG"):
        path.write_bytes(b"")
    data = settings(folder, on_error="skip")
    source = open_source(data, "test")
    batches = training_batches(source, data, batch_size=2, seed=0)
    with pytest.raises(InputError, match="none of the 4 images can be read"):
        next(batches)
    batches.close()
    assert [batch["weight"].tolist() for batch in evaluation_batches(source, data, batch_size=2)] == [[0, 0], [0, 0]]


def test_batches_end_when_closed(folder):
    data = settings(folder, num_workers=2)
    batches = training_batches(open_source(data, "train"), data, batch_size=2, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError):
        next(batches)


def test_bad_requests():
    def start(records=None, batch_size=2, seed=0):
        return training_batches(Numbers(), MEMORY, batch_size=batch_size, seed=seed, records=records)

    with pytest.raises(InputError, match="batch_size is 0"):
        start(batch_size=0)
    with pytest.raises(InputError, match="seed is -1"):
        start(seed=-1)
    for records in np.array([[0, 0], [10, 0]]), np.array([[0, 0], [-1, 0]]):
        with pytest.raises(InputError, match="does not exist: the source has 10 images"):
            start(records)
    with pytest.raises(InputError, match=r"records have view 1; with data.augment 'none'"):
        start(np.array([[0, 1]]))
    with pytest.raises(InputError, match="no records"):
        start(np.zeros((0, 2), np.int64))


def test_real_photographs():
    root = Path(os.environ.get("TIF_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (root / "imagenette").is_dir():
        pytest.skip("no ../shared/data/imagenette and no TIF_DATA: real photographs are not at hand")
    data = {"name": "image_folder", "root": str(root / "imagenette"), "test_split": "val", "num_test": 20}
    source = open_source(data, "test")
    assert source.num_classes == 10 and [source[i]["label"] for i in range(0, 20, 2)] == list(range(10))
    batches = evaluation_batches(source, data, batch_size=20)
    (batch,) = batches
    batches.close()
    assert abs(batch["image"].mean()) < 0.6 and 0.7 < batch["image"].std() < 1.5  # photographs, normalised


GENERATED = {"name": "digits", "image_size": 32, "crop_fraction": 1.0, "num_train": 100, "num_workers": 2}


def test_worker_processes_give_the_same_batches():
    def first(**options):
        batches = training_batches(open_source(GENERATED, "train"), GENERATED | options, batch_size=64, seed=0)
        batches.set_state({"next_batch": 1})
        found = [next(batches) for _ in range(3)]
        batches.close()
        return found

    for ours, theirs in zip(first(), first(worker_processes=2), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_repeats_draw_views_anew_of_fewer_images():
    data = GENERATED | {"augment": "crop_flip"}
    batches = training_batches(open_source(data, "train"), data, batch_size=10, seed=0, repeats=3)
    first, again = ([next(batches) for _ in range(10)] for _ in range(2))  # two epochs of 100
    for epoch in (first, again):
        index = np.concatenate([batch["index"] for batch in epoch])
        assert (index[0:99:3] == index[2:99:3]).all() and len(set(index)) == 34  # 100 rows of 34 images
        images = np.concatenate([batch["image"] for batch in epoch])
        assert not (images[0] == images[1]).all() and not (images[1] == images[2]).all()
    assert set(np.concatenate([b["index"] for b in first])) != set(np.concatenate([b["index"] for b in again]))
    with pytest.raises(InputError, match=r"augmentation\.repeats is 0"):
        training_batches(open_source(data, "train"), data, batch_size=10, seed=0, repeats=0)
