"""Exported models compute what the models compute, in onnxruntime and by jax.export, for any batch size."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from cases import call, lively, mostly_long, numpy_images, numpy_model, one_of_a_kind
from jax import export as jax_export
from PIL import Image

import tif_jax
from tif_jax import InputError, WorkError, reducers
from tif_jax.__main__ import main
from tif_jax.export import artifact, to_onnx, to_stablehlo, to_timm

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZE = (32, 32)
FIELDS = dict(image_size=32, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3)
LEVIT = dict(family="levit", image_size=64, widths=(16, 24), depths=(2, 1), num_heads=(2, 3), key_dim=8, num_classes=3)
OPTIONS = {
    "bat": dict(keep_ratio=0.5, sites=(1,)),
    "dynamic_vit": dict(sites=(1,)),
    "evit": dict(sites=(1,)),
    "evo_vit": dict(keep_ratio=0.5),
    "tif": dict(keep_ratio=0.5, adapter=4),
    "diffrate": dict(num_merged=2, num_dropped=2),
    "tofu": dict(num_merged=4, merging=(1,)),
    "tome": dict(num_merged=4),
    "tosa": dict(keep_ratio=0.5, layers=(1,)),
}


def model_for(reducer):
    return lively(FIELDS, reducer=reducer, **OPTIONS.get(reducer, {}))


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": np.asarray(images)}), strict=True))


def check_same(found, model, images):
    logits, aux = call(model, images)
    np.testing.assert_allclose(
        found.pop("logits" if model.num_classes else "features"), logits, atol=1e-3 * float(np.abs(logits).max())
    )
    assert [*found] == [name for name in ("kept", "source") if name in aux][:1]
    for name, value in found.items():
        np.testing.assert_array_equal(value, aux[name])


ONNX = [name for name in reducers.known() if name not in ("random", "evo_levit", "atc")]


# With -m long, too: their steps are much like those of tif, tome and evit.
OTHERS = ("even", "norm", "prior", "diffrate", "expediting", "ailurus")


@pytest.mark.parametrize("reducer", one_of_a_kind(ONNX, also=("full", *OTHERS)))
def test_onnx_of_every_reducer(tmp_path, reducer):
    model = model_for(reducer)
    manifest = to_onnx(model, tmp_path / "made")
    assert manifest["check"]["same_class"] == manifest["check"]["same_tokens"] == 4
    check_same(run_onnx(tmp_path / "made" / "model.onnx", numpy_images(3)), model, numpy_images(3))
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "made" / "model.onnx").graph.node)
    assert counts["LayerNormalization"] >= 5 and counts["Softmax"] >= 2 and counts["Gelu"] >= 2, counts
    assert not {"Erf", "Exp"} & {*counts} or reducer in ("bat", "dynamic_vit", "pitome")  # they are in the fused ones


def test_onnx_of_tokens_that_fuse(tmp_path):
    """As in the schedules of `tif calibrate`, and in `pitome`."""
    model = lively(FIELDS, reducer="importance_merge", num_merged=3)
    to_onnx(model, tmp_path / "made")
    check_same(run_onnx(tmp_path / "made" / "model.onnx", numpy_images(3)), model, numpy_images(3))


def test_what_onnx_can_not_say_is_named(tmp_path):
    drawn = [dict(reducer="random"), dict(reducer="tosa", selector="random")]
    for options, lacks in [*((options, "random_bits") for options in drawn), (dict(reducer="atc"), "scan")]:
        model = numpy_model(FIELDS, **options)
        with pytest.raises(InputError, match=f"'{options['reducer']}' can not be exported to ONNX: .*{lacks}") as told:
            to_onnx(model, tmp_path / "made")
        assert "\n" not in str(told.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("reducer", mostly_long(reducers.known(), [reducers.known().index("random")]))
def test_stablehlo_of_every_reducer(tmp_path, reducer):
    if reducer == "evo_levit":
        pytest.skip("it is for LeViT")
    model = model_for(reducer)
    to_stablehlo(model, tmp_path / "made")
    loaded = jax_export.deserialize(bytearray((tmp_path / "made" / "model.stablehlo").read_bytes()))
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    check_same(
        {name: np.asarray(value) for name, value in loaded.call(numpy_images(3)).items()}, model, numpy_images(3)
    )


@pytest.mark.parametrize("reducer", mostly_long(["full", "evo_levit"]))
def test_levit(tmp_path, reducer):
    more = dict(class_token=True, positions="absolute") if reducer == "evo_levit" else {}
    model = lively(LEVIT | more, reducer=reducer)
    to_onnx(model, tmp_path / "made")
    images = numpy_images(2, (64, 64))
    check_same(run_onnx(tmp_path / "made" / "model.onnx", images), model, images)


def test_a_model_without_a_head(tmp_path):
    model = lively(FIELDS | dict(num_classes=0, pool="mean"), reducer="evit", sites=(1,))
    manifest = to_onnx(model, tmp_path / "made")
    assert [one["name"] for one in manifest["outputs"]] == ["features", "kept"] and "same_class" not in manifest[
        "check"
    ]
    check_same(run_onnx(tmp_path / "made" / "model.onnx", numpy_images(2)), model, numpy_images(2))
    loader = [sys.executable, tmp_path / "made" / "predict.py", "a.png"]
    assert "no classes" in subprocess.run(loader, capture_output=True, text=True).stderr


def test_bfloat16(tmp_path):
    model = numpy_model({**FIELDS, "dtype": "bfloat16"})
    assert to_stablehlo(model, tmp_path / "made")["dtype"] == "bfloat16"
    with pytest.raises(InputError, match=r"bfloat16, for which onnxruntime .*; load it with dtype='float32'"):
        to_onnx(model, tmp_path / "other")


def test_timm_gets_the_network_alone(tmp_path, caplog):
    model = model_for("tif")
    manifest = to_timm(model, tmp_path / "made")
    assert "reducer 'tif' is left out" in caplog.text
    assert (manifest["reducer"]["name"], manifest["left_out"]["name"]) == ("full", "tif")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {*manifest["files"], "manifest.json"}
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["model_args"]["embed_dim"] == 16 and config["num_classes"] == 3
    found = safetensors.numpy.load_file(tmp_path / "made" / "model.safetensors")
    kernel = model.block_0.attention.out.kernel[...]
    np.testing.assert_array_equal(found["blocks.0.attn.proj.weight"], np.asarray(kernel).T)
    with pytest.raises(InputError, match="timm has no model of this kind"):
        to_timm(numpy_model({**FIELDS, "norm_eps": 1e-3}), tmp_path / "other")


def test_the_loader_of_timm(made, tmp_path):
    pytest.importorskip("timm")
    model, _, files = made
    to_timm(model, tmp_path / "made")
    found = run_loader(tmp_path / "made", files)
    assert found == expected_lines(tif_jax.load(tmp_path / "made", reducer="full"), files)


# The manifest and the loader


def pictures(folder):
    """Photographs of many shapes and kinds."""
    rng = np.random.default_rng(0)
    kinds = {
        "wide.png": Image.fromarray(rng.integers(0, 255, (40, 71, 3), np.uint8)),
        "tall.jpg": Image.fromarray(rng.integers(0, 255, (97, 33, 3), np.uint8)),
        "grey.png": Image.fromarray(rng.integers(0, 255, (50, 50), np.uint8)),
        "deep.png": Image.fromarray(rng.integers(0, 65535, (50, 36), np.uint16)),
        "clear.png": Image.fromarray(rng.integers(0, 255, (45, 50, 4), np.uint8)),
        "palette.gif": Image.fromarray(rng.integers(0, 255, (45, 50, 3), np.uint8)).convert("P"),
    }
    for name, image in kinds.items():
        image.save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds["tall.jpg"].save(folder / "turned.jpg", exif=turned)
    return [str(folder / name) for name in sorted([*kinds, "turned.jpg"])]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with names, its export to ONNX, and pictures."""
    folder = tmp_path_factory.mktemp("export")
    model = model_for("tif")
    model.class_names = ("cat", "dog", "a bird")
    model.preprocessing = tif_jax.data.preprocess.Preprocessing(0.9, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")
    to_onnx(model, folder / "made")
    (folder / "pictures").mkdir()
    return model, folder / "made", pictures(folder / "pictures")


def run_loader(folder, files):
    """What predict.py prints in a process that can not import tif_jax."""
    program = f"import sys, runpy; sys.modules['tif_jax'] = None; sys.argv[1:] = {files!r}; "
    program += f"runpy.run_path({str(folder / 'predict.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def expected_lines(model, files):
    lines = []
    for found in model.predict_images(files):
        lines += [found.file]
        lines += [f"  {100 * p:5.1f} %  {name}" for name, p in zip(found.names, found.probabilities, strict=True)]
    return lines


def test_the_loader_predicts_without_this_package(made):
    model, folder, files = made
    assert run_loader(folder, files) == expected_lines(model, files)


def test_the_loader_names_what_it_can_not_read_and_goes_on(made, tmp_path):
    _, folder, files = made
    Image.fromarray(np.full((40, 40), 1e9, np.float32)).save(tmp_path / "floats.tiff")
    (tmp_path / "text.jpg").write_text("no picture")
    paths = [str(tmp_path / "floats.tiff"), str(tmp_path / "text.jpg"), files[0]]
    done = subprocess.run([sys.executable, folder / "predict.py", *paths], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[0] == files[0]
    told = done.stderr.splitlines()
    assert len(told) == 2 and "floats.tiff: its pixels have no fixed range" in told[0] and "text.jpg" in told[1]
    done = subprocess.run([sys.executable, folder / "predict.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "predict.py IMAGE" in done.stderr


@pytest.mark.long
def test_the_loader_of_stablehlo(made, tmp_path):
    model, _, files = made
    to_stablehlo(model, tmp_path / "made")
    assert run_loader(tmp_path / "made", files) == expected_lines(model, files)


@pytest.mark.parametrize("how", [{}, dict(crop_fraction=1.0, interpolation="lanczos"), dict(image_size=(24, 40))])
def test_the_loader_prepares_as_the_package_does(made, how):
    model, folder, files = made
    loader = {"__file__": str(folder / "predict.py"), "__name__": "loader"}
    exec((folder / "predict.py").read_text(), loader)
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in files:
        ours = tif_jax.preprocess([file], model, **how)[0]
        np.testing.assert_allclose(loader["prepared"](file, **{**manifest["preprocessing"], **how}), ours, atol=1e-6)


def test_the_manifest(made):
    model, folder, _ = made
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["class_names"] == ["cat", "dog", "a bird"]
    assert manifest["inputs"] == [{"name": "images", "shape": ["batch", 32, 32, 3], "dtype": "float32"}]
    assert [(one["name"], one["shape"]) for one in manifest["outputs"]] == [
        ("logits", ["batch", 3]),
        ("kept", ["batch", 8]),
    ]
    assert manifest["reducer"]["name"] == "tif" and manifest["reducer"]["keep_ratio"] == 0.5
    assert manifest["cost"]["gmac"] == tif_jax.cost(model).gmac
    assert {*manifest["files"]} == {path.name for path in folder.iterdir()} - {"manifest.json"}


@pytest.mark.long
def test_the_loader_in_a_fresh_environment(made, tmp_path):
    model, folder, files = made
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "pillow", "numpy"], check=True)
    done = subprocess.run([python, folder / "predict.py", *files], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected_lines(model, files)


# Mistakes


def test_what_is_there_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for function in (to_onnx, to_stablehlo, to_timm):
        with pytest.raises(InputError, match="mine exists already"):
            function(numpy_model(FIELDS), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_file_that_computes_something_else_is_not_kept(tmp_path):
    model = numpy_model(FIELDS)
    wrong = lambda images: {"logits": np.asarray(call(model, images)[0]) + 0.1}  # noqa: E731
    with pytest.raises(WorkError, match=r"differs from the model: logits by 0\.1"):
        artifact.write(model, tmp_path / "made", "onnx", {"model.onnx": b""}, lambda path: wrong, "me")
    assert not [*tmp_path.iterdir()]


def test_forms_for_training(tmp_path):
    model = numpy_model(FIELDS, reducer="tosa", layers=(1,), fitting=True)
    with pytest.raises(InputError, match=r"'tosa' is in a form for training alone .*loss/selector"):
        to_stablehlo(model, tmp_path / "made")


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'onnx and onnxruntime: pip install "tif_jax\[export\]"'):
        to_onnx(numpy_model(FIELDS), tmp_path / "made")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--to onnx --output made", "one of the arguments --workdir --weights is required"),
        ("--weights w.safetensors --to torch --output made", "invalid choice: 'torch'"),
        ("--weights w.safetensors --to onnx", "--output is missing"),
        ("--weights w.safetensors --to onnx --output .", "exists already"),
        ("--weights w.safetensors --to onnx --output made --reducer tome:8", "--reducer is 'tome:8'; it is as in"),
        (
            "--weights w.safetensors --to onnx --output made --reducer tome:dtype=float16",
            "--reducer tome:dtype=float16: 'tome' has no option 'dtype'; it takes budget, num_merged",
        ),
        ("--weights w.safetensors --to onnx --output made --reducer tome:name=evit", "--reducer is 'tome:name=evit'"),
        ("--weights w.safetensors --to onnx --output made", "w.safetensors"),
    ],
)
def test_mistakes_of_the_line(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *line.split()]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("tif export: ") and message in told
    assert not [*tmp_path.iterdir()]


def test_a_reducer_that_learned_nothing_is_not_exported(place, capsys):
    """As `tif serve` has it: what is drawn at random ranks at random."""
    assert main("export --workdir run/backbone --to onnx --output made --reducer tif:keep_ratio=0.5".split()) == 2
    assert "has no reducer/filter" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("made").exists()


def test_the_program(place, capsys):
    assert main("export --workdir run/backbone --to onnx --reducer tome:num_merged=1".split()) == 0
    made = Path("run/backbone/export/onnx")
    assert capsys.readouterr().out.startswith(f"{made}/model.onnx: tome, ")
    images = numpy_images(2, (16, 16))
    check_same(
        run_onnx(made / "model.onnx", images), tif_jax.load("run/backbone", reducer="tome", num_merged=1), images
    )
