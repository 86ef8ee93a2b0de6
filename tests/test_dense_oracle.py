"""Impact on dense tasks, and on losses of a user's own, against loops that mask one token after the other by hand."""

import inspect
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import lively, mostly_long, row_of
from flax import nnx
from scipy.special import log_softmax, softmax

from tif_jax.errors import InputError
from tif_jax.impact.oracle import sample_masks
from tif_jax.impact.scoring import Scorer
from tif_jax.impact.token_impact import token_impact
from tif_jax.tokens import image_keys

ROWS, COLUMNS = GRID = (2, 3)
N, SIZE = 6, (16, 24)
TINY = dict(image_size=SIZE, patch_size=8, width=16, num_heads=2)
# A decoder that reads the first block, too, which the oracle computes for all masks at once.
LINEAR = dict(depth=2, decoder="linear", decoder_blocks=(0, 1), num_registers=1)
DPT = dict(
    depth=5, decoder="dpt", decoder_width=4, decoder_blocks=(1, 2, 3, 4), class_token=False, pool="mean", max_depth=8.0
)
KINDS = {"linear": LINEAR, "by embedding": LINEAR | {"fill": "embedding"}, "dpt": DPT}
PLACES = np.stack(np.divmod(np.arange(N), COLUMNS), axis=1)


def made(task, kind="linear"):
    """A model, images, and label maps of which a part is not known; in float64 where that is enabled."""
    dtype, num_classes = jnp.zeros(()).dtype, {"depth": 0, "segmentation": 3}[task]
    model = as_dtype(lively(TINY | KINDS[kind] | dict(task=task, num_classes=num_classes, dtype=dtype.name)), dtype)
    rng = np.random.default_rng(1)
    maps = rng.uniform(0.5, 11, (2, *SIZE)).astype(dtype) if task == "depth" else rng.integers(0, 3, (2, *SIZE))
    maps[rng.random(maps.shape) < 0.2] = 0 if task == "depth" else -1
    return model, rng.normal(size=(2, *SIZE, 3)).astype(dtype), maps


def as_dtype(model, dtype):
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
    return model


@jax.jit
def walk(model, x, holder, gates=None):
    """The prediction from tokens x, when patch p of the raster is row holder[b, p]; with gates, by them between both."""
    special = model.num_special
    log_weight = None if gates is None else jnp.log(jnp.concatenate([jnp.ones((len(x), special)), gates], axis=1))
    features = {}
    for i, block in enumerate(model.blocks):
        x, _ = block(x, row_of(x, special), log_weight)
        own = x[:, special:]
        patches = own[jnp.arange(len(x))[:, None], holder]
        if gates is not None:
            patches = gates[..., None] * own + (1 - gates[..., None]) * patches
        if i in model.decoder_blocks:
            features[f"blocks/{i}"] = patches.reshape(len(x), *GRID, -1)
    return model.predict(x, features)[0]


def embed(model, images):
    return np.asarray(cases.embed(model, jnp.asarray(images)))


def nearest(model, patches, among, itself=False):
    """For each patch of each image the nearest of those among; of itself only where that is asked for."""
    found = np.zeros((len(patches), N), int)
    for b in range(len(patches)):
        unit = patches[b] / np.linalg.norm(patches[b], axis=1, keepdims=True)
        for p in range(N):
            far = ((PLACES - PLACES[p]) ** 2).sum(1) if model.fill == "position" else -(unit @ unit[p])
            allowed = among[b] & (itself | (np.arange(N) != p))
            found[b, p] = np.argmin(np.where(allowed, far, np.inf)) if allowed.any() else p
    return found


def masked(model, images, mask, i):
    """The prediction with patch i masked."""
    x = embed(model, images)
    at, holder = model.num_special + i, np.tile(np.arange(N), (2, 1))
    if mask == "drop":
        among = np.tile(np.arange(N) != i, (2, 1))
        holder[:, i] = nearest(model, x[:, model.num_special :], among)[:, i]
        holder = holder - (holder > i)
        return np.asarray(walk(model, jnp.asarray(np.delete(x, at, axis=1)), holder))
    x = x.copy()
    x[:, at] = np.asarray(model.patch_positions())[:, i] * (mask == "content")
    return np.asarray(walk(model, jnp.asarray(x), holder))


def clean(model, images):
    return np.asarray(walk(model, jnp.asarray(embed(model, images)), np.tile(np.arange(N), (2, 1))))


def depth_loss(found, maps, cap):
    """Scale-invariant log loss, over the pixels that count."""
    losses = []
    for d, t in zip(found, maps, strict=True):
        g = (np.log(d) - np.log(np.where(t > 0, t, 1)))[(t > 0) & (t <= cap)]
        losses.append(10 * np.sqrt((g**2).mean() - 0.85 * g.mean() ** 2))
    return np.array(losses)


def loss_of(task, target, found, unmasked, maps, cap):
    if task == "depth":
        return (
            depth_loss(found, maps, cap)
            if target == "label"
            else ((np.log(found) - np.log(unmasked)) ** 2).mean((1, 2))
        )
    log = log_softmax(found, axis=-1)
    if target == "teacher":
        return (softmax(unmasked, axis=-1) * (log_softmax(unmasked, axis=-1) - log)).sum(-1).mean((1, 2))
    each = -np.take_along_axis(log, np.maximum(maps, 0)[..., None], axis=-1)[..., 0]
    return np.array([e[m >= 0].mean() for e, m in zip(each, maps, strict=True)])


@pytest.mark.parametrize(
    "task, kind, mask, target",
    mostly_long(
        [
            (task, kind, mask, target)
            for task in ("depth", "segmentation")
            for kind in KINDS
            for mask in ("zero", "content", "drop")
            for target in ("label", "teacher")
        ],
        short=(3, 10, 16, 24, 29),
    ),
)
def test_exact_is_brute_force(task, kind, mask, target):
    with jax.enable_x64(True):
        model, images, maps = made(task, kind)
        impact = token_impact(model, jnp.asarray(images), maps, mask=mask, target=target, chunk=8)
        unmasked = clean(model, images)
        loss = partial(loss_of, task, target, unmasked=unmasked, maps=maps, cap=model.max_depth)
        expected = np.stack([loss(masked(model, images, mask, i)) - loss(unmasked) for i in range(N)], axis=1)
    assert np.abs(expected).max() > 1e-2 and expected.shape == impact.shape
    np.testing.assert_allclose(impact, expected, atol=1e-9)


def gated(model, images, maps, gates, holder):
    """The label loss of images whose patches have these gates, and what stands in for them."""
    x = jnp.asarray(embed(model, images))
    return depth_loss(np.asarray(walk(model, x, holder, jnp.asarray(gates))), maps, model.max_depth)


@pytest.mark.parametrize("kind", mostly_long(list(KINDS), short=(2,)))
def test_gradient_is_the_finite_difference_of_the_gated_loss(kind):
    with jax.enable_x64(True):
        model, images, maps = made("depth", kind)
        impact = token_impact(model, jnp.asarray(images), maps, estimator="gradient")
        patches = embed(model, images)[:, model.num_special :]
        holder = nearest(model, patches, np.ones((2, N), bool))
        for i in range(N):
            up, down = (np.ones((2, N)) + step * (np.arange(N) == i) for step in (1e-5, -1e-5))
            loss = [gated(model, images, maps, gates, holder) for gates in (up, down)]
            np.testing.assert_allclose(impact[:, i], -(loss[0] - loss[1]) / 2e-5, atol=1e-6)
    assert np.abs(impact).max() > 1e-2


def test_a_gate_of_zero_is_a_patch_that_is_dropped():
    with jax.enable_x64(True):
        model, images, maps = made("depth")
        dropped = token_impact(model, jnp.asarray(images), maps, mask="drop")
        whole = depth_loss(clean(model, images), maps, model.max_depth)
        for i in range(N):
            gates = np.where(np.arange(N) == i, 1e-30, 1.0)[None].repeat(2, 0)
            holder = nearest(model, embed(model, images)[:, model.num_special :], gates > 0.5)
            np.testing.assert_allclose(gated(model, images, maps, gates, holder) - whole, dropped[:, i], atol=1e-9)


@pytest.mark.parametrize("kind", mostly_long(list(KINDS), short=(1,)))
def test_sampled_is_the_mean_gradient_at_its_masks(kind):
    with jax.enable_x64(True):
        model, images, maps = made("depth", kind)
        images = jnp.asarray(images)
        options = dict(estimator="sampled", num_samples=5, keep_ratio=0.6, seed=3)
        impact = token_impact(model, images, maps, **options)
        masks = np.asarray(sample_masks(image_keys(3, images), 5, N, 0.6))
        patches, total = embed(model, images)[:, model.num_special :], np.zeros((2, N))
        for m in range(5):
            holder = nearest(model, patches, masks[:, m])
            for i in range(N):
                at = np.maximum(masks[:, m], 1e-3)
                step = np.where(np.arange(N) == i, 1e-5 * at, 0)
                loss = [gated(model, images, maps, at + sign * step, holder) for sign in (1, -1)]
                total[:, i] -= (loss[0] - loss[1]) / (2 * step[:, i])
    np.testing.assert_allclose(impact, total / 5, rtol=1e-4, atol=1e-5)
    assert np.abs(impact).max() > 1e-2 and len(np.unique(masks.sum(axis=2))) > 2


def brier(prediction, aux, batch):
    """Weighted, and less what the unmasked network has; reads the images and the aux of a model of two heads, too."""
    distance = ((jax.nn.softmax(prediction) - jax.nn.one_hot(batch["label"], 3)) ** 2).sum(-1)
    apart = ((aux["logits/main"] - batch["unmasked"]) ** 2).mean(-1)
    return batch["weight"] * distance + apart + batch["image"].mean((1, 2, 3))


@pytest.mark.parametrize("mask", mostly_long(["drop", "zero", "content"]))
def test_a_users_loss_of_a_classifier_is_brute_force(mask):
    with jax.enable_x64(True):
        fields = TINY | dict(depth=2, num_classes=3, distillation_token=True, dtype="float64")
        model = as_dtype(lively(fields), jnp.float64)
        images = np.random.default_rng(0).normal(size=(2, *SIZE, 3))
        batch = dict(label=np.array([0, 2]), weight=np.array([1.0, 0.5]))

        @jax.jit
        def forward(x):
            for block in model.blocks:
                x, _ = block(x, row_of(x, 2))
            prediction, aux = model.predict(x, {})
            return prediction, aux["logits/main"]

        x, weight, label = embed(model, images), batch["weight"], batch["label"]
        unmasked = np.asarray(forward(jnp.asarray(x))[0])

        def loss(x):
            prediction, main = map(np.asarray, forward(jnp.asarray(x)))
            distance = ((softmax(prediction, axis=1) - np.eye(3)[label]) ** 2).sum(1)
            return weight * distance + ((main - unmasked) ** 2).mean(1)

        expected = []
        for i in range(N):
            y = x.copy()
            y[:, 2 + i] = np.asarray(model.patch_positions())[:, i] * (mask == "content")
            expected.append(loss(np.delete(x, 2 + i, axis=1) if mask == "drop" else y) - loss(x))
        impact = token_impact(model, jnp.asarray(images), batch, loss=brier, mask=mask, chunk=4)
        own = token_impact(model, jnp.asarray(images), batch, mask=mask, chunk=4)
    np.testing.assert_allclose(impact, np.stack(expected, axis=1), atol=1e-9)
    assert np.abs(impact).max() > 1e-2 and np.abs(own - impact).max() > 1e-2


def test_a_users_loss_of_depth_needs_no_labels():
    """With the loss of the task's own target it gives the same."""
    model, images, _ = made("depth")
    images = jnp.asarray(images)
    difference = lambda d, aux, batch: ((jnp.log(d) - jnp.log(batch["unmasked"])) ** 2).mean((1, 2))  # noqa: E731
    expected = token_impact(model, images, target="teacher")
    np.testing.assert_allclose(token_impact(model, images, loss=difference), expected, rtol=1e-5, atol=1e-7)
    assert (np.asarray(expected) > 0).all()


@pytest.mark.parametrize(
    "estimator, num_images",
    mostly_long([("exact", 2), ("sampled", 8), ("exact", 8), ("sampled", 2), ("gradient", 2)], (1,)),
)
def test_eight_devices_find_the_same_as_one(estimator, num_images):
    model, images, maps = made("depth")
    images, maps = (np.tile(x, (4, *[1] * (x.ndim - 1)))[:num_images] for x in (images, maps))
    images += np.random.default_rng(0).normal(size=images.shape).astype(np.float32) / 4
    options = dict(estimator=estimator, mask="drop", target="label", num_samples=4, keep_ratio=0.5)
    expected = token_impact(model, images, maps, **options)
    scores = Scorer(model, num_images, **options)(images, maps)()
    np.testing.assert_allclose(scores.impact, expected, atol=2e-5)
    found = np.asarray(jax.jit(lambda model, images: model(images)[0])(model, images))
    np.testing.assert_allclose(scores.loss, depth_loss(found, maps, model.max_depth), rtol=1e-4)
    assert (scores.prediction == -1).all() and np.abs(expected).max() > 1e-2


def test_a_map_that_says_nothing_has_no_loss_and_no_impact():
    model, images, maps = made("depth")
    maps[1] = 0
    for estimator in ("exact", "gradient", "sampled"):
        options = dict(estimator=estimator, mask="drop", target="label", num_samples=2, keep_ratio=0.5)
        scores = Scorer(model, 2, devices=jax.devices()[:1], **options)(images, maps)()
        assert (scores.impact[0] != 0).all() and (scores.impact[1] == 0).all()
        assert np.isfinite(scores.loss[0]) and np.isnan(scores.loss[1])


@pytest.mark.parametrize(
    "task, labels, options, message",
    [
        ("depth", None, {}, "target 'label' needs labels"),
        ("depth", {"label": np.zeros(1)}, {}, "needs labels, as 'label_map' of a batch"),
        (
            "depth",
            np.zeros((1, 16, 20), np.float32),
            {},
            r"label maps are float32 of shape \(1, 16, 20\).*metres as floats",
        ),
        ("depth", np.zeros((1, *SIZE), np.int32), {}, "label maps are int32 .*metres as floats"),
        ("depth", np.full((1, *SIZE), -1.0, np.float32), {}, r"lie in \[-1.0, -1.0\]; they are metres"),
        ("segmentation", np.zeros((1, *SIZE), np.float32), {}, r"label maps are float32 .*classes 0\.\.2, -1: ignored"),
        ("segmentation", np.full((1, *SIZE), 3), {}, r"lie in \[3, 3\]; the model has classes 0\.\.2"),
        ("depth", None, dict(loss=3), "loss is 3; it is a function"),
        ("depth", None, dict(loss=lambda *_: 0.0), r"the loss gives a float; it gives a float for each image"),
        (
            "depth",
            None,
            dict(loss=lambda d, *_: d),
            r"the loss gives float32 of shape \(6, 16, 24\); .* \(6,\) here",
        ),
        ("depth", None, dict(loss=lambda d, *_: d[:, 0, 0], target="teacher"), "leave the target"),
        (
            "depth",
            dict(id=["a"]),
            dict(loss=lambda d, *_: d[:, 0, 0]),
            r"labels\['id'\] is \['a'\]; it is an array of numbers",
        ),
        ("depth", dict(weight=np.ones(2)), dict(loss=lambda d, *_: d[:, 0, 0]), r"labels\['weight'\] has shape \(2,\)"),
    ],
)
def test_misuse(task, labels, options, message):
    model, images, _ = made(task)
    with pytest.raises(InputError, match=message) as error:
        inspect.unwrap(token_impact)(model, jnp.asarray(images[:1]), labels, **options)
    assert "\n" not in str(error.value)
