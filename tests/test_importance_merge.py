"""Merging by importance and similarity, against loops over one image at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, embed, feed_forward, mostly_long, numpy_images, numpy_model, predict

from tif_jax.errors import InputError
from tif_jax.reducers.importance_merge import ImportanceMerge, match

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
EVERYTHING = dict(distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.3)


@functools.cache
def model_of(**options):
    return numpy_model(TINY, reducer="importance_merge", **options)


def reference_match(x, importance, number, power=1.0):
    """Of one image: (token that merges, token that it merges into), the cheapest first, as rows before merging."""
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    order = sorted(range(len(x)), key=lambda i: (-importance[i], -i))
    price = {}
    for place, i in list(enumerate(order))[max(0, len(x) - 3 * number) :]:
        nearest = max((float(unit[i] @ unit[j]) for j in order[:place]), default=-1.0)
        price[i] = (importance[i] ** power * (1 - nearest), -place)
    gone = sorted(price, key=price.get)[:number]
    stays = [j for j in range(len(x)) if j not in gone]
    return [(i, max(stays, key=lambda j: (float(unit[i] @ unit[j]), -j))) for i in gone]


def reference_mean(rows, weights):
    """Weighted, and as long as the rows are on the weighted mean."""
    mean = np.average(rows, axis=0, weights=weights)
    return mean * np.average(np.linalg.norm(rows, axis=1), weights=weights) / np.linalg.norm(mean)


def reference_logits(model, images, numbers, power, proportional):
    num_special, found = model.num_special, []
    for x in np.asarray(embed(model, images)):
        size, groups = np.ones(len(x) - num_special), [[i] for i in range(len(x) - num_special)]
        for block, number in zip(model.blocks, numbers, strict=True):
            log_size = 0.85 * np.log(np.concatenate([np.ones(num_special), size]))[None].astype(np.float32)
            y, qk = attend(block, jnp.asarray(x[None]), jnp.asarray(log_size) if proportional else None)
            x = np.asarray(y)[0]
            logits = np.einsum("hc,thc->ht", np.asarray(qk.query)[0, 0], np.asarray(qk.key)[0]) / np.sqrt(16)
            weights = np.exp(logits + (log_size if proportional else 0))
            importance = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0)[num_special:]
            patches = x[num_special:].astype(np.float64)
            into = dict(reference_match(patches, importance, number, power)) if number else {}
            stays = [i for i in range(len(size)) if i not in into]
            members = [[i, *(j for j in into if into[j] == i)] for i in stays]
            patches = np.array([reference_mean(patches[m], importance[m] + 1e-6 * size[m]) for m in members])
            groups = [[first for i in m for first in groups[i]] for m in members]
            size = np.array([sum(size[i] for i in m) for m in members])
            x = np.concatenate([x[:num_special], patches]).astype(np.float32)
            x = np.asarray(feed_forward(block, jnp.asarray(x[None])))[0]
        source = [next(row for row, group in enumerate(groups) if i in group) for i in range(sum(map(len, groups)))]
        found.append((np.asarray(predict(model, jnp.asarray(x[None])))[0], source))
    return tuple(np.array(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize(("num_patches", "number"), [(12, 1), (12, 3), (12, 6), (13, 12), (2, 1)])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_match(num_patches, number, power):
    rng = np.random.default_rng(num_patches + number)
    x, importance = rng.normal(size=(4, num_patches, 5)), rng.integers(1, 9, size=(4, num_patches)) / 8
    x, importance = x.astype(np.float32), importance.astype(np.float32)  # equal ones among them
    left, gone, into = jax.device_get(jax.jit(match, static_argnums=(2, 3))(x, importance, number, power))
    for b in range(4):
        expected = reference_match(x[b], importance[b], number, power)
        assert list(zip(gone[b].tolist(), left[b][into[b]].tolist(), strict=True)) == expected
        assert left[b].tolist() == [i for i in range(num_patches) if i not in dict(expected)]


def test_alike_and_unimportant_tokens_go_first():
    x = np.array([[[1, 0], [1, 0.01], [0, 1], [0, -1]]], np.float32)
    important = np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)
    one = match(jnp.asarray(x), jnp.asarray(important), 1)
    assert one.gone.tolist() == [[1]] and one.left.tolist() == [[0, 2, 3]] and one.into.tolist() == [[0]]
    by_importance = match(jnp.asarray(x), jnp.array([[0.4, 0.3, 0.2, 1e-9]]), 1)
    assert by_importance.gone.tolist() == [[3]]


@pytest.mark.parametrize(
    ("numbers", "variant", "proportional"),
    mostly_long(
        [
            (numbers, *how)
            for how in (({}, True), ({}, False), (EVERYTHING, True))
            for numbers in ((0, 8, 0), (9, 4, 0))
        ],
        short=(1, 2, 5),
    ),
)
def test_the_whole_walk(numbers, variant, proportional):
    model = model_of(num_merged=numbers, proportional=proportional, **variant)
    images = numpy_images(3, (32, 32), 0)
    logits, aux = jax.jit(lambda x: model(x))(images)
    expected, source = reference_logits(model, images, numbers, 1.0, proportional)
    np.testing.assert_array_equal(aux["source"], source)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_models_without_a_class_token_ask_all_queries():
    model = model_of(num_merged=(4, 0, 0), pool="mean", class_token=False)
    aux = jax.jit(lambda x: model(x))(numpy_images(2, (32, 32), 0))[1]
    x, tokens = embed(model, numpy_images(2, (32, 32), 0)), model.tokens(2)
    y, qk = model.blocks[0].attend(x, tokens)
    for b in range(2):
        logits = np.einsum("qhc,khc->hqk", qk.query[b], qk.key[b]) / 4
        weights = np.exp(logits)
        importance = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=(0, 1))
        gone = dict(reference_match(np.asarray(y[b], np.float64), importance, 4))
        assert [r for r, n in zip(*np.unique(aux["source"][b], return_counts=True), strict=True) if n > 1]
        rows = {i: row for row, i in enumerate(i for i in range(16) if i not in gone)}
        assert aux["source"][b].tolist() == [rows[gone.get(i, i)] for i in range(16)]


def test_mistakes():
    with pytest.raises(InputError, match="num_merged is -1; it is the number"):
        ImportanceMerge(-1)
    with pytest.raises(InputError, match=r"size_power is -1\.0; it is a number, 0 or more"):
        ImportanceMerge(size_power=-1.0)
    assert ImportanceMerge((20, 3, 1)).per_block(3, 16) == (15, 0, 0)
