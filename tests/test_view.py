"""`tif view` and `tif_jax.view`: what stands on the page and in the figures, for any names, files and models."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cases import call, lively, mostly_long
from pictures import picture
from PIL import Image
from small_project import forget_handlers, last_line

import tif_jax
from tif_jax.__main__ import main
from tif_jax.commands.view import reducers_in
from tif_jax.data.preprocess import Preprocessing
from tif_jax.errors import InputError
from tif_jax.figures.seen import under, ways_of
from tif_jax.figures.sheet import as_png
from tif_jax.models.model import FULL, carried
from tif_jax.models.params import params_of
from tif_jax.runtime import records
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State

FIELDS = dict(image_size=(16, 24), patch_size=4, width=16, depth=1, num_heads=2, num_classes=3)
NAMES = ('<b>"ant" & co</b>', "bee $x_1$", "\N{CJK UNIFIED IDEOGRAPH-732B}")
TIF = dict(name="tif", keep_ratio=0.25)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """The images, tags and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.texts, self.links = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        self.links += [found[key] for key in ("src", "href") if key in found]
        if tag == "img":
            self.images.append(found)

    def handle_data(self, data):
        self.texts.append(data)

    def pixels(self, i):
        return Image.open(io.BytesIO(base64.b64decode(self.images[i]["src"].partition(",")[2])))


def model_of(reducer=None, seed=0):
    reducer = dict(reducer or {"name": "full"})
    model = lively(FIELDS, seed=seed, reducer=reducer.pop("name"), **reducer)
    model.class_names = NAMES
    return model


def save(folder, reducer=None, seed=0):
    model = model_of(reducer, seed)
    described = {"model": FIELDS, "reducer": reducer or {"name": "full"}, "config": {}, **carried(model)}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(State(np.int32(7), params_of(model), ()), described, {})
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights, a finished run, and pictures of all kinds; read only."""
    root = tmp_path_factory.mktemp("made")
    save(root / "weights", seed=3)
    for folder, reducer in (("backbone", None), ("finetune/full-1-0", None), ("finetune/tif-0.25-0", TIF)):
        save(root / "run" / folder, reducer, seed=len(folder))
    rows = [{"label": label, "seed": 0, "directory": f"finetune/{label}-0"} for label in ("full-1", "tif-0.25")]
    records.write(root / "run" / "report.json", {"rows": rows, "best": None})
    for name in ("a", "b"):
        (root / "photos" / name).mkdir(parents=True)
        picture(ord(name)).save(root / "photos" / name / "x.png")
    picture(1).convert("LA").save(root / "photos" / "A&B <i>ünï.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(3).save(root / "photos" / "turned.jpg", exif=exif, quality=95)
    (root / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return root


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def run(line):
    forget_handlers()
    return main(["view", *line.split()])


def softmax(logits):
    shares = np.exp(np.asarray(logits, np.float64)[0])
    return shares / shares.sum()


def test_a_run(place, tmp_path, capsys):
    """Its reducers with their own weights, the filter's prediction, and a page that needs nothing else."""
    assert run(f"--workdir run --out {tmp_path}/out photos --top 2 --num-samples 2") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == f"{tmp_path}/out/index.html"
    assert "broken.jpg" in captured.err and "1 of 5 pictures could not be read" in captured.err
    names = {path.name for path in Path(tmp_path, "out").iterdir()}
    assert names == {"index.html", "A_B_i_ünï.png", "turned.png", "x.png", "x-2.png"}
    text = Path(tmp_path, "out/index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "b>", "i"}) and not re.search("https?://|url\\(", text)
    assert len(page.images) == 4 * 4  # photograph, impact, prediction, tokens
    assert all(image["alt"] and image["src"].startswith("data:image/jpeg;base64,") for image in page.images)
    assert {*NAMES} & {*page.texts} and "photos/A&B <i>ünï.png" in page.texts and "tif-0.25" in page.texts
    assert any("16" not in text and "6 of 24" in text for text in page.texts)
    # Probabilities: a plain forward pass of each, in numpy.
    full, few = (tif_jax.load(f"run/finetune/{name}-0") for name in ("full-1", "tif-0.25"))
    images = full.preprocess(["photos/turned.jpg"])
    before, after = (softmax(call(model, images)[0]) for model in (full, few))
    of_turned = page.texts[page.texts.index("photos/turned.jpg") :]
    rows = of_turned[of_turned.index("after") :]
    for output in np.argsort(-after)[:2]:
        i = rows.index(NAMES[output])
        assert rows[i + 1 : i + 3] == [f"{before[output]:.1%}", f"{after[output]:.1%}"]
    # The photograph is upright: the view of the model, in its own pixels but for the file format.
    first = next(i for i, image in enumerate(page.images) if "turned" in image["alt"])
    shown = np.asarray(page.pixels(first).resize((24, 16), Image.Resampling.BOX), float)
    how = full.preprocessing
    np.testing.assert_allclose(shown, 255 * (np.asarray(images[0]) * how.std + how.mean).clip(0, 1), atol=12)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome")
def test_in_a_browser(place, tmp_path):
    """On a phone: every image is there, nothing is wider than the screen."""
    assert run(f"--workdir run/backbone --out {tmp_path} photos/a/x.png photos/b --num-samples 2") == 0
    page = Path(tmp_path, "index.html")
    asks = "JSON.stringify([[...document.images].filter(i => !i.naturalWidth).length, document.images.length, "
    asks += "document.documentElement.scrollWidth, window.innerWidth])"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"<script>onload = () => document.title = {asks}</script></body>"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/browser",
        "--window-size=390,844",
    ]
    command = [str(BROWSER), *flags, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120)
    missing, number, wide, screen = json.loads(re.search(r"<title>(\[.*?\])</title>", dumped.stdout)[1])
    assert missing == 0 and number >= 2 * 5 and wide <= screen


def test_weights_with_reducers_that_are_named(place, tmp_path, capsys):
    line = f"--weights weights/checkpoints --out {tmp_path} --num-images 1 photos/a photos/b --num-samples 2"
    assert run(f"{line} --reducers tome:num_merged=4,random:keep_ratio=0.5:draw_seed=1") == 0
    assert "1 of 2 pictures are shown" in capsys.readouterr().err
    texts = Page((tmp_path / "index.html").read_text()).texts
    assert {"tome (num_merged=4)", "random (keep_ratio=0.5, draw_seed=1)"} <= {*texts}
    assert "block 0: 20 of 24" in texts and "block 0: 12 of 24" in texts


def test_what_others_made_is_not_overwritten(place, capsys):
    before = Path("photos/a/x.png").read_bytes()
    assert run("--workdir run photos/a/x.png --out photos/a --num-samples 2") == 2
    assert "photos/a/x.png is no file of `tif view`" in last_line(capsys)
    assert Path("photos/a/x.png").read_bytes() == before and not Path("photos/a/index.html").exists()


def test_the_words_of_the_line():
    assert reducers_in("evit,tome:num_merged=(4,4), bat:keep_ratio=0.5:sites=(0,)") == [
        {"name": "evit"},
        {"name": "tome", "num_merged": (4, 4)},
        {"name": "bat", "keep_ratio": 0.5, "sites": (0,)},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("photos", "one of the arguments --workdir --weights is required"),
        ("--workdir run", "the following arguments are required: IMAGE|FOLDER"),
        ("--workdir nowhere photos", "nowhere"),
        ("--workdir run photos --top 0", "--top is 0"),
        ("--workdir run photos --num-images 0", "--num-images is 0; it is at least 1"),
        ("--workdir run photos --out run/report.json", "run/report.json is no folder"),
        ("--workdir run photos --estimator gradient", "'gradient' with target 'teacher' is zero everywhere"),
        ("--workdir run photos --reducers evit:0.5", "--reducers is 'evit:0.5'"),
        ("--workdir run photos --reducers nothing", "Unknown reducer 'nothing'"),
        ("--workdir run photos --reducers tif", "tif has something to learn first"),
        ("--workdir run photos --reducers evit:sites=(7,)", "sites is (7,); the model has blocks 0..0"),
        ("--workdir run photos/broken.jpg", "none of the pictures can be read"),
        ("--weights weights photos --config digits", "give --workdir with it"),
        ("--workdir run photos --config.seed=1", "unknown flag --config.seed=1"),
    ],
)
def test_mistakes_of_the_line(place, tmp_path, capsys, line, message):
    assert run(line if "--out" in line else f"{line} --out {tmp_path}/out") == 2
    assert message in last_line(capsys)
    assert not (tmp_path / "out").exists()


# Python


def test_a_figure_of_several_pictures():
    model = model_of(seed=3)
    images = [picture(0), np.asarray(picture(1))]
    figure = tif_jax.view(model, images, reducers=["norm", model_of(TIF)], num_samples=2)
    assert as_png(figure, 30).startswith(b"\x89PNG") and len(figure.subfigs) == 2
    texts = {axes.get_ylabel() for part in figure.subfigs for axes in part.axes}
    assert {"norm", "tif (keep_ratio=0.25)"} <= texts
    assert tif_jax.view(model_of(TIF), images[:1], num_samples=2).subfigs


def otherwise(**changed):
    """A model that knows other names of classes, or takes pictures prepared in another way."""
    model = lively(FIELDS, reducer="norm")
    for name, value in changed.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(model=3), "the model is 3; it is what tif_jax.load"),
        (dict(reducers="evit"), r"reducers is 'evit'; give a list, as in reducers=\['evit'\]"),
        (dict(reducers=7), "reducers is of type int; give a list"),
        (dict(reducers=[3]), "a reducer is 3; it is a name, a dict with one, or a model"),
        (dict(reducers=[{}]), "a reducer is {}; it is a name, or a dict with one"),
        (dict(reducers=[lively(FIELDS | dict(num_classes=7))]), "a model among the reducers has 7 classes"),
        (dict(reducers=[otherwise(preprocessing=Preprocessing(mean=(0.1, 0.2, 0.3)))]), "takes pictures prepared by "),
        (dict(reducers=[otherwise(class_names=NAMES[::-1])]), "has other class names, or these in another order"),
    ],
)
def test_mistakes_in_python(given, message):
    with pytest.raises(InputError, match=message):
        tif_jax.view(**dict(model=model_of(), images=picture(0)) | given)


def test_whose_reducers_are_drawn():
    model = model_of()
    assert [*ways_of(model, None)] == ["evit", "tome", "random", "norm"]
    assert [*ways_of(model_of(TIF), None)] == ["tif (keep_ratio=0.25)"]
    assert [*ways_of(model, ["norm", {"name": "norm"}, model_of(TIF)])] == ["norm", "norm #2", "tif (keep_ratio=0.25)"]
    without = lively(FIELDS | dict(class_token=False, pool="mean"))
    assert [*ways_of(without, None)] == ["tome", "random", "norm"]
    with pytest.raises(InputError, match="evit ranks patches by the attention of the class token"):
        ways_of(without, ["evit"])
    reduced = model_of(TIF)
    full = under(reduced, FULL)
    assert full.reducer is FULL and reduced.reducer is not FULL and "reducer" not in params_of(full)
    assert "reducer" in params_of(under(full, reduced.reducer))


@pytest.mark.parametrize("evo", mostly_long([True, False]))
def test_a_pyramid(evo):
    """No impact, in words; of Evo-LeViT the slow tokens of the last stage."""
    fields = dict(family="levit", image_size=64, widths=(16, 32), depths=(1, 1), num_heads=(1, 2), num_classes=3)
    fields |= dict(positions="absolute", class_token=True) if evo else {}
    model = lively(fields, **(dict(reducer="evo_levit", keep_ratio=0.5) if evo else {}))
    figure = tif_jax.view(model, picture(0))
    words = [text.get_text().replace("\n", " ") for axes in figure.subfigs[0].axes for text in axes.texts]
    assert any("No impact" in text for text in words)
    titles = [axes.get_title() for axes in figure.subfigs[0].axes]
    assert any("of 16 tokens" in title for title in titles) == evo


def test_without_a_head_there_are_tokens_alone():
    model = lively(FIELDS | dict(num_classes=0))
    figure = tif_jax.view(model, picture(0), reducers=["tome"])
    words = [text.get_text().replace("\n", " ") for axes in figure.subfigs[0].axes for text in axes.texts]
    titles = [axes.get_title() for axes in figure.subfigs[0].axes]
    assert len(words) == 1 and "no head" in words[0]
    assert any("of 24 tokens" in title for title in titles) and not any("grey" in title for title in titles)
