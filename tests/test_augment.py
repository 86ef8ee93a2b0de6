"""Augmentation: operations as timm's, draws of the right distribution, and nothing random but the generator's."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import jaxtyping
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import stats

from tif_jax.data.augment import OPERATIONS, Augmentation, augment, erase
from tif_jax.errors import InputError

DEIT = Augmentation("rand-m9-mstd0.5-inc1", erase=0.25)
GREY = (124, 116, 104)

# timm 1.0.31 with Pillow 13: AugmentOp(name, prob=1, magnitude=9) on `picture()`, hparams as create_transform sets them
# with interpolation='bicubic', signs as given; pixels [1::5, 1::6]. Pillow 10.0 gives the same.
TIMM = {
    ("AutoContrast", 0.9): "0910f93f52b1759400acd6e43629e27a6b9bbfadea02efce6342ccb6848507c6d45a08b7905bb6f29d6f51dfbdb221a1",
    ("Equalize", 0.9): "2f17ff7974efcde000ffffff6a3affd39cc1ffffff29ffffae5cffffc6a12dffff9d0cfff282faffee808effffff2ecf",
    ("Invert", 0.9): "daef2cb0ad5c866bd45c293ab7d63b82946b4d5236df104994bd4a547b7adb39459bf75871a459266289a2205457de67",
    ("Rotate", 0.9): "7c74682c7664a9c074910061492dc64c748194bcb299009d4329c2a073935eb995b000317c7468ee6f9e50b94d7c7468",
    ("Rotate", -0.9): "7c74687d3cbd416a7d7c74685a3db6bd6c976f992970c65f8c6f9f8f9b69afc7aaaaffc07c746895c91bc8d550572150",
    ("Posterize", 0.9): "000080000080008000808080000080000080808080008080000080808080008080000080800080808000008080800080",
    ("Solarize", 0.9): "da102cb0ad5c866bd45c293ab7d63b82946b4d5236df104994bd4a547b7adb39459b085871a459266289a2205457de67",
    ("SolarizeAdd", 0.9): "8873d3b2b5a3dc948ea3d6c5ab8cc4e0ce94b2adc983efb6cea5b5ab848587c6bac76ba78ebea6d99dd9c0dfaba88498",
    ("Color", 0.9): "1e00ff464bde73a40087e3c54b13ff8362adb2a8db00ffbe772dfdc07a7c00eed88900ffa347cfff924b18ffa5e900cc",
    ("Color", -0.9): "2b274c5758677e836fbec8c5443e5c76737ab2b1b690b7ad5e566c958d8d7e9d9b3e2d4b786e7cb2a7a0a1bab0664c63",
    ("Contrast", 0.9): "0000ff272cbf73a400bffffc1a00fb7a59a4dad1ff00ffe1590fdfcd878900fee84d00c6993dc4ffb46d40ffcdc800ab",
    ("Contrast", -0.9): "6e6a8f7677867e836f86908d756f8c7f7c8389888d6d958a7c748a8880806e8d8b7a698782788790857e799288876d84",
    ("Brightness", 0.9): "421cff8e94ffdbff4dffffff824affe2c1ffffffff39ffffc177ffffeef041ffffb50effffa4ffffffd5a8ffffff3bff",
    ("Brightness", -0.9): "0703280f0f1e161c081e28250d072517141c212026062d22140c2220191906252313011f1a111f291d16112a201f061c",
    ("Sharpness", 0.9): "2510d34f52a3799400c8d6e54829c47d6b94cbade900efd66b42b5c4848500c6ba5700a7b35ba6ff9d7643dfabc12198",
    ("Sharpness", -0.9): "2510d34f52a37994557dd6a44829c47d6b9498ada851ef956b42b591848555c6ba7027a7685ba6a79d7676dfab8e2198",
    ("ShearX", 0.9): "2814d252569c7c9865a6dacc8d3bbede7d7a61bf9b6b416e9a64a4c3a64c41e85b7c74689a8c8975ce726910717c7468",
    ("ShearX", -0.9): "2109d34b4da9758f1d9fd1907c74681b58a86c9a3caadc3d7c74687b61a7cda3554be5687c7468756ba039ad5eb5ff81",
    ("ShearY", 0.9): "2812d1b35c9c77a5cd3df0b44b2bc2dc758d76bebe4209a56e44b3438e7eafd7afa92396915da47c74687c74687c7468",
    ("ShearY", -0.9): "210dd47c74687c74687c74684426c5e4609ab39bed89d3c6673fb64b798b5fb4c41bedb78a58a774927cb5cdb58500a8",
    ("TranslateXRel", 0.9):
        "6271738cb3867c74687c74683f8a6460cc777c74687c7468cda35549e5687c74687c746896bc461d15597c74687c7468",
    ("TranslateXRel", -0.9):
        "7c74687c74683b32c265746c7c74687c7468ba4bb32b8d5d7c74687c74689864a4c5a64d7c74687c7468547d959abf3e",
    ("TranslateYRel", 0.9):
        "5834bcb7768c89b8c13effae7b4dad3b8f7dc2d1b2ab139f7c74687c74687c74687c74687c74687c74687c74687c7468",
    ("TranslateYRel", -0.9):
        "7c74687c74687c74687c74687c74687c74687c74687c7468371dcbec5f9bb1a1d083e3bd5a36bc70788c4cbac11cffae",
}  # fmt: skip


def picture():
    y, x = np.mgrid[:18, :22]
    pixels = [7 * x * y % 199 + 30, (11 * x + 5 * y) % 256, 255 - (x * x + 3 * y) % 173 - 40]
    return Image.fromarray(np.stack(pixels, axis=-1).astype(np.uint8))


def draws(monkeypatch, options, num, seed=0):
    """The (operation, level) that each of num pictures would have undergone."""
    drawn = []
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS, name, lambda image, level, fill, name=name: (drawn[-1].append((name, level)), image)[1]
        )
    rng, image = np.random.default_rng(seed), picture()
    for _ in range(num):
        drawn.append([])
        augment(image, options, rng)
    return drawn


def fits(statistic):
    return statistic.pvalue > 1e-3


# RandAugment ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, level", TIMM)
def test_operations_are_timms(name, level):
    assert np.asarray(OPERATIONS[name](picture(), level, GREY))[1::5, 1::6].tobytes().hex() == TIMM[name, level]


def test_every_operation_is_compared_with_timms():
    assert {name for name, _ in TIMM} == set(OPERATIONS) and len(OPERATIONS) == 15


def test_the_strongest_posterising_leaves_nothing():
    assert not np.asarray(OPERATIONS["Posterize"](picture(), 1.0, GREY)).any()


def test_operations_are_drawn_as_timm_draws_them(monkeypatch):
    drawn = draws(monkeypatch, DEIT, 8000)
    # Two operations with replacement, each with probability 1/2.
    assert fits(stats.chisquare(np.bincount([len(some) for some in drawn]), [2000, 4000, 2000]))
    names, levels = zip(*itertools.chain(*drawn), strict=True)
    assert fits(stats.chisquare([names.count(name) for name in OPERATIONS]))
    pairs = [some[0][0] == some[1][0] for some in drawn if len(some) == 2]
    assert fits(stats.binomtest(sum(pairs), len(pairs), 1 / 15))
    # N(9, 0.5) cut at 10, in both directions alike.
    magnitudes = 10 * np.abs(levels)
    whole = magnitudes < 10
    assert fits(stats.binomtest(int((~whole).sum()), len(levels), stats.norm.sf(2)))
    assert magnitudes.max() == 10
    assert fits(stats.kstest(magnitudes[whole], stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf))
    assert fits(stats.binomtest(int((np.array(levels) > 0).sum()), len(levels)))


def test_magnitudes_are_cut_at_0(monkeypatch):
    drawn = draws(monkeypatch, Augmentation("m0-mstd1-n1-p1-inc1"), 1000)
    assert fits(stats.binomtest(sum(level == 0 for ((_, level),) in drawn), 1000))


@pytest.mark.parametrize(
    "text, num, level", [("rand-m5-n3-p1-inc1", 3, 0.5), ("inc1-p1.0", 2, 1.0), ("m2.5-n1-p1-mstd0-inc1", 1, 0.25)]
)
def test_what_the_text_says(monkeypatch, text, num, level):
    for drawn in draws(monkeypatch, Augmentation(text), 5):
        assert [abs(level) for _, level in drawn] == [level] * num


def test_what_comes_into_view_has_the_mean_colour(monkeypatch):
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, OPERATIONS["TranslateXRel"])
    black = Image.new("RGB", (20, 10))
    for mean, colour in (((0.485, 0.456, 0.406), GREY), ((0.1, 0.5, 1.0), (26, 128, 255))):
        pixels = augment(black, Augmentation("m10-n1-p1-inc1"), np.random.default_rng(0), mean=mean)
        assert sorted(pixels.getcolors()) == [(90, colour), (110, (0, 0, 0))]


# Colour jitter --------------------------------------------------------------------------------------------------------


def test_jitter_is_uniform_and_in_random_order(monkeypatch):
    drawn = []

    class Enhance:
        def __init__(self, name, image):
            self.name, self.image = name, image

        def enhance(self, factor):
            drawn.append((self.name, factor))
            return self.image

    for name in "Brightness", "Contrast", "Color":
        monkeypatch.setattr(ImageEnhance, name, lambda image, name=name: Enhance(name, image))
    rng, image = np.random.default_rng(0), picture()
    for _ in range(3000):
        augment(image, Augmentation(color_jitter=0.4), rng)
    names = np.array([name for name, _ in drawn]).reshape(3000, 3)
    orders, counts = np.unique(names, axis=0, return_counts=True)
    assert len(orders) == 6 and fits(stats.chisquare(counts))
    factors = np.array([factor for _, factor in drawn])
    for name in np.unique(names):
        assert fits(stats.kstest(factors[names.ravel() == name], stats.uniform(0.6, 0.8).cdf))


def test_jitter_changes_the_picture_and_rests_where_there_is_rand_augment():
    assert augment(picture(), Augmentation(color_jitter=0.4), np.random.default_rng(0)) != picture()
    both = Augmentation(DEIT.rand_augment, color_jitter=0.4)
    for seed in range(20):
        assert augment(picture(), both, np.random.default_rng(seed)) == augment(
            picture(), DEIT, np.random.default_rng(seed)
        )


# Random erasing -------------------------------------------------------------------------------------------------------


def erased_boxes(num, size=(56, 72)):
    """Top, left, height and width of what was erased from num pictures (n, 4)."""
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(num):
        noise = erase(np.zeros((*size, 3), np.float32), 1.0, rng).any(axis=2)
        ys, xs = noise.any(axis=1).nonzero()[0], noise.any(axis=0).nonzero()[0]
        boxes.append((ys[0], xs[0], len(ys), len(xs)))
        assert noise[ys[0] : ys[0] + len(ys), xs[0] : xs[0] + len(xs)].all()
    return np.array(boxes)


def test_erased_boxes_are_timms():
    top, left, height, width = erased_boxes(4000).T
    # Deciles of 400,000 boxes of timm 1.0.31, RandomErasing(1, mode='pixel'), in pictures of 56 rows and 72 columns.
    deciles = np.arange(1, 10) / 10
    assert np.abs(np.quantile(height, deciles) - [13, 16, 19, 21, 24, 28, 32, 37, 44]).max() <= 1
    assert np.abs(np.quantile(width, deciles) - [13, 16, 19, 22, 25, 29, 33, 38, 46]).max() <= 1
    assert (height * width / (56 * 72)).mean() == pytest.approx(0.1735, abs=0.005)  # of timm's, too
    assert min(top) == min(left) == 0 and max(top + height) == 56 and max(left + width) == 72
    rng = np.random.default_rng(1)  # of places in pixels, shares that are uniform
    assert fits(stats.kstest((top + rng.random(4000)) / (56 - height + 1), "uniform"))
    assert fits(stats.kstest((left + rng.random(4000)) / (72 - width + 1), "uniform"))


def test_erasing_writes_normal_noise_in_place_with_the_given_probability():
    rng = np.random.default_rng(0)
    noise, num = [], 0
    for _ in range(1000):
        image = np.full((32, 32, 3), 7, np.float32)
        assert erase(image, 0.25, rng) is image
        noise.append(image[image != 7])
        num += bool(noise[-1].size)
    assert fits(stats.binomtest(num, 1000, 0.25))
    values = np.concatenate(noise)
    assert fits(stats.kstest(values, "norm")) and abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_a_strip_holds_no_box():
    strip = np.ones((1, 50, 3), np.float32)
    for seed in range(20):
        assert (erase(strip, 1.0, np.random.default_rng(seed)) == 1).all()


# All ------------------------------------------------------------------------------------------------------------------


def view(options, seed):
    rng = np.random.default_rng(seed)
    pixels = augment(picture(), options, rng)
    return erase(np.array(pixels, np.float32), options.erase, rng)


@pytest.mark.parametrize("options", [DEIT, Augmentation(color_jitter=0.4, erase=0.5)])
def test_a_view_is_a_function_of_its_generator(options):
    alone = [view(options, seed) for seed in range(200)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: view(options, seed), range(200)))
    np.testing.assert_array_equal(alone, together)
    assert len({pixels.tobytes() for pixels in alone}) > 100


def test_off_by_default():
    image, pixels = picture(), np.ones((8, 8, 3), np.float32)
    rng = np.random.default_rng(0)
    assert augment(image, Augmentation(), rng) is image
    assert rng.random() == np.random.default_rng(0).random()  # nothing drawn: views scored earlier stay what they were
    assert (erase(pixels, Augmentation().erase, rng) == 1).all()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rand_augment": "m9-foo"}, "the part 'foo'"),
        ({"rand_augment": "augmix-m3-inc1"}, "the part 'augmix'"),
        ({"rand_augment": "m11-inc1"}, "the part 'm11'"),
        ({"rand_augment": "m9-n1.5-inc1"}, "the part 'n1.5'"),
        ({"rand_augment": "m9-p2-inc1"}, "the part 'p2'"),
        ({"rand_augment": "m-9-inc1"}, "the part 'm'"),
        ({"rand_augment": "m9-mstd0.5"}, "add '-inc1'"),
        ({"rand_augment": "m9-inc0"}, "add '-inc1'"),
        ({"rand_augment": 9}, "rand_augment is 9"),
        ({"color_jitter": -0.1}, "color_jitter is -0.1"),
        ({"erase": 1.5}, "erase is 1.5"),
        ({"erase": float("nan")}, "erase is nan"),
        ({"erase": "often"}, "erase is 'often'"),
    ],
)
def test_bad_options(wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # outside tests nothing else looks at types
    with pytest.raises(InputError) as error:
        Augmentation(**wrong)
    assert message in str(error.value) and "\n" not in str(error.value)
