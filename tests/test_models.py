import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, call, embed, mostly_long, numpy_images, numpy_model, row_of
from flax import nnx

from tif_jax import cost
from tif_jax.errors import InputError
from tif_jax.models import blueprint, create_model
from tif_jax.models.build import Rngs
from tif_jax.models.params import params_of
from tif_jax.training.losses import classification

TINY = dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, num_classes=5)


def tokens(*shape, width=32, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "parameters"),
    mostly_long(
        [("deit_tiny_patch16_224", 5_717_416), ("deit_small_patch16_224", 22_050_664), ("deit_base_patch16_224", 86_567_656),
         ("deit_base_distilled_patch16_224", 87_338_192), ("vit_large_patch16_384", 304_715_752),
         ("deit3_small_patch16_224", 22_059_496), ("vit_base_patch16_plus_clip_240", 117_537_384),
         ("vit_xsmall_patch16_clip_224", 8_402_920), ("vit_gigantic_patch14_clip_224", 1_844_442_344),
         ("vit_base_patch16_siglip_224", 93_653_224), ("vit_so400m_patch14_siglip_384", 429_378_600),
         ("vit_giantopt_patch16_siglip_256", 1_164_705_256), ("vit_base_patch16_siglip_gap_224", 86_566_120),
         ("vit_small_patch14_reg4_dinov2", 22_442_344), ("deit3_huge_patch14_224", 632_126_440)],
        short=(0, 3, 5, 6, 9, 12, 13),
    ),
)  # fmt: skip
def test_published_parameter_counts(name, parameters):
    params = nnx.state(nnx.eval_shape(blueprint(name), jax.random.key(0)), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_tokens_are_in_raster_order():
    model = numpy_model(TINY | dict(image_size=(16, 32)))
    images = np.zeros((8, 16, 32, 3), np.float32)
    for i in range(8):  # image i has one bright patch, number i
        row, column = divmod(i, 4)
        images[i, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1.0
    x = np.asarray(embed(model, images)) - np.asarray(embed(model, np.zeros_like(images)))
    assert model.grid == (2, 4)
    np.testing.assert_array_equal(np.abs(x[:, 1:]).max(axis=-1).argmax(axis=1), np.arange(8))


def test_drop_path_drops_whole_branches_and_keeps_the_mean():
    model = numpy_model(TINY | dict(drop_path=0.5))
    x = np.tile(tokens(1, 5), (2000, 1, 1))
    first, block = model.blocks  # rates rise linearly from 0: the last block has 0.5
    train = jax.jit(lambda block, x: block.attend(x, row_of(x), rngs=nnx.Rngs(0))[0])
    clean = np.asarray(attend(block, x[:1])[0]) - x[:1]
    dropped = np.asarray(train(block, x)) - x
    is_zero = (np.abs(dropped) < 1e-6).all(axis=(1, 2))
    assert 0.45 < is_zero.mean() < 0.55
    np.testing.assert_allclose(dropped[~is_zero], np.broadcast_to(2 * clean, dropped[~is_zero].shape), atol=1e-5)
    np.testing.assert_array_equal(train(first, x), attend(first, x)[0])


def test_key_log_weight_of_minus_infinity_removes_a_token():
    block = numpy_model(TINY).blocks[0]
    x, weight = tokens(2, 6), np.zeros((2, 6), np.float32)
    weight[:, 3] = -np.inf
    run = jax.jit(lambda x, *args: block(x, row_of(x), *args)[0])
    np.testing.assert_allclose(np.delete(run(x, weight), 3, axis=1), run(np.delete(x, 3, axis=1)), atol=1e-5)


def test_query_and_key_are_what_attention_compares():
    _, qk = attend(create_model(TINY | dict(qk_norm=True)).blocks[0], tokens(2, 6))
    query = np.asarray(qk.query)
    np.testing.assert_allclose(query.mean(axis=-1), 0, atol=1e-5)  # after the norm
    np.testing.assert_allclose(query.std(axis=-1), 1, atol=1e-3)


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    model = numpy_model(TINY, dtype="bfloat16")
    images = numpy_images(2)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    assert embed(model, images).dtype == jnp.bfloat16 and call(model, images)[0].dtype == jnp.float32
    np.testing.assert_allclose(call(model, images)[0], call(numpy_model(TINY), images)[0], atol=0.02)


def test_weights_are_drawn_with_the_keys_of_nnx():
    ours, theirs = Rngs(jax.random.key(3)), nnx.Rngs(jax.random.key(3))
    for _ in range(3):
        assert ours.params() == theirs.params()


def test_every_head_is_trained():
    """The prediction is the mean of two heads; of each the classification loss knows."""
    batch = {"label": jnp.zeros(2, jnp.int32)}
    images = numpy_images(2)
    for fields, heads in (
        (dict(distillation_token=True), {"head", "distillation_head"}),
        (dict(pool="mean", class_head=True), {"head", "class_head"}),
    ):
        graphdef, params = nnx.split(numpy_model(TINY | fields))

        def loss(params, graphdef=graphdef):
            return classification(*nnx.merge(graphdef, params)(images), batch)["loss"].mean()

        gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
        norms = {name: float(jnp.abs(gradient[name]["kernel"]).max()) for name in heads}
        assert min(norms.values()) > 0, norms


def test_a_head_on_the_class_token_predicts_nothing():
    with_head, without = (numpy_model(TINY | dict(pool="mean", class_head=given)) for given in (True, False))
    nnx.update(
        without, {k: v for k, v in params_of(with_head).items() if not k.startswith("class_") or k == "class_token"}
    )
    images = numpy_images(2)
    logits, aux = call(with_head, images)
    np.testing.assert_array_equal(logits, call(without, images)[0])
    assert cost(with_head).gmac == cost(without).gmac

    @jax.jit
    def by_hand(images):
        return with_head.class_head(with_head.class_norm(with_head.encode(with_head.embed(images))[0][:, 0]))

    np.testing.assert_allclose(aux["logits/class"], by_hand(images), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(class_head=True), "class_head needs class_token=True and pool 'mean',"),
        (dict(image_size=30), "30x30 is not a multiple of patch_size 8"),
        (dict(num_heads=3), "width 32 is not a multiple of num_heads 3"),
        (dict(pool="max"), "pool is 'max'"),
        (dict(class_token=False), "needs class_token"),
        (dict(gelu="relu"), "gelu is 'relu'"),
        (dict(dtype="float16"), "dtype is 'float16'"),
        (dict(hight=3), "hight"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY | fields)


@pytest.mark.parametrize("name", ["resnet50", "deit_tiny_patch16", "swin_tiny_patch4_window7_224"])
def test_unknown_name(name):
    with pytest.raises(InputError, match="Unknown model"):
        create_model(name)


def test_wrong_image_size():
    with pytest.raises(InputError, match=r"takes \(B, 32, 32, 3\)"):
        numpy_model(TINY)(jnp.zeros((1, 16, 32, 3)))
