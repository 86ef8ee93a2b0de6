"""Label maps of data sets of TensorFlow Datasets, as nyu_depth_v2 and oxford_iiit_pet have them."""

import numpy as np
import pytest
from label_maps import SIZE, numbers, write_tfds_maps
from pictures import one_line, picture

from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.data.source import fingerprint
from tif_jax.errors import InputError


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    write_tfds_maps(data_dir)
    return data_dir


def settings(data_dir, label_map="depth", **options):
    return {
        "name": "tfds",
        "root": str(data_dir),
        "tfds_name": "rooms",
        "label_map": label_map,
        "image_size": SIZE,
        **options,
    }


def found(settings):
    """By the number of the image, which TFDS has shuffled."""
    source = open_source(settings, "train")
    examples = [source[i] for i in range(len(source))]
    pixels = [np.asarray(picture(i, *SIZE)) for i in range(4)]
    order = [next(i for i in range(4) if (np.asarray(x["image"]) == pixels[i]).all()) for x in examples]
    assert sorted(order) == list(range(4)) and all(x["label"] == -1 for x in examples)
    return source, {i: x["label_map"] for i, x in zip(order, examples, strict=True)}


def test_depth_of_a_tensor(rooms):
    source, maps = found(settings(rooms))
    assert (source.num_classes, source.class_names) == (0, ())
    for i, label_map in maps.items():
        assert label_map.dtype == np.float32 and label_map.shape == SIZE
        assert (label_map[0] == 0).all() and label_map[1, 0] == 0 and (label_map[1:, 1:] == i + 0.25).all()
    _, halved = found(settings(rooms, label_scale=0.5))
    assert halved[3][5, 5] == 1.625
    batches = evaluation_batches(source, settings(rooms, crop_fraction=1.0), batch_size=4)
    batch = next(batches)
    batches.close()
    assert batch["label_map"].shape == (4, *SIZE) and batch["label_map"].dtype == np.float32


def test_classes_of_images(rooms):
    for feature, known in (("segmentation_mask", 0), ("labelled", 4)):
        source, maps = found(settings(rooms, feature, label_kind="segmentation"))
        assert source.num_classes == known
        for i, label_map in maps.items():
            np.testing.assert_array_equal(label_map, numbers(i, below=4))
            assert label_map.dtype == np.int32
    source, maps = found(settings(rooms, "labelled", label_kind="segmentation", class_index={"2": 0}))
    assert source.num_classes == 1
    np.testing.assert_array_equal(maps[1], np.where(numbers(1, below=4) == 2, 0, -1))


def test_without_label_map_labels_are_classes(rooms, caplog):
    source = open_source(settings(rooms, label_map=""), "train")  # whose supervised keys are image and depth
    assert "label_map" not in source[0] and source[0]["label"] == -1
    assert "set data.label_map to its name" in caplog.text


def test_the_fingerprint_tells_which_maps(rooms):
    options = [settings(rooms), settings(rooms, label_scale=2.0), settings(rooms, label_map="")]
    options += [settings(rooms, x, label_kind="segmentation") for x in ("segmentation_mask", "labelled")]
    assert len({fingerprint(open_source(x, "train")) for x in options}) == 5


@pytest.mark.parametrize(
    "feature, options, match",
    [
        ("depths", {}, r"data.label_map is 'depths'.* has: depth, image,"),
        ("label", {}, r"data.label_map is 'label', and a label map is a Tensor or a PNG Image"),
        ("image", {}, r"data.label_map is 'image'"),
        ("segmentation_mask", {}, r"data.label_scale is not given, and feature 'segmentation_mask'.*whole numbers"),
        ("depth", {"label_kind": "segmentation"}, r"feature 'depth' .* type float16, .*set data.label_kind=depth"),
        ("small", {"label_scale": 1.0}, r"label map of rooms-train.* has 5 x 5 pixels .*image 24 x 32"),
        (
            "labelled",
            {"label_kind": "segmentation", "num_classes": 2},
            r"label map rooms-train.* has class 3, and there are 2",
        ),
    ],
)
def test_features_that_do_not_fit(rooms, feature, options, match):
    with pytest.raises(InputError, match=match) as error:
        source = open_source(settings(rooms, feature, **options), "train")
        [source[i] for i in range(4)]
    assert one_line(error)
