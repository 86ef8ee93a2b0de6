"""`tif compare`: what it says of each image, against plain numpy; what it keeps; what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from cases import call
from pictures import picture, write_table
from reference import random_timm_tensors, vit_forward
from small_project import forget_handlers, last_line

import tif_jax
from tif_jax.__main__ import main
from tif_jax.commands import _compare_regret, _compare_speed, compare
from tif_jax.commands._compare_rows import labels_of, rows_asked
from tif_jax.commands._weights import read_weights
from tif_jax.runtime import records

NUM_CLASSES = 5
LINE = "--weights w.safetensors --images photos --out out --batch-sizes none"
REGRET = "--reducer norm:keep_ratio=0.5 --reducer tome:num_merged=2"
REDUCERS = "--reducer evit:keep_ratio=0.5 --reducer tome:num_merged=2"


def make(folder):
    """Weights, ten photographs, a damaged one, and labels of eight of them."""
    shape = dict(width=64, depth=2, patch_size=4, grid=(4, 4), num_classes=NUM_CLASSES)
    tensors = random_timm_tensors(np.random.default_rng(0), **shape)
    tensors["head.weight"] = tensors["head.weight"] * 20  # or all images have one class
    safetensors.numpy.save_file(tensors, folder / "w.safetensors")
    how = {"input_size": [3, 16, 16], "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5)}
    described = {"architecture": "of_mine", "num_classes": NUM_CLASSES, "model_args": {"num_heads": 4}}
    (folder / "config.json").write_text(json.dumps(described | {"pretrained_cfg": how}))
    for i in range(10):
        (folder / "photos" / "abcde"[i % 5]).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / "photos" / "abcde"[i % 5] / f"{i}.png")
    (folder / "photos" / "a" / "zz.png").write_bytes(b"damaged")
    rows = [[f"{'abcde'[i % 5]}/{i}.png", (i * 3) % 5] for i in range(8)] + [["a/zz.png", 0]]
    write_table(folder / "photos" / "labels.csv", rows, header=("file", "label"))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    forget_handlers()
    return main(["compare", *line.split()])


def result(folder="out"):
    return json.loads(Path(folder, "compare.json").read_text())


def probabilities(files, **options):
    """Softmax of the plain forward pass, in float64."""
    model = tif_jax.load("w.safetensors", **options)
    logits = np.asarray(call(model, model.preprocess(files))[0], np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def mean_and_error(values):
    values = np.asarray(values, float)
    return [values.mean(), np.sqrt(np.square(values - values.mean()).sum() / (len(values) - 1) / len(values))]


def test_what_rows_come_to(photos, capsys):
    """Two reducers, a reference, labels in a table; the damaged picture and two without a label are left out."""
    assert run(f"{LINE} {REDUCERS} --labels photos/labels.csv --reference tome:num_merged=2") == 0
    found = result()
    files = [f"photos/{'abcde'[i % 5]}/{i}.png" for i in (0, 5, 1, 6, 2, 7, 3, 4)]
    labels = np.array([0, 0, 3, 3, 1, 1, 4, 2])
    full = probabilities(files)
    reduced = {
        "evit-0.5": probabilities(files, reducer="evit", keep_ratio=0.5),
        "tome-2": probabilities(files, reducer="tome", num_merged=2),
    }
    right = {label: shares.argmax(1) == labels for label, shares in (reduced | {"full": full}).items()}
    kl = {label: (full * np.log(full / shares)).sum(1) for label, shares in reduced.items()}
    same = {label: (shares.argmax(1) == full.argmax(1)).astype(float) for label, shares in reduced.items()}
    assert {*found["rows"]} == {"full", *reduced} and found["images"]["num_read"] == 8
    for label in reduced:
        row = found["rows"][label]
        np.testing.assert_allclose(row["kl"], mean_and_error(kl[label]), rtol=1e-3)
        np.testing.assert_allclose(row["agreement"], mean_and_error(same[label]))
        np.testing.assert_allclose(row["top1"], mean_and_error(right[label]))
        paired = right[label].astype(float) - right["full"]
        np.testing.assert_allclose(row["to_full"]["top1"], mean_and_error(paired), atol=1e-12)
    beside = found["rows"]["evit-0.5"]["to_reference"]
    assert beside["label"] == "tome-2" and "to_reference" not in found["rows"]["tome-2"]
    np.testing.assert_allclose(beside["kl"], mean_and_error(kl["evit-0.5"] - kl["tome-2"]), rtol=1e-3, atol=1e-6)
    assert found["rows"]["full"]["agreement"] == [1.0, 0.0] and found["rows"]["full"]["kl"] == [0.0, 0.0]
    assert found["rows"]["evit-0.5"]["gmac"] == pytest.approx(
        tif_jax.cost(tif_jax.load("w.safetensors", reducer="evit", keep_ratio=0.5)).gmac
    )
    page = Path("out/compare.md").read_text()
    assert "8 of 9 in `photos`" in page and "agreement %" in capsys.readouterr().out
    assert Path("out/compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_rerun_keeps_rows(photos, monkeypatch, capsys):
    assert run(f"{LINE} --reducer tome:num_merged=2") == 0
    before, seen = result(), []
    whole = compare.beside

    def noted(models, *arguments):
        seen.append([type(model.reducer).__name__ for model in models])
        return whole(models, *arguments)

    monkeypatch.setattr(compare, "beside", noted)
    assert run(f"{LINE} --reducer tome:num_merged=2") == 0
    assert seen == [] and result()["rows"] == before["rows"]
    assert run(f"{LINE} {REDUCERS}") == 0
    assert seen == [["Evit"]] and result()["rows"]["tome-2"] == before["rows"]["tome-2"]
    assert run(f"{LINE} --num-images 6") == 2
    assert "out has a comparison with other images; choose another --out, or delete" in last_line(capsys)
    tensors = safetensors.numpy.load_file("w.safetensors")
    safetensors.numpy.save_file(tensors | {"head.bias": tensors["head.bias"] + 1}, "w.safetensors")
    assert run(LINE) == 2
    assert "out has a comparison with other weights" in last_line(capsys)


def test_rows_of_another_place_are_made_again(photos, monkeypatch, capsys):
    """Amounts that were found by time are of one machine, and predictions of one version."""
    line = f"{LINE} --reducer tome:num_merged=2 --reducer random"
    assert run(f"{line} --budget 0.3x") == 0
    whole, seen = compare.beside, []
    monkeypatch.setattr(compare, "beside", lambda models, *rest: seen.append(len(models)) or whole(models, *rest))
    for name, told in [
        ("machine", "made again where asked for: random-0.3x"),
        ("versions", "full, random-0.3x, tome-2"),
    ]:
        data = records.read(Path("out/compare.json"))
        data[name] |= {next(iter(data[name])): "another"}
        records.write(Path("out/compare.json"), data)
        capsys.readouterr()
        assert run(f"{line} --budget 0.3x") == 0
        assert told in capsys.readouterr().err
    assert seen == [1, 3] and {*result()["rows"]} == {"full", "tome-2", "random-0.3x"}


def test_an_image_that_can_not_be_read_any_more(photos, monkeypatch, capsys):
    """Nothing of what is read after it is kept."""
    whole = compare.beside

    def lost(*arguments):
        Path("photos/c/2.png").write_bytes(b"damaged")
        return whole(*arguments)

    monkeypatch.setattr(compare, "beside", lost)
    assert run(f"{LINE} --reducer tome:num_merged=2") == 2
    assert "of the images can not be read any more" in last_line(capsys)
    assert not Path("out/compare.json").exists()


def test_stopped_between_rows(photos, monkeypatch):
    """What was finished before the program was stopped is there, and is not made again."""
    monkeypatch.setattr(compare, "AT_ONCE", 1)
    done, whole = [], compare.beside

    def stop_at_third(models, *arguments):
        done.append(type(models[0].reducer).__name__)
        if len(done) == 3:
            raise KeyboardInterrupt
        return whole(models, *arguments)

    monkeypatch.setattr(compare, "beside", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(f"{LINE} {REDUCERS}")
    assert {*result()["rows"]} == {"full", "evit-0.5"}
    assert run(f"{LINE} {REDUCERS}") == 0
    assert done == ["Full", "Evit", "Tome", "Tome"]


def test_a_budget_out_of_reach_of_one_reducer(photos):
    """The others have their rows, and the page says why this one has none."""
    least = 1.01 * tif_jax.cost(tif_jax.load("w.safetensors", reducer="random", keep_ratio=0.05)).gmac
    assert run(f"{LINE} --reducer tome --reducer random --budget {least}") == 0
    (label,) = result()["left_out"]
    assert label.startswith("tome-") and [row.split("-")[0] for row in result()["rows"]] == ["full", "random"]
    assert f"{label} is left out: budget is" in Path("out/compare.md").read_text()


def test_regret(photos):
    """Numpy forwards of what `norm` keeps, alone, and of as many patches of the highest impact; ToMe keeps none."""
    tensors = safetensors.numpy.load_file("w.safetensors")
    model = tif_jax.load("w.safetensors", reducer="norm", keep_ratio=0.5)
    images = model.preprocess([f"photos/{'abcde'[i % 5]}/{i}.png" for i in (0, 5, 1, 6, 2, 7, 3, 8, 4, 9)])
    impact = tif_jax.token_impact(model, images, estimator="sampled", target="teacher", num_samples=2)
    kept = np.asarray(call(model, images)[1]["kept"])
    best = np.argsort(-np.asarray(impact), axis=1)[:, : kept.shape[1]]
    assert not np.array_equal(np.sort(kept), np.sort(best))

    def log_shares(which):
        """Of each image with only these patches."""
        rows = [
            vit_forward(tensors, image[None], num_heads=4, dropped=sorted({*range(16)} - {*rows}))[0]
            for image, rows in zip(np.asarray(images), which, strict=True)
        ]
        return np.array(rows) - np.log(np.exp(rows).sum(axis=1, keepdims=True))

    full, of_kept, of_best = (log_shares(which) for which in ([range(16)] * 10, kept, best))
    wanted = (np.exp(full) * (of_best - of_kept)).sum(axis=1)
    assert run(f"{LINE} {REGRET}") == 0
    assert "regret" not in Path("out/compare.md").read_text()
    assert run(f"{LINE} {REGRET} --regret 2") == 0
    rows = result()["rows"]
    np.testing.assert_allclose(rows["norm-0.5"]["regret"], mean_and_error(wanted), rtol=1e-3, atol=1e-5)
    assert rows["tome-2"]["regret"] is None and rows["full"]["regret"] is None
    assert "| regret nats |" in Path("out/compare.md").read_text()


def test_regrets_are_kept(photos, monkeypatch):
    """With the oracle that they are of: they are made anew for another one."""
    made, scored = [], []
    regrets, impacts = _compare_regret.regrets, _compare_regret.impacts
    monkeypatch.setattr(_compare_regret, "regrets", lambda *a: made.append(len(a[1])) or regrets(*a))
    monkeypatch.setattr(_compare_regret, "impacts", lambda *a: scored.append(a[3]) or impacts(*a))
    line = f"{LINE} --reducer norm:keep_ratio=0.5 --num-images 4"
    assert run(f"{line} --regret 1") == 0 and run(f"{line} --regret 1") == 0
    assert (made, scored) == ([1], [1])
    assert run(f"{line} --regret 1 --reducer random:keep_ratio=0.5") == 0
    assert (made, scored) == ([1, 1], [1])
    before = result()["rows"]["norm-0.5"]["regret"]
    assert run(f"{line} --regret 2") == 0
    assert (made, scored) == ([1, 1, 1], [1, 2]) and result()["rows"]["norm-0.5"]["regret"] != before


def test_speeds_are_of_interleaved_rounds(photos, monkeypatch, capsys):
    monkeypatch.setattr(_compare_speed, "_SECONDS", 0.0)
    line = LINE.replace("--batch-sizes none", "--batch-sizes 1,8")
    assert run(f"{line} --reducer tome:num_merged=2 --labels folders --rounds 3") == 0
    found = result()
    for size in ("1", "8"):
        assert found["speeds"][size]["rounds"] == 3
        for row in found["rows"].values():
            low, high = row["speed"][size]["images_per_second_range"]
            assert 0 < low <= row["speed"][size]["images_per_second"] <= high
            assert row["speed"][size]["peak_memory_bytes"] > 0
        assert found["rows"]["full"]["speed"][size]["speed_up_range"] == [1.0, 1.0]
    assert "images/s at 8" in capsys.readouterr().out
    assert found["rows"]["full"]["top1"] is not None  # five folders, five classes
    monkeypatch.setattr(compare, "speeds", lambda *_: pytest.fail("speeds are there"))
    assert run(f"{line} --reducer tome:num_merged=2 --labels folders --rounds 2") == 0


def test_rows_and_their_budgets(photos):
    weights = read_weights("w.safetensors", "float32", "a comparison")
    given = ["tome", "{'name': 'evit', 'keep_ratio': 0.5}", '{"name": "tome", "num_merged": 1}', "tome"]
    asked = rows_asked(weights, given, ["0.001", "2x", "9 images/s at 4"], batch_size=16)
    assert labels_of(asked) == ["full", "evit-0.5", "tome-1", "tome-0.001GMAC", "tome-2x@16", "tome-9ips@4"]
    assert [one.budget for one in asked] == ["", "", "", "0.001", "2x", "9 images/s at 4"]
    untrained = [one.entry.name for one in rows_asked(weights, [], [], 32)]
    assert {"full", "tome", "evit", "random", "norm"} <= {*untrained}
    assert not {"tif", "prior", "tosa", "dynamic_vit", "evo_levit"} & {*untrained}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--reducer tif:keep_ratio=0.5", "w.safetensors has no reducer/filter, which 'tif' has to learn"),
        ("--reducer tomy", "Unknown reducer 'tomy'"),
        ("--reducer tome:num=3", "--reducer tome:num=3: 'tome' has no option 'num'; it takes budget, num_merged"),
        ("--reducer {name:", "--reducer {name: is no dict"),
        ("--reducer tome --budget fast", "--budget is 'fast'; it is a number of GMAC, above 0, or a speed"),
        ("--reducer tome --budget 1e-9", "budget is 1e-09 GMAC; the least that this reducer can do is"),
        ("--reducer tome --reference evit", "--reference is 'evit', which is no row; there are full, tome-13"),
        (
            "--reducer schedules --reference schedules",
            "--reference is 'schedules', which is several rows: tome-1, tome-2",
        ),
        ("--batch-sizes 1,x", "--batch-sizes is '1,x'; it is as in 1,16,256, or none"),
        ("--num-images 0", "--num-images is 0"),
        ("--rounds 0", "--rounds is 0"),
        ("--regret 0", "--regret is 0"),
        ("--dtype int8", "dtype is 'int8'; allowed"),
        ("--images nowhere", "nowhere is not a folder; --images takes folders of images"),
        ("--labels nowhere.csv", "no such file: nowhere.csv"),
        ("--labels other/labels.csv", "other/labels.csv lists none of the images in photos"),
        ("--labels folders --images photos/a", "photos/a/0.png lies in no class folder"),
        (
            '--labels folders --class-index {"a":7}',
            "folder 'b' is none of the 1 known classes: say which in --class-index",
        ),
        ("--labels photos/labels.csv --class-index [1]", "--class-index is '[1]'; it is JSON as in"),
        ("--weights nowhere.safetensors", "nowhere.safetensors"),
        ("--out photos/labels.csv", "labels.csv"),
    ],
)
def test_mistakes_are_one_line(photos, capsys, line, message):
    Path("other").mkdir()
    Path("schedules").mkdir()
    for number in (1, 2):
        Path(f"schedules/{number}.json").write_text(json.dumps({"reducer": {"name": "tome", "num_merged": number}}))
    picture(0).save("other/x.png")
    write_table(Path("other/labels.csv"), [["x.png", 1]], header=("file", "label"))
    defaults = dict(zip(LINE.split()[::2], LINE.split()[1::2], strict=True))
    given = line.split()
    words = [word for flag, value in defaults.items() if flag not in given for word in (flag, value)]
    forget_handlers()
    assert main(["compare", *words, *given]) == 2
    told = last_line(capsys)
    assert told.startswith("tif compare: ") and message in told
    assert not Path("out/compare.json").exists()
