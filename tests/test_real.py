"""A real DeiT-Ti on real photographs. Takes minutes: bash launch/test.sh -m long tests/test_real.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import vit_forward
from scipy.special import log_softmax, softmax

import tif_jax
from tif_jax import load
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.impact.oracle import MASKS, TARGETS
from tif_jax.impact.token_impact import token_impact
from tif_jax.weights.pretrained import read_tensors

pytestmark = pytest.mark.long
KEYWORD = {"zero": "zeroed", "content": "position_only", "drop": "dropped"}


@pytest.fixture(scope="module")
def weights(data_root):
    return data_root / "deit_tiny_patch16_224.safetensors"


def photographs(data_root, batch_size):
    """Batches of the 500 photographs with ImageNet labels: resize 256 bicubic, centre crop 224."""
    data = {"name": "image_table", "root": str(data_root / "imagenet_ccby"), "test_split": "labels.csv"}
    return evaluation_batches(open_source(data, "test"), data, batch_size=batch_size)


def test_top1(data_root, weights):
    model = load(weights)
    predict = jax.jit(lambda images: model(images)[0].argmax(axis=1))
    right = [(predict(b["image"]) == b["label"]) * b["weight"] for b in photographs(data_root, 50)]
    assert np.sum(right) / 500 >= 0.835


@pytest.mark.parametrize(("described", "expected"), [(True, 0.68), (False, 0.25)])
def test_weights_that_say_how_images_are_prepared(data_root, tmp_path, caplog, described, expected):
    """AugReg's ViT-Ti with mean = std = 0.5, fine-tuned on Tiny-ImageNet; top-1 with no argument, of 2,000 images."""
    path = tmp_path / "model.safetensors"
    path.symlink_to((data_root / "vit_ti16_tiny_imagenet.safetensors").resolve())
    if described:
        weights = {"input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.5] * 3}
        weights = {
            "architecture": "vit_tiny_patch16_224",
            "num_classes": 200,
            "pretrained_cfg": weights | {"std": [0.5] * 3},
        }
        (tmp_path / "config.json").write_text(json.dumps(weights))
    model = tif_jax.load(path)
    assert ("does not say how images are prepared" in caplog.text) != described
    predict = jax.jit(lambda images: model(images)[0].argmax(axis=1))
    folders = sorted((data_root / "tiny_imagenet" / "val").iterdir())
    right = [predict(model.preprocess(folder.iterdir())) == label for label, folder in enumerate(folders)]
    assert abs(np.mean(right) - expected) < 0.01


@pytest.mark.parametrize("mask", MASKS)
def test_exact_is_brute_force_in_float32(data_root, weights, mask):
    model, tensors = load(weights), read_tensors(weights)
    batch = next(photographs(data_root, 1))

    def forward(**masked):
        return vit_forward(tensors, batch["image"], num_heads=3, dtype=np.float32, **masked)

    clean = forward()
    logits = np.concatenate([forward(**{KEYWORD[mask]: [i]}) for i in range(196)])
    goals = {"label": np.eye(1000)[batch["label"]], "teacher": softmax(clean, axis=1)}
    assert goals.keys() == set(TARGETS)
    for target, goal in goals.items():
        expected = (goal * log_softmax(clean, axis=1)).sum(axis=1) - (goal * log_softmax(logits, axis=1)).sum(axis=1)
        impact = token_impact(model, batch["image"], batch["label"], mask=mask, target=target)[0]
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(impact, expected, atol=1e-4)


def test_order_of_the_ranking_table(data_root):
    """methods/tif.md's table on 48 photographs: the order of its rows, where it is wider than the noise."""
    command = [sys.executable, "-m", "benchmarks.estimators", "48"]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # ours optimise nothing
    printed = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=True
    ).stdout
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "/" in line]
    rows = {name: (correlation, kept) for name, _, _, correlation, *kept in table[1:]}

    def loss(name, num_kept=98):
        return float(rows[name][1][(137, 98, 49).index(num_kept)].split(" / ")[0])

    best_first = ["exact, drop", "gradient", "class attention", "random", "exact, zero, absolute value"]
    assert sorted(best_first, key=loss) == best_first
    assert loss("exact, zero") < loss("gradient") < loss("class attention")
    assert loss("sampled, keep 0.5, K=16") < loss("gradient")
    # Few tokens left: what a token is worth among half-empty neighbours is the better measure.
    assert loss("sampled, keep 0.5, K=16", 49) < loss("exact, drop", 49) < loss("class attention", 49)
    assert loss("sampled, keep 0.5, K=16", 49) < loss("sampled, keep 0.5, K=4", 49)
    # The label-aware oracle does better without the tokens that argue for the wrong class.
    assert loss("exact, drop", 137) < loss("all 196 tokens", 137)  # its only column
    by_correlation = ["exact, zero", "gradient", "sampled, keep 0.7, K=16", "sampled, keep 0.5, K=16", "random"]
    assert sorted(by_correlation, key=lambda name: -float(rows[name][0])) == by_correlation
