"""Keys that are set and that nothing reads: named in one line."""

import logging

import pytest

from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file


def told(caplog, *overrides, **settings):
    """What loading the config says of keys without effect."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        config_file.from_settings(settings, [f"--config.{override}" for override in overrides])
    lines = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert len(lines) < 2
    return lines[0].removeprefix("set, but without effect here: ") if lines else ""


TIF = dict(reducer=dict(name="tif", keep_ratio=0.5))
TABLE = [
    (("score.estimator=exact", "score.num_samples=8"), TIF, "score.num_samples (the estimator is exact)"),
    (("score.keep_ratio=0.7",), dict(score=dict(estimator="exact")), "score.keep_ratio (the estimator is exact)"),
    (("score.mask=zero",), TIF, "score.mask (the estimator is sampled)"),
    (("filter.rho=0.1",), TIF, "filter.rho (labels are top)"),
    (("filter.labels=above", "filter.keep_ratio=0.4"), TIF, "filter.keep_ratio (labels are not top)"),
    (("filter.num_epochs=2",), {}, "filter.num_epochs (no reducer here has a part that is fitted before)"),
    (("adapter.num_epochs=2",), TIF, "adapter.num_epochs (no reducer here has an adapter)"),
    (("finetune.distillation.logits_weight=0.9",), {}, "finetune.distillation.logits_weight (its kind is '')"),
    (
        ("finetune.distillation.kind=hard", "finetune.distillation.tokens_weight=0.9"),
        {},
        "finetune.distillation.tokens_weight (distillation is hard)",
    ),
    (("finetune.mixing.switch=0.1",), dict(finetune=dict(mixing=dict(mixup=0.8))), "finetune.mixing.switch (mixup and"),
    (("data.tfds_name=mnist",), dict(data=dict(name="image_folder")), "data.tfds_name (the data are image_folder)"),
    (("evaluate.eigen_crop=true",), {}, "evaluate.eigen_crop (the data have no depth)"),
    (("data.root=photos",), {}, "data.root (digits are generated)"),
    (("data.test_fraction=0.2",), {}, "data.test_fraction (it is of folders and tables)"),
    (("data.label_map=depth",), {}, "data.label_map (the data are digits)"),
    (("data.label_folder=maps",), {}, "data.label_folder (the data are digits)"),
    (("data.label_kind=segmentation",), {}, "data.label_kind (there are no label maps)"),
    (("data.label_scale=0.1",), {}, "data.label_scale (labels are classes)"),
    (("data.num_classes=3",), dict(data=dict(name="image_pairs")), "data.num_classes (there are no label maps with"),
    ((), dict(data=dict(name="image_pairs", class_index={"1": 0})), "data.class_index (labels are depths)"),
    (("data.seed=1",), dict(data=dict(name="image_folder")), "data.seed (only digits are generated, and no test"),
    (("backbone.num_heads=3",), {}, "backbone.num_heads (it is of a weight file)"),
    (("backbone.learning_rate=0.1",), {}, "backbone.learning_rate (the backbone is not trained)"),
    (
        ("backbone.num_epochs=3", "backbone.model.width=64"),
        dict(backbone=dict(init_from="weights.npz")),
        "backbone.num_epochs (the backbone is imported, not trained)",
    ),
    (
        (),
        dict(backbone=dict(init_from="weights.npz", learning_rate=0.5)),
        "backbone.learning_rate (the backbone is imp",
    ),
    ((), dict(score=dict(estimator="exact", num_samples=9)), "score.num_samples (the estimator is exact)"),
]


@pytest.mark.parametrize(("overrides", "settings", "expected"), TABLE)
def test_what_nothing_reads_is_named(caplog, overrides, settings, expected):
    assert told(caplog, *overrides, **settings).startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (("score.num_samples=8", "filter.num_epochs=2"), TIF),
        (("score.estimator=exact",), TIF | dict(score=dict(num_samples=8))),  # the file was right by itself
        (("score.estimator=exact", "score.mask=zero", "filter.labels=above", "filter.rho=0.1"), TIF),
        (("reducer.adapter=48", "adapter.num_epochs=2"), TIF),
        (("reducer.adapter=48", "filter.labels=above", "filter.keep_ratio=0.4"), TIF),
        (("backbone.num_epochs=3", "backbone.learning_rate=0.1", "backbone.model.width=64"), {}),
        (("backbone.num_heads=3",), dict(backbone=dict(init_from="weights.npz", learning_rate=1e-3))),  # the default
        (
            ("backbone.num_epochs=3", "backbone.batch_size=8"),
            dict(backbone=dict(init_from="weights.npz", head="fresh")),
        ),
        (("data.seed=1",), dict(data=dict(name="image_folder", test_fraction=0.2))),
        (("data.root=photos", "data.train_split=tr"), dict(data=dict(name="image_folder"))),
    ],
)
def test_what_is_read_is_not_named(caplog, overrides, settings):
    assert told(caplog, *overrides, **settings) == ""


def test_quick_needs_to_be_something():
    with pytest.raises(InputError, match="quick is true, but this config has no when_quick"):
        config_file.from_settings({}, ["--config.quick=true"])
    assert config_file.from_settings({"when_quick": {"seeds": 2}}, ["--config.quick=true"]).seeds == 2
