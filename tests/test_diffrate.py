"""DiffRate against a slow numpy version of its step, the published rates against the published multiply-adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, cost_of, embed, feed_forward, lively, mostly_long, numpy_images, whole_cost_of

from benchmarks.published import DIFFRATE_RATES
from tif_jax.errors import InputError
from tif_jax.reducers.diffrate import Diffrate, match, ranked, rates

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
EVERYTHING = dict(distillation_token=True, num_registers=2, qk_norm=True, layer_scale=0.3)


@functools.cache
def model_of(**options):
    return lively(TINY, reducer="diffrate", **options)


def class_attention(qk, size, num_special):
    """Of one image, in float64: what the class token gives to each patch, proportional to sizes."""
    query, key = (np.asarray(part)[0].astype(np.float64) for part in (qk.query[:, :1], qk.key))
    logits = np.einsum("hc,thc->ht", query[0], key) / np.sqrt(key.shape[-1])
    weights = np.exp(logits) * np.concatenate([np.ones(num_special), size])
    return (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)[num_special:]


def reference_step(patches, size, groups, scores, num_dropped, num_merged):
    """Of one image: sorts by the scores, cuts the end off, and lets what is then the end merge into the rest."""
    num_staying = max(1, len(patches) - num_dropped)
    num_left = max(1, num_staying - num_merged)
    order = sorted(range(len(patches)), key=lambda i: (-scores[i], i))
    left = sorted(order[:num_left])
    members, sizes = {i: [i] for i in left}, {i: size[i] for i in left}
    for source in order[num_left:num_staying]:
        a = patches[source]
        cosines = [a @ patches[i] / np.linalg.norm(a) / np.linalg.norm(patches[i]) for i in left]
        target = left[int(np.argmax(cosines))]
        members[target].append(source)
        sizes[target] += size[source] * max(0.0, max(cosines))
    means = np.array([np.mean([patches[i] for i in members[target]], axis=0) for target in left])
    groups = [[patch for i in members[target] for patch in groups[i]] for target in left]
    return means, np.array([sizes[i] for i in left]), groups


def reference_encode(model, x, num_dropped, num_merged, proportional):
    """The walk, one image at a time; half-steps of the blocks are taken as given. Rows, sources, sizes."""
    num_special, outputs, sources, sizes = model.num_special, [], [], []
    for tokens in np.asarray(x):
        size, groups = np.ones(len(tokens) - num_special), [[i] for i in range(len(tokens) - num_special)]
        for block, *numbers in zip(model.blocks, num_dropped, num_merged, strict=True):
            seen = size if proportional else np.ones(len(size))
            log_size = jnp.asarray(np.log(np.concatenate([np.ones(num_special), seen]))[None], jnp.float32)
            y, qk = attend(block, jnp.asarray(tokens[None]), log_size)
            tokens, scores = np.asarray(y)[0], class_attention(qk, seen, num_special)
            patches, size, groups = reference_step(
                tokens[num_special:].astype(np.float64), size, groups, scores, *numbers
            )
            tokens = np.concatenate([tokens[:num_special], patches]).astype(np.float32)
            tokens = np.asarray(feed_forward(block, jnp.asarray(tokens[None])))[0]
        outputs.append(tokens)
        sources.append([next((row for row, g in enumerate(groups) if i in g), -1) for i in range(16)])
        sizes.append(size)
    return np.array(outputs), np.array(sources), np.array(sizes)


@pytest.mark.parametrize(
    ("num_dropped", "num_merged", "proportional", "fields"),
    mostly_long(
        [
            ((0, 3, 2), (4, 0, 3), True, {}),
            ((1, 2, 1), (2, 2, 2), False, {}),
            ((0, 0, 40), (3, 20, 0), True, {}),
            ((2, 0, 1), (0, 4, 3), True, EVERYTHING),
        ]
    ),
)
def test_against_the_reference(num_dropped, num_merged, proportional, fields):
    model = model_of(num_dropped=num_dropped, num_merged=num_merged, proportional=proportional, **fields)
    x = embed(model, numpy_images(3))
    encoded, aux = jax.jit(model.encode)(x)
    expected, source, size = reference_encode(model, x, num_dropped, num_merged, proportional)
    np.testing.assert_allclose(encoded, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(aux["source"], source)
    assert sorted(aux) == ["size"] * proportional + ["source"]
    if proportional:
        np.testing.assert_allclose(aux["size"], size, rtol=1e-5)


def test_ties_go_to_the_lower_row_and_a_negative_cosine_counts_as_zero():
    left, gone = ranked(jnp.ones((1, 6)), 3, 5)
    assert left.tolist() == [[0, 1, 2]] and gone.tolist() == [[3, 4]]
    fusion, similarity = match(jnp.asarray([[[1.0], [1], [1], [2], [-1], [1]]]), left, gone)
    assert fusion.into.tolist() == [[0, 0]] and similarity.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("row", mostly_long(list(DIFFRATE_RATES), short=(0, 2)), ids=lambda row: row.model)
def test_published_multiply_adds(row):
    """The formula with our token counts, to four digits; their code counts the class token among the patches embedded."""
    width, depth, patch, num_patches = {
        "tiny": (192, 12, 16, 196), "small": (384, 12, 16, 196), "base": (768, 12, 16, 196),
        "large": (1024, 24, 16, 196), "huge": (1280, 32, 14, 256),
    }[row.model.split("_")[1]]  # fmt: skip
    counted = whole_cost_of(row.model, reducer="diffrate", **rates(row.prune_kept_num, row.merge_kept_num))
    assert len(counted.tokens) == depth and counted.tokens == tuple(
        np.minimum.accumulate(np.minimum(row.prune_kept_num, row.merge_kept_num))
    )
    arriving = (num_patches + 1, *counted.tokens[:-1])
    blocks = sum(
        4 * n * width**2 + 2 * n**2 * width + 8 * left * width**2
        for n, left in zip(arriving, counted.tokens, strict=True)
    )
    total = num_patches * 3 * patch**2 * width + blocks + 1000 * width
    assert round(total / 1e9, 4) == row.gmac
    if row.readme is not None:
        assert round((total + 3 * patch**2 * width) / 1e9, 3) == row.readme
    assert 0 < counted.gmac / row.gmac - 1 < 0.01  # the similarities, and the class row


def test_the_lists_as_text_as_they_are_published():
    assert rates("[197,190,150]", "[197,180, 150]") == {"num_dropped": (0, 7, 30), "num_merged": (0, 10, 0)}
    assert rates([197, 199, 150], [190, 195, 120]) == {"num_dropped": (0, 0, 40), "num_merged": (7, 0, 30)}
    assert rates((90,), (80,), num_tokens=101) == {"num_dropped": (11,), "num_merged": (10,)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rates("None", "[197, 3]"), "prune_kept_num is 'None'; it lists for each block how many tokens"),
        (lambda: rates([197, 3], "[197, 0]"), "merge_kept_num is '\\[197, 0\\]'; it lists"),
        (lambda: rates([], []), "prune_kept_num is \\[\\]; it lists"),
        (lambda: rates([197], [197, 3]), "prune_kept_num has 1 entries and merge_kept_num 2"),
        (lambda: Diffrate(num_dropped=-1), "num_dropped is -1; it is the number of patch tokens dropped per block"),
        (lambda: cost_of(TINY, reducer="diffrate", num_dropped=(1, 2)), "num_dropped has 2 entries for 3 blocks"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(InputError, match=message):
        make()
